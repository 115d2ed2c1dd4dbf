"""Trained models made fast: fused, and exported to other runtimes."""
from ..models.fuse import fuse

__all__ = ['fuse']
