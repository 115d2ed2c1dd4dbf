"""Self-attention whose relative bias fits any grid of tokens.

Shapes: B batch, N = H * W tokens of a grid of H rows and W columns, C channels.

EfficientFormer adds to the attention scores a bias b[|dy|, |dx|] that depends
on the offset between query and key alone. It was trained on one grid: 7 x 7
tokens at 224 px. What is stored is the table of offsets, one value for each
(|dy|, |dx|) and head. For another grid the table is resampled, linearly and
with both ends kept: an offset of zero stays an offset of zero, the farthest
pair of tokens takes the value of the farthest pair trained on, and each axis
is stretched by itself, so an oblong image keeps its aspect. No bias is read
outside the range that was trained, as it would be were the unit kept instead;
linear, because b is a function of |d|, which has a kink at zero that smoother
kernels ring around. On the grid of the table nothing is resampled.
"""
from collections import OrderedDict
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from .layers import Mlp

Grid = Tuple[int, int]

# A table expands to heads x N x N values, 35 MB a block at 800 x 1344 in fp32, so
# few grids are kept: one for landscape and one for portrait pictures.
CACHED_GRIDS = 2

# torch 2.1 has it under the second name only.
_is_compiling = getattr(torch.compiler, 'is_compiling', None) or torch._dynamo.is_compiling


def resample_table(table: Tensor, grid: Grid) -> Tensor:
    """Return a bias table (heads, rows, cols) for ``grid`` instead of (rows, cols)."""
    if tuple(table.shape[1:]) == tuple(grid):
        return table
    # In float32, because some versions of torch cannot interpolate in half precision on a CPU.
    wide = table[None].to(torch.promote_types(table.dtype, torch.float32))
    resampled = F.interpolate(wide, size=tuple(grid), mode='bilinear', align_corners=True)[0]
    return resampled.to(table.dtype)


def expand_table(table: Tensor) -> Tensor:
    """Return the bias (heads, N, N) of all token pairs of the table's own grid."""
    heads, rows, cols = table.shape
    y, x = (torch.arange(n, device=table.device) for n in (rows, cols))
    dy, dx = ((p[:, None] - p).abs().flatten() for p in (y, x))
    bias = table.index_select(1, dy).index_select(2, dx)
    bias = bias.view(heads, rows, rows, cols, cols).transpose(2, 3)
    return bias.reshape(heads, rows * cols, rows * cols)


class AttentionBias(nn.Module):
    """A learnt bias over the offsets of a grid of tokens, for any other grid too.

    In eval the expanded bias of the last few grids is kept. It is forgotten when
    weights are loaded, moved or changed in place, and whenever the mode is set, as
    after a change through ``.data``, which cannot be seen.

    Args:
        heads: Attention heads.
        grid: Rows and columns of the grid that the table is stored for.
            A table of another grid is resampled when it is loaded.
    """

    def __init__(self, heads: int, grid: Grid):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(heads, *grid))
        self._expanded = OrderedDict()

    def forward(self, grid: Grid, dtype: torch.dtype) -> Tensor:
        """Return the bias (heads, N, N) for ``grid`` in ``dtype``."""
        if (self.training or torch.is_grad_enabled() or torch.jit.is_tracing()
                or _is_compiling()):
            return self._expand(grid, dtype)
        version = None if self.table.is_inference() else self.table._version
        key = (tuple(grid), dtype, version)
        if key not in self._expanded:
            while len(self._expanded) >= CACHED_GRIDS:
                self._expanded.popitem(last=False)
            self._expanded[key] = self._expand(grid, dtype)
        self._expanded.move_to_end(key)
        return self._expanded[key]

    def _expand(self, grid: Grid, dtype: torch.dtype) -> Tensor:
        return expand_table(resample_table(self.table, grid).to(dtype))

    def train(self, mode: bool = True) -> 'AttentionBias':
        self._expanded.clear()
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self._expanded.clear()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        self._expanded.clear()
        table = state_dict.get(prefix + 'table')
        if table is not None and table.dim() == 3 and len(table) == len(self.table):
            state_dict[prefix + 'table'] = resample_table(table, self.table.shape[1:])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        heads, rows, cols = self.table.shape
        return f'heads={heads}, grid=({rows}, {cols})'


class Attention(nn.Module):
    """Multi-head self-attention with offset bias on (B, N, C) (paper, eq. 5).

    Args:
        channels: C.
        bias_grid: Rows and columns of the stored bias table.
        heads: Attention heads.
        key_dim: Channels of a query or key, per head.
        value_dim: Channels of a value, per head.
    """

    def __init__(self, channels: int, bias_grid: Grid, heads: int = 8, key_dim: int = 32,
                 value_dim: int = 128):
        super().__init__()
        self.heads, self.split = heads, (key_dim, key_dim, value_dim)
        self.qkv = nn.Linear(channels, heads * sum(self.split))
        self.proj = nn.Linear(heads * value_dim, channels)
        self.bias = AttentionBias(heads, bias_grid)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        q, k, v = qkv.split(self.split, dim=-1)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(grid, q.dtype))
        return self.proj(x.transpose(1, 2).flatten(2))


class MB3D(nn.Module):
    """MetaBlock on tokens (B, N, C): attention, then an MLP (paper, eq. 4)."""

    def __init__(self, channels: int, expansion: float, drop_path: float,
                 layer_scale_init_value: float, bias_grid: Grid, act_cfg: dict):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.token_mixer = Attention(channels, bias_grid)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, round(channels * expansion), act_cfg)
        self.layer_scale1 = nn.Parameter(torch.full((channels,), float(layer_scale_init_value)))
        self.layer_scale2 = nn.Parameter(torch.full((channels,), float(layer_scale_init_value)))
        self.drop_path = StochasticDepth(drop_path, 'row')

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop_path(self.layer_scale1 * self.token_mixer(self.norm1(x), grid))
        return x + self.drop_path(self.layer_scale2 * self.mlp(self.norm2(x)))
