"""Drawn data sets, and checks of the data that a config names."""
from .check import Report, check_data
from .paths import check_dataset
from .shapes import CATEGORIES, SEG_CLASSES, draw
from .traced import SampleError, TracedDataset
from .writers import write_ade20k, write_coco

__all__ = ['SampleError', 'CATEGORIES', 'TracedDataset', 'Report', 'SEG_CLASSES', 'check_data',
           'check_dataset', 'draw', 'write_ade20k', 'write_coco']
