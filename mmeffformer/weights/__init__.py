"""Checkpoints of every published EfficientFormer layout, read safely and whole.

Importing this makes mmengine read checkpoints safely too, so that ``custom_imports`` of
mmeffformer in a config protects mmdet's and mmseg's own tools as well.
"""
from ..models.backbone import Backbone
from . import safe_loading
from .layouts import LAYOUTS, LAYOUTS_V2, convert
from .load import Report, load_weights
from .read import read_checkpoint

safe_loading.install()
Backbone.pretrained_loader = staticmethod(load_weights)

__all__ = ['LAYOUTS', 'LAYOUTS_V2', 'Report', 'convert', 'load_weights', 'read_checkpoint']
