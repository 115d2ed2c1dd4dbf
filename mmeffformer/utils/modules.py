"""Wrapped models."""
from typing import cast

from mmengine.model import BaseAveragedModel, BaseTTAModel, is_model_wrapper
from torch import nn


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers, as of distributed training or test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, (BaseTTAModel, BaseAveragedModel)):
        model = cast(nn.Module, model.module)
    return model
