"""Drawn data sets, and checks of the data that a config names."""
from .check import check_dataset
from .guarded import GuardedDataset
from .inspection import BrokenData, check_annotations, inspect
from .shapes import CATEGORIES, SEG_CLASSES, draw
from .writers import write_ade20k, write_coco

__all__ = ['BrokenData', 'CATEGORIES', 'GuardedDataset', 'SEG_CLASSES', 'check_annotations',
           'check_dataset', 'draw', 'inspect', 'write_ade20k', 'write_coco']
