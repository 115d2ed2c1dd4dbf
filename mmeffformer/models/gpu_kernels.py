"""Kernels in Triton, which torch brings along where it computes on GPUs."""
from typing import Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # values per program


@triton.jit
def _pool_and_shift(  # type: ignore[no-untyped-def]
        x, y, shifted, scale, shift, rows, columns, channels, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    channel, pixel = at % channels, at // channels
    column, row = pixel % columns, (pixel // columns) % rows
    total = tl.zeros((BLOCK,), tl.float32)
    for dy in tl.static_range(-1, 2):
        for dx in tl.static_range(-1, 2):
            real = inside & (row + dy >= 0) & (row + dy < rows) & (
                column + dx >= 0) & (column + dx < columns)
            total += tl.load(x + at + (dy * columns + dx) * channels, real, 0.).to(tl.float32)
    in_column = tl.minimum(row, 1) + 1 + tl.minimum(rows - 1 - row, 1)
    in_row = tl.minimum(column, 1) + 1 + tl.minimum(columns - 1 - column, 1)
    centre = tl.load(x + at, inside, 0.).to(tl.float32)
    factor = tl.load(scale + channel, inside, 0.).to(tl.float32)
    mixed = centre + factor * (total / (in_column * in_row) - centre)
    tl.store(y + at, mixed, inside)
    tl.store(shifted + at, mixed + tl.load(shift + channel, inside, 0.).to(tl.float32), inside)


def pool_and_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tuple[Tensor, Tensor]:
    """Return y = x + scale * (average of the real pixels in the 3 x 3 - x), and y + shift.

    Args:
        x: (B, H, W, C), contiguous, with fewer than 2 ** 31 values.
        scale, shift: (C,).
    """
    y, shifted = torch.empty_like(x), torch.empty_like(x)
    _, rows, columns, channels = x.shape
    _pool_and_shift[(triton.cdiv(x.numel(), BLOCK),)](
        x, y, shifted, scale, shift, rows, columns, channels, x.numel(), BLOCK=BLOCK)
    return y, shifted
