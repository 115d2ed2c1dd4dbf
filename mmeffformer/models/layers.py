"""Parts that EfficientFormer's stages are made of.

Shapes: B batch, C channels, H rows, W columns, N = H * W tokens.
"""
from functools import lru_cache
from typing import Callable, Dict, Mapping, Optional, Tuple, Type, Union

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import StochasticDepth

from .arch import is_number
from .memory import is_autocast, is_captured, is_remaking, remade, statistics_kept


class GroupNorm(nn.GroupNorm):
    """torch's, that can stand behind layers which are not trained, as frozen stages.

    torch's own backward, in channels_last on a CPU, would write the gradient of an input that
    needs none, to memory that is not there, and end the process (so do 2.1 and 2.12).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad or not self.affine or not torch.is_grad_enabled():
            return super().forward(x)
        normed = F.group_norm(x, self.num_groups, eps=self.eps)
        weight, bias = (p[:, None, None].to(normed.dtype) for p in (self.weight, self.bias))
        return normed * weight + bias


_NORMS = {'BN': nn.BatchNorm2d, 'BN2d': nn.BatchNorm2d, 'SyncBN': nn.SyncBatchNorm,
          'GN': GroupNorm, 'IN': nn.InstanceNorm2d}


def build_norm(cfg: dict, channels: int, what: str = 'norm_cfg') -> nn.Module:
    """Return the norm of an OpenMMLab ``norm_cfg`` for (B, channels, H, W).

    The usual names work without mmcv; any other is looked up in the registry.

    Args:
        what: What errors call ``cfg``.

    Raises:
        ValueError: ``cfg`` names no norm of images of so many channels.
    """
    cls = _find(cfg, what, 'BN', _NORMS, f'{", ".join(_NORMS)} or a norm')
    options = {key: value for key, value in cfg.items() if key not in ('type', 'requires_grad')}

    def made():
        if issubclass(cls, nn.GroupNorm):
            return cls(**dict(options, num_channels=channels))
        return cls(channels, **options)

    norm = _tried(made, (1, channels, 2, 2), f'{what}={cfg!r}')
    return norm.requires_grad_(cfg.get('requires_grad', True))


def build_act(cfg: dict, what: str = 'act_cfg') -> nn.Module:
    """Return the activation of an OpenMMLab ``act_cfg``: torch.nn's or a registered one.

    Raises:
        ValueError: ``cfg`` names no activation of maps and tokens of any size.
    """
    cls = _find(cfg, what, 'GELU', vars(nn), 'torch.nn\'s, such as GELU or ReLU, or one')
    options = {key: value for key, value in cfg.items() if key != 'type'}
    return _tried(lambda: cls(**options), (1, 7, 5, 3), f'{what}={cfg!r}')


def _find(cfg: dict, what: str, usual: str, known: Mapping[str, Type], choices: str) -> Type:
    if not isinstance(cfg, Mapping) or 'type' not in cfg:
        raise ValueError(f'{what}={cfg!r}: expected a dict with a type, '
                         f'such as dict(type={usual!r})')
    name = cfg['type']
    try:
        cls = (known.get(name) or MODELS.get(name)) if isinstance(name, str) else name
    except RuntimeError:  # of the registry
        cls = None
    if not isinstance(cls, type):
        raise ValueError(f'{what} type {name!r} is unknown, in {dict(cfg)!r}; choose from '
                         f'{choices} registered in mmengine\'s MODELS')
    return cls


def _tried(made: Callable[[], nn.Module], shape: Tuple[int, ...], said: str) -> nn.Module:
    """Return ``made()`` once it has given a map of ``shape`` for a map of ``shape``."""
    try:
        module = made()
        if any(value.is_meta for value in (*module.parameters(), *module.buffers())):
            return module  # of a network that is only looked at
        shape_out = module.eval()(torch.zeros(shape)).shape
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f'{said}: {type(error).__name__}: {error}; expected what keeps the shape '
                         f'of a map such as {shape}') from error
    if shape_out != shape:
        raise ValueError(f'{said}: a map of {shape} becomes one of {tuple(shape_out)}; expected '
                         'what keeps its shape')
    return module.train()


# Activations that oneDNN computes as part of a convolution, and its names for them.
POST_OPS = {repr(nn.ReLU()): 'relu', repr(nn.GELU()): 'gelu', repr(nn.SiLU()): 'swish'}


# Norms that can be computed again in backward. Others may wait for other processes then.
REMAKABLE = (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d, nn.Identity)


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
        if (self.post_op and x.device.type == 'cpu' and x.dtype == torch.float32
                and not torch.is_grad_enabled() and not is_captured() and not is_autocast()):
            conv = self.conv
            return torch.ops.mkldnn._convolution_pointwise(
                x, conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups,
                self.post_op, [], 'none')
        return self.act(self.norm(self.conv(x)))

    def remakable(self, x: Tensor) -> Tuple[Tensor, Optional[Callable[[], Tensor]]]:
        """Return norm and activation of the convolution's output x, and how to make them again,
        which needs no more than x where norm and activation allow it (:func:`remade`)."""
        normed, remake = self.norm(x), None
        if isinstance(self.act, nn.RReLU) or getattr(self.act, 'inplace', False):
            return self.act(normed), None  # random, or written over what it is made of
        if isinstance(self.norm, REMAKABLE):
            remake = lru_cache(lambda: self._norm_again(x))
        with remade(normed, remake):
            out = self.act(normed)
        if remake is None:
            return out, lambda: self.act(normed)
        return out, lambda: self.act(remake())  # which does not hold ``normed``

    def _norm_again(self, x: Tensor) -> Tensor:
        with statistics_kept(self.norm):
            return self.norm(x)

    def fuse(self):
        """Fold a BatchNorm into the convolution; another norm stays.

        The activation can then be computed on the convolution's way out, while its output
        is still in the cache, by the operator that torch.compile uses for it.
        """
        norm = self.norm
        if isinstance(norm, _BatchNorm) and norm.running_var is not None:
            scale = (norm.running_var.double() + norm.eps).rsqrt()
            scale = scale if norm.weight is None else scale * norm.weight
            shift = -norm.running_mean * scale
            scale_output(self.conv, scale, shift if norm.bias is None else shift + norm.bias)
            self.norm = nn.Identity()
        if isinstance(self.norm, nn.Identity) and torch.backends.mkldnn.is_available():
            self.post_op = POST_OPS.get(repr(self.act))


@torch.no_grad()
def scale_output(layer: Union[nn.Conv2d, nn.Linear], scale: Tensor,
                 shift: Optional[Tensor] = None):
    """Make ``layer``, which has a bias, give ``scale * layer(x) + shift`` for each channel."""
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
        cfg = dict(norm_cfg=norm_cfg, act_cfg=act_cfg)
        super().__init__(ConvNorm(in_channels, out_channels // 2, 3, 2, **cfg),
                         ConvNorm(out_channels // 2, out_channels, 3, 2, **cfg))

    def forward(self, x: Tensor) -> Tensor:
        # Here, as a sharded model has weights of the dtype it computes in only now.
        dtype = self[0].conv.weight.dtype
        if x.dtype != dtype and not is_captured() and (x.dtype == torch.float64 or not (
                is_autocast() or torch.is_autocast_enabled())):
            raise ValueError(f'input of dtype {x.dtype}: expected that of the weights, {dtype}; '
                             'convert one of them, or use autocast')
        return super().forward(x)


class PoolMixer(nn.Module):
    """3 x 3 average pooling minus identity; borders average real pixels only."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_remaking() or not x.requires_grad:
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x
        return _AveragePool.apply(x) - x


class _AveragePool(torch.autograd.Function):
    """The average over the 3 x 3 around each pixel, with a backward that is a pooling too.

    A pixel's gradient is the sum over the same 3 x 3 of gradients, each divided by how many
    pixels were averaged there. torch scatters instead, which is many times slower, and keeps x.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        ones = grad.new_ones(1, 1, *grad.shape[2:])
        share = F.avg_pool2d(ones, 3, 1, 1)  # of 9, the pixels that were averaged
        return F.avg_pool2d(grad / share, 3, 1, 1)


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
        """Return (B, C, H, W), or only these rows of it, of which x then has the neighbours."""
        remake = None
        for layer in self:
            if is_remaking():
                with remade(x, remake):
                    x = layer.conv(x)
                x, remake = layer.remakable(x)
            else:
                x = layer(x)
            if rows and layer.conv.kernel_size != (1, 1):
                x = x[:, :, rows]
        return x


class Mlp(nn.Sequential):
    """Linear layers to ``hidden`` channels and back, on (B, N, C)."""

    def __init__(self, channels: int, hidden: int, act_cfg: dict):
        super().__init__()
        self.expand = nn.Linear(channels, hidden)
        self.act = build_act(act_cfg)
        self.project = nn.Linear(hidden, channels)


class ScaledBlock(nn.Module):
    """A block of residual branches, each times its layer scale and dropped by chance.

    ``branches`` pairs the name of each scale with the last layer of its branch; ``local``
    says that the block looks no farther than the 3 x 3 around each pixel.
    """

    branches: Dict[str, str] = {}
    local = False

    def __init__(self, channels: int, init_value: float, drop_path: float):
        super().__init__()
        if not is_number(init_value):
            raise ValueError(f'layer_scale_init_value={init_value!r}: expected a number, '
                             'usually 1e-5')
        for scale in self.branches:
            setattr(self, scale, nn.Parameter(torch.full((channels,), float(init_value))))
        self.drop_path = StochasticDepth(drop_path, 'row')

    def add(self, x: Tensor, branch: Tensor, scale: Optional[Tensor]) -> Tensor:
        """Return x + branch, (B, C, H, W) or (B, N, C), the branch scaled and maybe dropped."""
        if scale is None:
            return x + self.drop_path(branch)
        scale = scale[:, None, None] if x.dim() == 4 else scale[None]
        if self.training and self.drop_path.p:
            scale = self.drop_path(scale.expand(len(x), *scale.shape))
        # What is exported has operators that every format knows.
        return x + branch * scale if torch.jit.is_tracing() else torch.addcmul(x, branch, scale)

    def fuse(self):
        """Fold each scale into the layer before it, where no norm is between the two."""
        for name, path in self.branches.items():
            layer = self.get_submodule(path) if getattr(self, name) is not None else None
            if isinstance(layer, ConvNorm):
                layer = layer.conv if isinstance(layer.norm, nn.Identity) else None
            if layer is not None:
                scale_output(layer, getattr(self, name))
                setattr(self, name, None)


class MB4D(ScaledBlock):
    """MetaBlock on (B, C, H, W): pooling mixer, then a convolutional MLP (paper, eq. 3)."""

    branches = {'layer_scale2': 'mlp.project'}
    local = True

    def __init__(self, channels: int, hidden: int, drop_path: float,
                 layer_scale_init_value: float, norm_cfg: dict, act_cfg: dict):
        super().__init__(channels, layer_scale_init_value, drop_path)
        self.layer_scale1 = nn.Parameter(torch.full((channels,), float(layer_scale_init_value)))
        self.token_mixer = PoolMixer()
        self.mlp = ConvMlp(channels, hidden, norm_cfg, act_cfg)

    def forward(self, x: Tensor, rows: Optional[slice] = None) -> Tensor:
        """Return (B, C, H, W), or only these rows of it."""
        pooled = self.token_mixer(x)
        with remade(pooled, lambda x=x: self.token_mixer(x)):
            x = self.add(x, pooled, self.layer_scale1)
        x = x[:, :, rows] if rows else x
        return self.add(x, self.mlp(x), self.layer_scale2)
