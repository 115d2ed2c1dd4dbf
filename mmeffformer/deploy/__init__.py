"""Fusing of trained models, and export to other runtimes."""
from ..models.fuse import fuse

__all__ = ['fuse']
