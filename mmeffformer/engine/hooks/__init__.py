"""Hooks, registered under their class names."""
from .checkpoint import CheckpointHook, EarlyStoppingHook
from .safety import FiniteLossHook, SeedHook
from .speed import DeployHook, SpeedHook
from .supernet import TemperatureHook

__all__ = ['CheckpointHook', 'DeployHook', 'EarlyStoppingHook', 'FiniteLossHook', 'SeedHook',
           'SpeedHook', 'TemperatureHook']
