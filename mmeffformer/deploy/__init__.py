"""Trained models made fast: fused, and exported to other runtimes."""
from .fuse import fuse

__all__ = ['fuse']
