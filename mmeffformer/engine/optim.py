"""Mixed precision where mmengine has none."""
from contextlib import contextmanager
from typing import Iterator

import torch
from mmengine.optim import OptimWrapper
from mmengine.runner.amp import autocast
from torch import nn

from ..utils.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class Bf16OptimWrapper(OptimWrapper):
    """Trains under bfloat16 autocast, on CPUs too, which mmengine's ``AmpOptimWrapper`` refuses.

    Weights, their gradients and the optimizer's state stay in float32. bfloat16 has float32's
    range, so losses are not scaled.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield
