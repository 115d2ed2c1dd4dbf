"""Parts that EfficientFormer's stages are made of.

Shapes: B batch, C channels, H rows, W columns, N = H * W tokens.
"""
from typing import Optional

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

_NORMS = {'BN': nn.BatchNorm2d, 'BN2d': nn.BatchNorm2d, 'SyncBN': nn.SyncBatchNorm,
          'GN': nn.GroupNorm, 'IN': nn.InstanceNorm2d}


def build_norm(cfg: dict, channels: int) -> nn.Module:
    """Return the norm of an OpenMMLab ``norm_cfg`` for (B, channels, H, W).

    The usual names work without mmcv; any other is looked up in the registry.
    """
    cfg = dict(cfg)
    name, requires_grad = cfg.pop('type'), cfg.pop('requires_grad', True)
    cls = _NORMS.get(name) if isinstance(name, str) else name
    cls = cls or MODELS.get(name)
    if cls is None:
        raise ValueError(f'norm_cfg type {name!r} is unknown; choose from '
                         f'{", ".join(_NORMS)} or a norm registered in mmengine\'s MODELS')
    if issubclass(cls, nn.GroupNorm):
        cfg = dict(cfg, num_channels=channels)
        norm = cls(**cfg)
    else:
        norm = cls(channels, **cfg)
    return norm.requires_grad_(requires_grad)


def build_act(cfg: dict) -> nn.Module:
    """Return the activation of an OpenMMLab ``act_cfg``: torch.nn's or a registered one."""
    cfg = dict(cfg)
    name = cfg.pop('type')
    cls = (getattr(nn, name, None) if isinstance(name, str) else name) or MODELS.get(name)
    if cls is None:
        raise ValueError(f'act_cfg type {name!r} is unknown; use a class name of torch.nn, '
                         'such as GELU or ReLU')
    return cls(**cfg)


class ConvNorm(nn.Module):
    """Convolution that keeps H and W at stride 1 and halves them (rounded up)
    at stride 2, a norm, and an activation where ``act_cfg`` names one."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1,
                 groups: int = 1, *, norm_cfg: dict, act_cfg: Optional[dict] = None):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2,
                              groups=groups)
        self.norm = build_norm(norm_cfg, out_channels)
        self.act = build_act(act_cfg) if act_cfg else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Stem(nn.Sequential):
    """Two 3 x 3 convolutions of stride 2: (B, 3, H, W) to (B, C, H / 4, W / 4)."""

    def __init__(self, in_channels: int, out_channels: int, norm_cfg: dict, act_cfg: dict):
        cfg = dict(norm_cfg=norm_cfg, act_cfg=act_cfg)
        super().__init__(ConvNorm(in_channels, out_channels // 2, 3, 2, **cfg),
                         ConvNorm(out_channels // 2, out_channels, 3, 2, **cfg))


class PoolMixer(nn.Module):
    """3 x 3 average pooling minus identity; borders average real pixels only."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x


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


class Mlp(nn.Sequential):
    """Linear layers to ``hidden`` channels and back, on (B, N, C)."""

    def __init__(self, channels: int, hidden: int, act_cfg: dict):
        super().__init__()
        self.expand = nn.Linear(channels, hidden)
        self.act = build_act(act_cfg)
        self.project = nn.Linear(hidden, channels)


def layer_scale(channels: int, init_value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((channels,), float(init_value)))


class MB4D(nn.Module):
    """MetaBlock on (B, C, H, W): pooling mixer, then a convolutional MLP (paper, eq. 3)."""

    def __init__(self, channels: int, hidden: int, drop_path: float,
                 layer_scale_init_value: float, norm_cfg: dict, act_cfg: dict):
        super().__init__()
        self.token_mixer = PoolMixer()
        self.mlp = ConvMlp(channels, hidden, norm_cfg, act_cfg)
        self.layer_scale1 = layer_scale(channels, layer_scale_init_value)
        self.layer_scale2 = layer_scale(channels, layer_scale_init_value)
        self.drop_path = StochasticDepth(drop_path, 'row')

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.layer_scale1[:, None, None] * self.token_mixer(x))
        return x + self.drop_path(self.layer_scale2[:, None, None] * self.mlp(x))
