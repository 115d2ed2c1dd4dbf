"""Wrapped models."""
from typing import cast

from mmengine.model import is_model_wrapper
from torch import nn


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside a wrapper such as DistributedDataParallel."""
    return cast(nn.Module, model.module) if is_model_wrapper(model) else model
