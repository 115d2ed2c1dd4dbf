"""Faster inference on CUDA GPUs in eager mode, with the same results to rounding.

At batch 1 a GPU waits for kernels to start, and at larger batches most kernels wait for memory.
Both call for fewer kernels. The functions below apply to fused networks without gradients, in
channels_last; ``ENABLED = False`` switches them off.

"Gain" is the speed-up in bfloat16 on an H200 at 224 x 224, see docs/results/gpu.md.

Shapes: B batch, C channels, H rows, W columns, N = B * H * W pixels.
"""
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import cpu

ENABLED = True
POOL_BLOCK = False  # has not run on a GPU yet: tested with its kernel interpreted on a CPU


def applies(x: Tensor) -> bool:
    """Return whether (B, C, H, W) is computed on a GPU, in eager mode and without gradients."""
    return (ENABLED and x.is_cuda and not torch.is_grad_enabled() and not cpu.is_captured()
            and x.permute(0, 2, 3, 1).is_contiguous())


# Gain: L3 in eager mode 1.23, at batch 1 and 64.
def multiplies(conv: nn.Conv2d, x: Tensor) -> bool:
    """Return whether a convolution is a matrix product, in the type of ``x``."""
    return (conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1
            and conv.weight.dtype == x.dtype and applies(x))


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return conv(x) of a 1 x 1 convolution. cuBLAS adds the bias; cuDNN needs a kernel more."""
    return F.linear(x.permute(0, 2, 3, 1), _weight(conv), conv.bias).permute(0, 3, 1, 2)


def _weight(conv: nn.Conv2d) -> Tensor:
    return conv.weight[:, :, 0, 0]


def takes_pool_block(mlp: Any, x: Tensor) -> bool:
    """Return whether :func:`pool_block` computes a ConvMlp of two fused 1 x 1 convolutions."""
    return (POOL_BLOCK and mlp.expand.post_op == 'gelu'
            and isinstance(mlp.project.norm, nn.Identity)
            and x.dtype in (torch.bfloat16, torch.float16) and x.numel() < 2 ** 31
            and multiplies(mlp.expand.conv, x) and kernels() is not None)


def pool_block(mlp: Any, x: Tensor, scale: Tensor) -> Tensor:
    """Return y + mlp(y) for y = x + scale * (average of the 3 x 3 - x): three kernels, not nine.

    In bfloat16 the GELU is cuBLAS's, by tanh, whose error of 5e-4 is below the rounding.

    Args:
        mlp: A ConvMlp for which :func:`takes_pool_block`.
        x: (B, C, H, W).
        scale: (C,).
    """
    expand, project = mlp.expand.conv, mlp.project.conv
    y, out = kernels().pool_and_shift(x.permute(0, 2, 3, 1), scale, project.bias)
    rows, weight = y.flatten(0, 2), _weight(expand).t()
    if x.dtype == torch.bfloat16:
        hidden = torch._addmm_activation(expand.bias, rows, weight, use_gelu=True)
    else:
        hidden = F.gelu(torch.addmm(expand.bias, rows, weight))
    out.view(rows.shape).addmm_(hidden, _weight(project).t())
    return out.permute(0, 3, 1, 2)


@lru_cache
def kernels() -> Any:
    """Return the module of kernels in Triton, None where Triton is not installed."""
    try:
        from . import gpu_kernels
    except ImportError:
        return None
    return gpu_kernels
