"""What a Runner can be told to do: for speed, with results that stay the same to rounding, and
while a supernet is trained."""
from typing import Union

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import nn

from .deploy.fuse import fuse
from .registry import HOOKS


def bare(model: nn.Module) -> nn.Module:
    """Return the model inside a wrapper, as of a job of several processes."""
    return model.module if is_model_wrapper(model) else model


@HOOKS.register_module()
class SpeedHook(Hook):
    """Chooses the memory format, and compiles, before training or testing.

    Args:
        channels_last: Keep the channels of a pixel side by side in memory, which
            convolutions on CPUs, and mixed precision on GPUs, work best with.
        compile: torch.compile the backbone and the neck: True, or a dict of its
            arguments. The heads, whose sizes change with what is found, stay as they
            are. Each new image size is compiled anew, unless ``dict(dynamic=True)``.
    """

    def __init__(self, channels_last: bool = False, compile: Union[bool, dict] = False):
        self.channels_last, self.compile = channels_last, compile

    def before_run(self, runner):
        model = bare(runner.model)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        if self.compile is not False:
            options = {} if self.compile is True else self.compile
            for part in (getattr(model, 'backbone', None), getattr(model, 'neck', None)):
                if part is not None:
                    part.compile(**options)


@HOOKS.register_module()
class DeployHook(Hook):
    """Fuses the model before it is tested (:func:`fuse`)."""

    def before_test(self, runner):
        fuse(bare(runner.model))


@HOOKS.register_module()
class TemperatureHook(Hook):
    """Lowers the temperature of a supernet's mixtures while it is trained, geometrically.

    At first every branch of a path is trained by every batch, at last nearly one at a time,
    which is what a network that is chosen later does (Jang et al., Categorical
    Reparameterization with Gumbel-Softmax, 2017, lower it so too).

    Args:
        start, end: Temperature at the first and the last iteration.
    """

    def __init__(self, start: float = 1., end: float = 0.1):
        if not 0 < end <= start:
            raise ValueError(f'temperatures from {start!r} to {end!r}: expected 0 < end <= start')
        self.start, self.end = start, end

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        done = runner.iter / max(1, runner.max_iters - 1)
        bare(runner.model).backbone.set_temperature(self.start * (self.end / self.start) ** done)
