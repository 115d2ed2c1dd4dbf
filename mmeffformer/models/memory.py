"""What a block holds in memory at a time: little, so that it stays in a cache or leaves room.

In inference on a CPU, blocks that look no farther than the next row are computed strip by
strip: the hidden map of a whole large image has to go to memory and back for every layer.
In training, what is cheap to make again is made again in backward instead of kept.

Shapes: B batch, C channels, H rows, W columns.
"""
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Callable, ContextManager, Iterator, Optional

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

# Of the hidden map in one strip: a share of the last cache of common CPUs. Maps of a few
# times that much stay in the cache well enough, and strips would cost more than they save.
STRIP_BYTES = 8 * 2 ** 20
WORTH_STRIPS = 2

_lean = ContextVar('lean', default=True)

# torch 2.1 has it under the second name only.
_is_compiling = getattr(torch.compiler, 'is_compiling', None) or torch._dynamo.is_compiling


def is_captured() -> bool:
    """Return whether the code runs to make a graph of it, by the tracer or the compiler."""
    return _is_compiling() or torch.jit.is_tracing()


def is_autocast() -> bool:
    """Return whether autocast is on for CPUs."""
    try:
        return torch.is_autocast_enabled('cpu')
    except TypeError:  # torch before 2.4
        return torch.is_autocast_cpu_enabled()


def by_strips(block: nn.Module, x: Tensor, hidden: int) -> Tensor:
    """Return block(x), computed strip by strip where that is faster.

    Args:
        block: Maps (B, C, H, W) to the same shape, in eval mode each pixel from the 3 x 3
            around it; given a slice of rows, it returns those only.
        x: (B, C, H, W).
        hidden: Channels of the block's widest map.
    """
    strip = max(1, STRIP_BYTES // (hidden * x.shape[3] * x.element_size()))  # rows
    if (block.training or torch.is_grad_enabled() or torch.jit.is_tracing()
            or x.device.type != 'cpu' or x.is_contiguous() or x.shape[2] <= WORTH_STRIPS * strip):
        return block(x)
    return torch.cat([torch.cat([_strip(block, image, top, strip)
                                 for top in range(0, x.shape[2], strip)], 2)
                      for image in x.split(1)])


def _strip(block: nn.Module, image: Tensor, top: int, rows: int) -> Tensor:
    above, bottom = max(top - 1, 0), min(top + rows, image.shape[2])
    return block(image[:, :, above:bottom + 1], slice(top - above, bottom - above))


def is_remaking() -> bool:
    """Return whether what :func:`remade` is given will be used."""
    return not is_captured() and torch.is_grad_enabled() and _lean.get()


def remade(x: Tensor, remake: Optional[Callable[[], Tensor]]) -> ContextManager:
    """Within, autograd keeps the function ``remake``, which returns ``x``, in the place of it."""
    if remake is None or not is_remaking():
        return nullcontext()
    place = x.data_ptr(), x.shape

    def pack(kept):
        return remake if (kept.data_ptr(), kept.shape) == place else kept

    def unpack(kept):
        return kept if isinstance(kept, Tensor) else kept()

    return saved_tensors_hooks(pack, unpack)


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Within, norms work as before, but do not enter the batch into their running statistics."""
    norms = [norm for norm in module.modules() if isinstance(norm, _NormBase) and norm.training]
    kept = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    for norm, buffers in zip(norms, kept):
        for name, buffer in buffers.items():
            setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)


def checkpointed(block: nn.Module, *args) -> Tensor:
    """Return block(*args), of which only ``args`` are kept for backward."""
    how = {} if _is_compiling() else dict(context_fn=partial(_contexts, block))
    return checkpoint(block, *args, use_reentrant=False, **how)


def _contexts(block: nn.Module):
    # The functions that remake would keep what they need, behind the back of checkpoint.
    return all_kept(), _recomputing(block)


@contextmanager
def _recomputing(block: nn.Module) -> Iterator[None]:
    with all_kept(), statistics_kept(block):
        yield


@contextmanager
def all_kept() -> Iterator[None]:
    """Within, nothing is remade: autograd keeps what the plain formulas make it keep."""
    token = _lean.set(False)
    try:
        yield
    finally:
        _lean.reset(token)
