"""Reads, loads and converts checkpoints of every published EfficientFormer layout."""
from ..models.backbone import Backbone
from .layouts import LAYOUTS, LAYOUTS_V2, convert
from .load import Report, load_weights
from .safe_loading import read_checkpoint

Backbone.pretrained_loader = staticmethod(load_weights)

__all__ = ['LAYOUTS', 'LAYOUTS_V2', 'Report', 'convert', 'load_weights', 'read_checkpoint']
