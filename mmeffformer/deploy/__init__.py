"""Fusing of trained models, half precision, and export to other runtimes."""
from ..models.fuse import fuse
from ..models.precision import half_precision

__all__ = ['fuse', 'half_precision']
