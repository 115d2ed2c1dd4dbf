"""Layers of EfficientFormer's stages.

Shapes: B batch, C channels, H rows, W columns, N = H * W tokens.
"""
from typing import Any, Callable, Dict, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import StochasticDepth

from . import cpu, gpu
from .arch import is_number


class GroupNorm(nn.GroupNorm):
    """torch's GroupNorm, which also works after frozen layers.

    In channels_last on a CPU, torch's backward writes the gradient of an input that needs none to
    memory that does not exist, and the process ends (torch 2.1 and 2.12).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad or not self.affine or not torch.is_grad_enabled():
            return super().forward(x)
        normed = F.group_norm(x, self.num_groups, eps=self.eps)
        weight, bias = (p[:, None, None].to(normed.dtype) for p in (self.weight, self.bias))
        return normed * weight + bias


def build_norm(cfg: dict, channels: int, name: str = 'norm_cfg') -> nn.Module:
    """Return the norm of an OpenMMLab ``norm_cfg`` for (B, channels, H, W).

    Args:
        cfg: As mmcv's ``build_norm_layer`` takes it.
        channels: Channels of the map.
        name: The name of ``cfg`` in errors.

    Raises:
        ValueError: The norm cannot be built. A norm that does not suit a map raises torch's
            error when it runs.
    """
    from mmcv.cnn import build_norm_layer  # slow to import
    norm = _build(lambda cfg: build_norm_layer(cfg, channels)[1], cfg, name)
    if type(norm) is nn.GroupNorm:
        norm.__class__ = GroupNorm
    return norm


def build_act(cfg: dict, name: str = 'act_cfg') -> nn.Module:
    """Return the activation of an OpenMMLab ``act_cfg``.

    Args:
        cfg: As mmcv's ``build_activation_layer`` takes it.
        name: The name of ``cfg`` in errors.

    Raises:
        ValueError: The activation cannot be built.
    """
    from mmcv.cnn import build_activation_layer  # slow to import
    return _build(build_activation_layer, cfg, name)


def _build(build: Callable[[dict], Any], cfg: dict, name: str) -> nn.Module:
    try:
        module = build(cfg)
        if not isinstance(module, nn.Module):
            raise TypeError(f'type {cfg["type"]!r} is not a layer')
        return module
    except Exception as error:  # mmcv and the layers raise many kinds
        raise ValueError(f'{name}={cfg!r} cannot be built: {type(error).__name__}: {error}. '
                         "Expected a dict with the type of one of mmcv's layers, such as "
                         "dict(type='BN') or dict(type='GELU')") from error


class ConvNorm(nn.Module):
    """Convolution that keeps H and W at stride 1 and halves them (rounded up)
    at stride 2, a norm, and an activation where ``act_cfg`` names one."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1,
                 groups: int = 1, *, norm_cfg: dict, act_cfg: Optional[dict] = None):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2,
                              groups=groups)
        self.norm = build_norm(norm_cfg, out_channels)
        self.act = nn.Identity() if act_cfg is None else build_act(act_cfg)
        self.post_op: Optional[str] = None

    def forward(self, x: Tensor) -> Tensor:
        if self.post_op and cpu.fuses_activation(x):
            return cpu.convolve(self.conv, x, self.post_op)
        if isinstance(self.norm, nn.Identity) and gpu.multiplies(self.conv, x):
            return self.act(gpu.convolve(self.conv, x))
        return self.act(self.norm(self.conv(x)))

    def fuse(self) -> None:
        """Fold a BatchNorm into the convolution; another norm stays.

        Without a norm in between, CPUs compute the activation within the convolution.
        """
        norm = self.norm
        if (isinstance(norm, _BatchNorm) and norm.running_mean is not None
                and norm.running_var is not None):
            scale = (norm.running_var.double() + norm.eps).rsqrt()
            scale = scale if norm.weight is None else scale * norm.weight
            shift = -norm.running_mean * scale
            scale_output(self.conv, scale, shift if norm.bias is None else shift + norm.bias)
            self.norm = nn.Identity()
        if isinstance(self.norm, nn.Identity):
            self.post_op = cpu.POST_OPS.get(repr(self.act))


@torch.no_grad()
def scale_output(layer: Union[nn.Conv2d, nn.Linear], scale: Tensor,
                 shift: Optional[Tensor] = None) -> None:
    """Change a layer that has a bias to return ``scale * layer(x) + shift`` per channel."""
    assert layer.bias is not None
    dtype = layer.weight.dtype
    weight = layer.weight.double() * scale.double().view(-1, *[1] * (layer.weight.dim() - 1))
    bias = layer.bias.double() * scale.double()
    layer.weight.copy_(weight.to(dtype))
    layer.bias.copy_((bias if shift is None else bias + shift.double()).to(dtype))


class Stem(nn.Sequential):
    """Two 3 x 3 convolutions of stride 2: (B, 3, H, W) to (B, C, H / 4, W / 4).

    Raises:
        ValueError: The input is of another dtype than the weights, and no autocast is on.
    """

    def __init__(self, in_channels: int, out_channels: int, norm_cfg: dict, act_cfg: dict):
        cfg: Dict[str, Any] = dict(norm_cfg=norm_cfg, act_cfg=act_cfg)
        super().__init__(ConvNorm(in_channels, out_channels // 2, 3, 2, **cfg),
                         ConvNorm(out_channels // 2, out_channels, 3, 2, **cfg))

    def forward(self, x: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        if x.dtype != dtype and not cpu.is_captured() and (x.dtype == torch.float64 or not (
                cpu.is_autocast() or torch.is_autocast_enabled())):
            raise ValueError(f'input of dtype {x.dtype}: expected that of the weights, {dtype}; '
                             'convert one of them, or use autocast')
        return super().forward(x)


class PoolMixer(nn.Module):
    """3 x 3 average pooling minus identity; borders average real pixels only (V1, eq. 4)."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad or not torch.is_grad_enabled() or cpu.is_captured():
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x
        return _AveragePool.apply(x) - x


class _AveragePool(torch.autograd.Function):
    """The average over the 3 x 3 around each pixel, with a pooling as its backward.

    The gradient of a pixel is the sum over the same 3 x 3 of gradients, each divided by the number
    of pixels averaged there. torch scatters instead, which is many times slower, and keeps x.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing: torch.func wants this method."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        ones = grad.new_ones(1, 1, *grad.shape[2:])
        share = F.avg_pool2d(ones, 3, 1, 1)  # of 9, the pixels that were averaged
        return F.avg_pool2d(grad / share, 3, 1, 1)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return F.avg_pool2d(tangent, 3, 1, 1, count_include_pad=False)


class ConvMlp(nn.Sequential):
    """1 x 1 convolutions to ``hidden`` channels and back, each with its norm.

    ``local`` puts a depthwise 3 x 3 between them: V2's unified FFN (V2, section 3.1).
    """

    def __init__(self, channels: int, hidden: int, norm_cfg: dict, act_cfg: dict,
                 local: bool = False):
        super().__init__()
        self.expand = ConvNorm(channels, hidden, 1, norm_cfg=norm_cfg, act_cfg=act_cfg)
        if local:
            self.mid = ConvNorm(hidden, hidden, 3, groups=hidden, norm_cfg=norm_cfg,
                                act_cfg=act_cfg)
        self.project = ConvNorm(hidden, channels, 1, norm_cfg=norm_cfg)

    def forward(self, x: Tensor, rows: Optional[slice] = None) -> Tensor:
        """Return (B, C, H, W), or only ``rows`` of it, whose neighbours x then has too."""
        x = self.expand(x)
        if hasattr(self, 'mid'):
            x = self.mid(x)[:, :, rows] if rows else self.mid(x)
        return self.project(x)


class Mlp(nn.Sequential):
    """Linear layers to ``hidden`` channels and back, on (B, N, C)."""

    def __init__(self, channels: int, hidden: int, act_cfg: dict):
        super().__init__()
        self.expand = nn.Linear(channels, hidden)
        self.act = build_act(act_cfg)
        self.project = nn.Linear(hidden, channels)


class ScaledBlock(nn.Module):
    """A block of residual branches with layer scale and stochastic depth.

    ``branches`` pairs the name of each scale with the last layer of its branch. A block is
    ``local`` if a pixel of its output depends on the 3 x 3 around it only.
    """

    branches: Dict[str, str] = {}
    local = False
    layer_scale1: Optional[Tensor]
    layer_scale2: Optional[Tensor]

    def __init__(self, channels: int, init_value: float, drop_path: float):
        super().__init__()
        if not is_number(init_value):
            raise ValueError(f'layer_scale_init_value={init_value!r}: expected a number, '
                             'usually 1e-5')
        for scale in self.branches:
            setattr(self, scale, nn.Parameter(torch.full((channels,), float(init_value))))
        self.drop_path = StochasticDepth(drop_path, 'row')

    def add(self, x: Tensor, branch: Tensor, scale: Optional[Tensor]) -> Tensor:
        """Return x plus the scaled branch, (B, C, H, W) or (B, N, C); training may drop it."""
        if scale is None:
            return x + self.drop_path(branch)
        scale = scale[:, None, None] if x.dim() == 4 else scale[None]
        if self.training and self.drop_path.p:
            scale = self.drop_path(scale.expand(x.shape[0], *scale.shape))
        # Not every export format knows addcmul.
        return x + branch * scale if torch.jit.is_tracing() else torch.addcmul(x, branch, scale)

    def fuse(self) -> None:
        """Fold each scale into the layer before it, where no norm is between the two."""
        for name, path in self.branches.items():
            layer, scale = self.get_submodule(path), getattr(self, name)
            if isinstance(layer, ConvNorm) and isinstance(layer.norm, nn.Identity):
                layer = layer.conv
            if scale is not None and isinstance(layer, (nn.Conv2d, nn.Linear)):
                scale_output(layer, scale)
                setattr(self, name, None)


class MB4D(ScaledBlock):
    """MetaBlock on (B, C, H, W): pooling mixer, then a convolutional MLP (V1, eq. 4)."""

    branches = {'layer_scale2': 'mlp.project'}
    local = True

    def __init__(self, channels: int, hidden: int, drop_path: float,
                 layer_scale_init_value: float, norm_cfg: dict, act_cfg: dict):
        super().__init__(channels, layer_scale_init_value, drop_path)
        self.layer_scale1 = nn.Parameter(torch.full((channels,), float(layer_scale_init_value)))
        self.token_mixer = PoolMixer()
        self.mlp = ConvMlp(channels, hidden, norm_cfg, act_cfg)

    def forward(self, x: Tensor, rows: Optional[slice] = None) -> Tensor:
        """Return (B, C, H, W), or only ``rows`` of it."""
        scale, is_fused = self.layer_scale1, self.layer_scale2 is None
        if scale is not None and is_fused and gpu.takes_pool_block(self.mlp, x):
            return gpu.pool_block(self.mlp, x, scale)
        x = self.add(x, self.token_mixer(x), self.layer_scale1)
        x = x[:, :, rows] if rows else x
        return self.add(x, self.mlp(x), self.layer_scale2)
