"""Drawn data sets, and a look at whether the data a config names are there."""
from .check import check_dataset
from .shapes import CATEGORIES, SEG_CLASSES, draw, write_ade20k, write_coco

__all__ = ['CATEGORIES', 'SEG_CLASSES', 'check_dataset', 'draw', 'write_ade20k', 'write_coco']
