"""Faster inference on CPUs in eager mode, with the same results to rounding.

oneDNN's operators read and write whole maps, so a large map goes to memory and back for every
operator. The functions below work on pieces that stay in the cache. They apply without gradients
only; ``ENABLED = False`` switches all of them off.

"Gain" in a comment is the speed-up that a function brings alone to the fused backbones L1 and S0
in channels_last, at 224 x 224 and at 800 x 1344: CPU time of one thread, plain over faster, median
of interleaved rounds.

Shapes: B batch, C channels, H rows, W columns, N tokens, D channels of a head.
"""
from typing import Callable

import torch
from torch import Tensor, nn

ENABLED = True

# torch 2.1 has the second name only.
is_compiling = getattr(torch.compiler, 'is_compiling', None) or torch._dynamo.is_compiling


def is_captured() -> bool:
    """Return whether operators go to the tracer, the compiler, a dispatch mode or torch.func."""
    return (is_compiling() or torch.jit.is_tracing() or is_transformed()
            or torch._C._len_torch_dispatch_stack() > 0)


def is_transformed() -> bool:
    """Return whether the code runs under ``torch.func.grad``, ``vmap`` or their like."""
    return not is_compiling() and torch._C._are_functorch_transforms_active()


def is_autocast() -> bool:
    """Return whether autocast is on for CPUs."""
    try:
        return torch.is_autocast_enabled('cpu')
    except TypeError:  # torch before 2.4
        return torch.is_autocast_cpu_enabled()


def applies(x: Tensor) -> bool:
    """Return whether ``x`` is computed on a CPU, in eager mode and without gradients."""
    return (ENABLED and x.device.type == 'cpu' and not torch.is_grad_enabled()
            and not is_captured())


# Strips of rows. Gain: L1 1.01 and 1.11, S0 1.01 and 1.07.
STRIP_BYTES = 8 * 2 ** 20  # of the hidden map in one strip: a share of a common last-level cache
MIN_STRIPS = 2  # smaller maps stay in the cache well enough


def by_strips(block: nn.Module, x: Tensor, hidden: int) -> Tensor:
    """Return block(x), computed strip by strip where the hidden map is large.

    Args:
        block: Maps (B, C, H, W) to the same shape, in eval mode each pixel from the 3 x 3
            around it; given a slice of rows, it returns those rows only.
        x: (B, C, H, W).
        hidden: Channels of the block's widest map.
    """
    # In NCHW, a strip is not contiguous. A compiled block would be compiled for every strip.
    if block.training or not applies(x) or x.is_contiguous() or block._compiled_call_impl:
        return block(x)
    strip = max(1, STRIP_BYTES // (hidden * x.shape[3] * x.element_size()))  # rows
    if x.shape[2] <= MIN_STRIPS * strip:
        return block(x)
    return torch.cat([torch.cat([_strip(block, image, top, strip)
                                 for top in range(0, x.shape[2], strip)], 2)
                      for image in x.split(1)])


def _strip(block: nn.Module, image: Tensor, top: int, rows: int) -> Tensor:
    above, bottom = max(top - 1, 0), min(top + rows, image.shape[2])
    return block(image[:, :, above:bottom + 1], slice(top - above, bottom - above))


# Some queries of one head at a time. Gain: L1 1.00 and 1.01, S0 1.04 and 1.25.
SCORE_BYTES = 2 * 2 ** 20  # of the scores of one piece: about the cache of one core


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Return softmax(q k / sqrt(D) + bias) v; see :func:`mmeffformer.models.attention.attend`.

    torch's own kernel that never holds all scores needs keys and values of one width.
    """
    keys = (k * q.shape[-1] ** -0.5).transpose(2, 3)
    rows = max(1, SCORE_BYTES // (k.shape[2] * k.element_size()))
    out = v.new_empty(len(q), q.shape[2], *v.shape[1::2]).transpose(1, 2)  # as tokens
    for sample in range(len(q)):
        for head in range(q.shape[1]):
            for i in range(0, q.shape[2], rows):
                part = slice(i, i + rows)
                scores = torch.addmm(bias[head, part], q[sample, head, part], keys[sample, head])
                out[sample, head, part] = scores.softmax(-1) @ v[sample, head]
    return out


# Some queries of all heads at a time, for mixed heads. Gain: S0 1.02 and 1.25; L1 mixes none.
def by_queries(attend_some: Callable[..., Tensor], q: Tensor, keys: Tensor, v: Tensor,
               bias: Tensor) -> Tensor:
    """Return attend_some(q, keys, v, bias), computed for some queries at a time.

    Args:
        attend_some: Maps its arguments to (B, heads, queries, channels of a value).
        q: (B, heads, queries, D).
        keys: (B, heads, D, keys).
        v: (B, heads, keys, channels of a value).
        bias: (heads, queries, keys).
    """
    rows = max(1, SCORE_BYTES // (bias[:, 0].numel() * len(q) * q.element_size()))
    keys, v = keys.contiguous(), v.contiguous()
    return torch.cat([attend_some(queries, keys, v, offsets)
                      for queries, offsets in zip(q.split(rows, 2), bias.split(rows, 1))], 2)


# Activations that oneDNN computes within the convolution. Gain: L1 1.02 and 1.16, S0 1.04 and
# 1.11.
POST_OPS = {repr(nn.ReLU()): 'relu', repr(nn.GELU()): 'gelu', repr(nn.SiLU()): 'swish'}


def fuses_activation(x: Tensor) -> bool:
    """Return whether :func:`convolve` takes ``x``."""
    return (applies(x) and x.dtype == torch.float32 and not is_autocast()
            and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, '_convolution_pointwise'))


def convolve(conv: nn.Conv2d, x: Tensor, post_op: str) -> Tensor:
    """Return the activation of conv(x), by the private operator that torch.compile uses.

    Args:
        post_op: A value of ``POST_OPS``.
    """
    return torch.ops.mkldnn._convolution_pointwise(
        x, conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups,
        post_op, [], 'none')
