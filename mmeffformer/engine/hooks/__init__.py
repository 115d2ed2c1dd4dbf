"""Hooks, registered under their class names."""
from .checkpoint import CheckpointHook, EarlyStoppingHook
from .resume import ResumeHook
from .safety import FiniteLossHook, MetricHook, SeedHook
from .speed import DeployHook, SpeedHook
from .supernet import TemperatureHook

__all__ = ['CheckpointHook', 'DeployHook', 'EarlyStoppingHook', 'FiniteLossHook', 'MetricHook',
           'ResumeHook', 'SeedHook', 'SpeedHook', 'TemperatureHook']
