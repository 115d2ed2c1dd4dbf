"""Trained models made fast: fused, and exported to other runtimes."""
from .fuse import DeployHook, fuse

__all__ = ['DeployHook', 'fuse']
