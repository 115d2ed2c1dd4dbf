"""The module ``mmcv._ext`` for an mmcv without compiled operators.

Names, arguments and order are those with which mmcv's Python wrappers call the extension: results
are written into the tensors passed in, which the wrappers have filled with zeros. Any other
operator raises :class:`NotImplementedError` when it is called. All operators run on the CPU and on
CUDA and compute half precision in float32. Each module below lists its differences from mmcv's
compiled operators. As with those, summation order on CUDA varies, so gradients there are not
bitwise reproducible.
"""
# ruff: noqa: F401  (mmcv uses the imported operators)
from typing import Any, Callable

import torchvision

from .common import missing_operator
from .deform import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
    ms_deform_attn_backward,
    ms_deform_attn_forward,
)
from .losses import sigmoid_focal_loss_backward, sigmoid_focal_loss_forward
from .nms import nms, softnms
from .roi import roi_align_backward, roi_align_forward


def __getattr__(name: str) -> Callable:
    # mmcv asks with hasattr for every operator on import, so only a call may fail. Names with
    # leading underscores belong to Python.
    if name.startswith('_'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def missing(*args: Any, **kwargs: Any) -> None:
        raise missing_operator(name)

    missing.__name__ = missing.__qualname__ = name
    return missing


def get_compiler_version() -> str:
    """Return that no compiler was used, and the version of torchvision."""
    return f'none (operators from torchvision {torchvision.__version__})'


def get_compiling_cuda_version() -> str:
    """Return that no CUDA compiler was used."""
    return 'not available'
