"""Trained models made fast: fused."""
from .fuse import DeployHook, fuse

__all__ = ['DeployHook', 'fuse']
