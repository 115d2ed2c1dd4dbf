"""Checkpoints of every published EfficientFormer layout, read safely and whole."""
from ..models.backbone import Backbone
from .layouts import LAYOUTS, LAYOUTS_V2, convert
from .load import Report, load_weights
from .read import read_checkpoint

Backbone.pretrained_loader = staticmethod(load_weights)

__all__ = ['LAYOUTS', 'LAYOUTS_V2', 'Report', 'convert', 'load_weights', 'read_checkpoint']
