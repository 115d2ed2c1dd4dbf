"""Self-attention with a relative bias for any grid of tokens.

Shapes: B batch, N = H * W tokens of a grid of H rows and W columns, C channels,
D channels of a head.

EfficientFormer adds to the attention scores a bias b[|dy|, |dx|] that depends
on the offset between query and key alone. It was trained on one grid: 7 x 7
tokens at 224 px. What is stored is the table of offsets, one value for each
(|dy|, |dx|) and head. For another grid the table is resampled, linearly and
with both ends kept: an offset of zero stays an offset of zero, the farthest
pair of tokens takes the value of the farthest pair trained on, and each axis
is stretched separately, so an oblong image keeps its aspect. No bias is read
outside the range that was trained, as it would be were the unit kept instead;
linear, because b is a function of |d|, which has a kink at zero that smoother
kernels ring around. On the grid of the table nothing is resampled.

The authors' detectors and segmentors compute it otherwise: they expand the table
over one grid and resize its N x N values like a picture. ``bias_mode='legacy'``
does the same, to evaluate their checkpoints.
"""
from collections import OrderedDict
from math import floor, log2
from typing import Any, Dict, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import cpu
from .layers import ConvNorm, Mlp, ScaledBlock, build_act, scale_output

Grid = Tuple[int, int]
BIAS_MODES = ('offset', 'legacy')

# A table expands to heads x N x N values, 35 MB a block at 800 x 1344 in fp32, so
# few grids are kept: one for landscape and one for portrait pictures.
CACHED_GRIDS = 2


def resample_table(table: Tensor, grid: Sequence[int]) -> Tensor:
    """Return a bias table (heads, rows, cols) for ``grid`` instead of (rows, cols)."""
    # Captured, the table's own grid is one of many: the program is for all of them.
    if not cpu.is_captured() and tuple(table.shape[1:]) == tuple(grid):
        return table
    # In float32, because some versions of torch cannot interpolate in half precision on a CPU.
    wide = table[None].to(torch.promote_types(table.dtype, torch.float32))
    resampled = F.interpolate(wide, size=tuple(grid), mode='bilinear', align_corners=True)[0]
    return resampled.to(table.dtype)


def expand_table(table: Tensor, stride: int = 1) -> Tensor:
    """Return the bias (heads, N / stride ** 2, N) of queries and keys on the table's own grid.

    Queries are at every ``stride``-th row and column of keys.
    """
    heads, rows, cols = table.shape
    y, x = (torch.arange(n, device=table.device) for n in (rows, cols))
    dy, dx = ((p[::stride, None] - p).abs() for p in (y, x))
    bias = table.index_select(1, dy.flatten()).index_select(2, dx.flatten())
    bias = bias.view(heads, *dy.shape, *dx.shape).transpose(2, 3)
    return bias.flatten(3).flatten(1, 2)


class AttentionBias(nn.Module):
    """A learnt bias over the offsets of a grid of tokens, for any other grid too.

    In eval mode the expanded bias of the last few grids is cached for the table that it was
    computed from, as that was then. A change through ``.data`` is not noticed: call ``eval()``
    after it.

    Args:
        heads: Attention heads.
        grid: Rows and columns of the grid of keys that the table is stored for.
            A table of another grid is resampled when it is loaded.
        stride: Queries are at every ``stride``-th row and column of keys.
        mode: One of ``BIAS_MODES``; 'legacy' stretches the expanded bias of
            ``grid`` bicubically, at every call, as the authors' code does.
    """

    def __init__(self, heads: int, grid: Grid, stride: int = 1, mode: str = 'offset'):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(heads, *grid))
        self.stride, self.mode = stride, mode
        self._expanded: OrderedDict[tuple, Tuple[Tensor, Tensor]] = OrderedDict()

    def forward(self, grid: Grid, dtype: torch.dtype) -> Tensor:
        """Return the bias (heads, queries, keys) for keys on ``grid`` in ``dtype``."""
        if self.mode == 'legacy':
            return self._stretch(grid).to(dtype)
        table = self.table
        if (self.training or torch.is_grad_enabled() or cpu.is_captured()
                or table.is_inference()):  # which has no version
            return self._expand(grid, dtype)
        # An entry keeps its table, so that no other tensor gets the same id.
        key = (*grid, dtype, id(table), table._version, table.data_ptr(), table.device)
        if key not in self._expanded:
            while len(self._expanded) >= CACHED_GRIDS:
                self._expanded.popitem(last=False)
            self._expanded[key] = table, self._expand(grid, dtype)
        self._expanded.move_to_end(key)
        return self._expanded[key][1]

    def _expand(self, grid: Grid, dtype: torch.dtype) -> Tensor:
        return expand_table(resample_table(self.table, grid).to(dtype), self.stride)

    def _stretch(self, grid: Grid) -> Tensor:
        bias = expand_table(self.table, self.stride)
        queries = [(n + self.stride - 1) // self.stride for n in grid]
        size = (queries[0] * queries[1], grid[0] * grid[1])
        if not cpu.is_captured() and tuple(bias.shape[1:]) == size:
            return bias
        wide = bias[None].to(torch.promote_types(bias.dtype, torch.float32))
        return F.interpolate(wide, size=size, mode='bicubic', align_corners=False)[0]

    def train(self, mode: bool = True) -> 'AttentionBias':
        self._expanded.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> 'AttentionBias':
        self._expanded.clear()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, '_expanded': OrderedDict()}

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        table = state_dict.get(prefix + 'table')
        if table is not None and table.dim() == 3 and len(table) == len(self.table):
            state_dict[prefix + 'table'] = resample_table(table, self.table.shape[1:])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        heads, rows, cols = self.table.shape
        return f'heads={heads}, grid=({rows}, {cols}), stride={self.stride}, mode={self.mode}'


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, fused: bool = False) -> Tensor:
    """Return softmax(q k / sqrt(D) + bias) v, (B, heads, queries, channels of a value).

    Args:
        q, k: (B, heads, queries or keys, D).
        v: (B, heads, keys, channels of a value, at least D).
        bias: (heads, queries, keys).
        fused: Never hold all scores, on a CPU and without gradients or compiled.
    """
    if fused and cpu.applies(q):
        return cpu.attend(q, k, v, bias)
    if not fused or q.device.type != 'cpu' or not cpu.is_compiling():
        # torch's CUDA kernel that never holds all scores takes a mask of four dimensions only.
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias[None] if q.is_cuda else bias)
    # torch's kernel that never holds all scores needs keys and values of one width.
    scale = q.shape[-1] ** -0.5
    q, k = (F.pad(each, (0, v.shape[-1] - each.shape[-1])) for each in (q, k))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], scale=scale)


class Attention(nn.Module):
    """Multi-head self-attention with offset bias on (B, N, C) (V1, eq. 6).

    The paper divides scores by sqrt(C); the authors' code, and this, by sqrt(key_dim).

    Args:
        channels: C.
        bias_grid: Rows and columns of the stored bias table.
        bias_mode: One of ``BIAS_MODES``.
        heads: Attention heads.
        key_dim: Channels of a query or key, per head.
        value_dim: Channels of a value, per head.
    """

    def __init__(self, channels: int, bias_grid: Grid, bias_mode: str = 'offset', heads: int = 8,
                 key_dim: int = 32, value_dim: int = 128):
        super().__init__()
        self.heads, self.split = heads, (key_dim, key_dim, value_dim)
        self.qkv = nn.Linear(channels, heads * sum(self.split))
        self.proj = nn.Linear(heads * value_dim, channels)
        self.bias = AttentionBias(heads, bias_grid, mode=bias_mode)
        self.fused = False

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        q, k, v = qkv.split(self.split, dim=-1)
        x = attend(q, k, v, self.bias(grid, qkv.dtype), self.fused)
        return self.proj(x.transpose(1, 2).flatten(2))

    def fuse(self) -> None:
        """Compute attention without holding all scores, on a CPU."""
        self.fused = True


class MB3D(ScaledBlock):
    """MetaBlock on tokens (B, N, C): attention, then an MLP (V1, eq. 5)."""

    branches = {'layer_scale1': 'token_mixer.proj', 'layer_scale2': 'mlp.project'}

    def __init__(self, channels: int, hidden: int, drop_path: float,
                 layer_scale_init_value: float, bias_grid: Grid, bias_mode: str, act_cfg: dict):
        super().__init__(channels, layer_scale_init_value, drop_path)
        self.norm1 = nn.LayerNorm(channels)
        self.token_mixer = Attention(channels, bias_grid, bias_mode)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, hidden, act_cfg)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = self.add(x, self.token_mixer(self.norm1(x), grid), self.layer_scale1)
        return self.add(x, self.mlp(self.norm2(x)), self.layer_scale2)


class StridedAttention(nn.Module):
    """V2's attention on (B, C, H, W): on every ``stride``-th row and column, then
    upsampled (V2, sections 3.3 and 3.4).

    Values gain a depthwise convolution of themselves, and scores are mixed among
    the heads before and after the softmax (talking heads).

    Args:
        bias_grid: Rows and columns of the stored bias table, on the strided grid.
        stride: 2 in the third stage, 1 in the fourth.
        Others: As in :class:`Attention`.
    """

    def __init__(self, channels: int, bias_grid: Grid, bias_mode: str, stride: int,
                 norm_cfg: dict, act_cfg: dict, heads: int = 8, key_dim: int = 32,
                 value_dim: int = 128):
        super().__init__()
        self.heads, self.scale, self.stride = heads, key_dim ** -0.5, stride
        keys, values = heads * key_dim, heads * value_dim
        cfg: Dict[str, Any] = dict(norm_cfg=norm_cfg)
        if stride > 1:
            self.stride_conv = ConvNorm(channels, channels, 3, stride, groups=channels, **cfg)
        self.q = ConvNorm(channels, keys, 1, **cfg)
        self.k = ConvNorm(channels, keys, 1, **cfg)
        self.v = ConvNorm(channels, values, 1, **cfg)
        self.v_local = ConvNorm(values, values, 3, groups=values, **cfg)
        self.talking_head1 = nn.Conv2d(heads, heads, 1)
        self.talking_head2 = nn.Conv2d(heads, heads, 1)
        self.act = build_act(act_cfg)
        self.proj = ConvNorm(values, channels, 1, **cfg)
        self.bias = AttentionBias(heads, bias_grid, mode=bias_mode)
        self.fused = False

    def forward(self, x: Tensor) -> Tensor:
        rows, cols = x.shape[2:]
        if self.stride > 1:
            x = self.stride_conv(x)
        q, k = (to_heads(conv(x), self.heads) for conv in (self.q, self.k))
        values = self.v(x)
        v, bias = to_heads(values, self.heads), self.bias(x.shape[2:], q.dtype)
        if self.fused:
            attended = attend_mixed(q, k, v, bias, self.talking_head1, self.talking_head2)
        else:
            # The product of unscaled queries can be more than float16 holds.
            scores = self.talking_head1(q * self.scale @ k.transpose(2, 3) + bias)
            attended = self.talking_head2(scores.softmax(-1)) @ v
        x = to_image(attended, values) + self.v_local(values)
        if self.stride > 1:
            # An odd grid is cut, not squeezed: every pixel stays where an even grid has it.
            x = subgrid(F.interpolate(x, scale_factor=self.stride, mode='bilinear'), rows, cols)
        return self.proj(self.act(x))

    @torch.no_grad()
    def fuse(self) -> None:
        """Mix the bias table instead of the bias of every pair of tokens.

        Exact on any grid, as resampling is linear and keeps a constant.
        """
        mixing = self.talking_head1
        if mixing.bias is None:  # fused already
            return
        table = torch.einsum('oh,hyx->oyx', mixing.weight[..., 0, 0], self.bias.table)
        self.bias.table.copy_(table + mixing.bias[:, None, None])
        scale = self.scale
        if isinstance(self.q.norm, nn.Identity):  # has been fused before
            # Most of it to the queries, as above; a power of two, which rounds nothing.
            most = 2. ** floor(log2(scale))
            scale_output(self.q.conv, torch.full_like(self.q.conv.weight[:, 0, 0, 0], most))
            scale /= most
        mixing.weight.mul_(scale)
        mixing.bias = None
        self.fused = True


def attend_mixed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, before: nn.Conv2d,
                 after: nn.Conv2d) -> Tensor:
    """Return after(softmax(before(q k) + bias)) v, (B, heads, queries, channels of a value).

    Args:
        q, k, v: (B, heads, queries or keys, channels).
        bias: (heads, queries, keys).
        before, after: 1 x 1 convolutions that mix the heads, ``before`` without a bias.
    """

    def attend_some(q: Tensor, keys: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = mix_heads(before, q @ keys, bias.flatten(1))
        assert after.bias is not None
        return mix_heads(after, scores.softmax(-1), after.bias[:, None]) @ v

    keys = k.transpose(2, 3)
    if cpu.applies(q):
        return cpu.by_queries(attend_some, q, keys, v, bias)
    return attend_some(q, keys, v, bias)


def mix_heads(mixing: nn.Conv2d, scores: Tensor, bias: Tensor) -> Tensor:
    """Return scores (B, heads, N, M) mixed among the heads, plus a bias (heads, N * M or 1)."""
    batch, dtype = scores.shape[0], scores.dtype
    weight = mixing.weight[..., 0, 0].to(dtype)
    if scores.is_cuda and cpu.is_compiling():  # one kernel with the softmax
        mixed = (weight[..., None, None] * scores[:, None]).sum(2)
        return mixed + bias.view(-1, *(scores.shape[2:] if bias.shape[1] > 1 else (1, 1)))
    mixed = torch.baddbmm(bias.to(dtype).expand(batch, -1, -1), weight.expand(batch, -1, -1),
                          scores.flatten(2))
    return mixed.view(scores.shape)


class AttentionDownsample(nn.Module):
    """V2's attention downsampling: (B, C_in, 2H, 2W) to (B, C_out, H, W) (V2, section 3.5).

    A strided convolution, to which attention is added whose queries are at every
    second row and column: the pixel there plus a depthwise convolution around it.

    Args:
        in_channels, out_channels: C_in and C_out.
        bias_grid: Rows and columns of the stored bias table, on the finer grid.
        Others: As in :class:`Attention`.
    """

    def __init__(self, in_channels: int, out_channels: int, bias_grid: Grid, bias_mode: str,
                 norm_cfg: dict, act_cfg: dict, heads: int = 8, key_dim: int = 16,
                 value_dim: int = 64):
        super().__init__()
        self.heads = heads
        keys, values = heads * key_dim, heads * value_dim
        cfg: Dict[str, Any] = dict(norm_cfg=norm_cfg)
        self.embed = ConvNorm(in_channels, out_channels, 3, 2, **cfg)
        self.q_local = nn.Conv2d(in_channels, in_channels, 3, 2, 1, groups=in_channels)
        self.q = ConvNorm(in_channels, keys, 1, **cfg)
        self.k = ConvNorm(in_channels, keys, 1, **cfg)
        self.v = ConvNorm(in_channels, values, 1, **cfg)
        self.v_local = ConvNorm(values, values, 3, 2, groups=values, **cfg)
        self.act = build_act(act_cfg)
        self.proj = ConvNorm(values, out_channels, 1, **cfg)
        self.bias = AttentionBias(heads, bias_grid, stride=2, mode=bias_mode)
        self.fused = False

    def forward(self, x: Tensor) -> Tensor:
        values = self.v(x)
        local = self.v_local(values)
        q = to_heads(self.q(self.q_local(x) + subgrid(x, x.shape[2], x.shape[3], 2)), self.heads)
        k, v = (to_heads(each, self.heads) for each in (self.k(x), values))
        attended = attend(q, k, v, self.bias(x.shape[2:], q.dtype), self.fused)
        return self.embed(x) + self.proj(self.act(to_image(attended, local) + local))

    def fuse(self) -> None:
        """Compute attention without holding all scores, on a CPU."""
        self.fused = True


def subgrid(x: Tensor, rows: int, cols: int, stride: int = 1) -> Tensor:
    """Return (B, C, H, W) at every ``stride``-th of the first ``rows`` and ``cols``."""
    if not cpu.is_compiling():
        return x[..., :rows:stride, :cols:stride]
    # torch.export cannot prove what it wants to know of a slice with dynamic ends.
    y, x_ = (torch.arange(0, n, stride, device=x.device) for n in (rows, cols))
    return x.index_select(2, y).index_select(3, x_)


def to_heads(x: Tensor, heads: int) -> Tensor:
    """Return (B, heads * D, H, W) as (B, heads, N, D), a view."""
    # Views, as the exporter to ONNX takes the sizes that unflatten leaves for fixed.
    return x.flatten(2).view(x.shape[0], heads, x.shape[1] // heads, -1).transpose(2, 3)


def to_image(x: Tensor, like: Tensor) -> Tensor:
    """Return (B, heads, N, D) as (B, heads * D, H, W), sized and laid out as ``like``."""
    if like.is_contiguous():
        return x.transpose(2, 3).reshape(like.shape)
    return x.transpose(1, 2).flatten(2).view(x.shape[0], *like.shape[2:], -1).permute(0, 3, 1, 2)
