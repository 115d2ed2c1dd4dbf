"""Checkpoints of every published EfficientFormer layout, read safely and whole."""
from .layouts import LAYOUTS, convert
from .load import Report, load_weights
from .read import read_checkpoint

__all__ = ['LAYOUTS', 'Report', 'convert', 'load_weights', 'read_checkpoint']
