"""Wrapped models, and parts of models."""
from typing import Any, cast

from mmengine.model import BaseAveragedModel, BaseTTAModel, is_model_wrapper
from torch import nn


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers, as of distributed training or test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, (BaseTTAModel, BaseAveragedModel)):
        model = cast(nn.Module, model.module)
    return model


def compile_blocks(network: nn.Module, **options: Any) -> None:
    """Compile the items of the innermost ``nn.ModuleList``s in place, one by one.

    Items of one class and shape share what was compiled, which takes a fraction of the time that
    the network as a whole takes. A network without such lists is compiled as a whole.

    Args:
        network: Any network.
        options: Arguments of torch.compile.
    """

    def nested(module: nn.Module) -> bool:
        return any(isinstance(each, nn.ModuleList) for each in module.modules())

    blocks = [block for each in network.modules() if isinstance(each, nn.ModuleList)
              for block in each if not nested(block)]
    for block in blocks or [network]:
        block.compile(**options)
