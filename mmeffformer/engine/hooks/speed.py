"""Hooks that change how fast a model computes, and its results by rounding at most."""
from typing import Union

import torch
from mmengine.hooks import Hook
from torch import nn

from ...models.fuse import fuse
from ...models.precision import half_precision
from ...utils.modules import compile_blocks, unwrap_model
from ...utils.registry import HOOKS


@HOOKS.register_module()
class SpeedHook(Hook):
    """Choose the memory format and compile the model before training or testing.

    Args:
        channels_last: Store the channels of a pixel next to each other. Convolutions on CPUs, and
            mixed precision on GPUs, are fastest with this memory format.
        compile: Compile the backbone and the neck with torch.compile: True, or a dict of its
            arguments. The heads are not compiled because their input sizes vary with the number
            of objects. Each new image size is compiled again, unless ``dict(dynamic=True)``.
            ``dict(regional=True)`` compiles their blocks instead, each class and shape once
            (:func:`mmeffformer.utils.modules.compile_blocks`): far less to compile.
    """

    def __init__(self, channels_last: bool = False, compile: Union[bool, dict] = False):
        self.channels_last, self.compile = channels_last, compile

    def before_run(self, runner) -> None:
        model = unwrap_model(runner.model)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        if self.compile is not False:
            options = {} if self.compile is True else dict(self.compile)
            run = compile_blocks if options.pop('regional', False) else nn.Module.compile
            for part in (getattr(model, 'backbone', None), getattr(model, 'neck', None)):
                if part is not None:
                    run(part, **options)


@HOOKS.register_module()
class DeployHook(Hook):
    """Fuse the model before it is tested (:func:`mmeffformer.deploy.fuse`).

    Args:
        dtype: 'fp32', or one of :func:`mmeffformer.deploy.half_precision`.
    """

    def __init__(self, dtype: str = 'fp32'):
        self.dtype = dtype

    def before_test(self, runner) -> None:
        model = fuse(unwrap_model(runner.model))
        if self.dtype != 'fp32':
            half_precision(model, self.dtype)
