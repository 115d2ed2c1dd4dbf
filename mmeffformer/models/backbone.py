"""The base of both EfficientFormers: stages at strides 4 to 32.

Shapes: B batch, C channels, H rows, W columns, N = H * W tokens.
"""
from contextlib import contextmanager, nullcontext
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.model.weight_init import PretrainedInit, trunc_normal_
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.checkpoint import checkpoint

from . import cpu
from .arch import STAGES, Arch, is_integer, is_number
from .attention import BIAS_MODES, MB3D, Grid
from .layers import ConvMlp, build_norm

STRIDES = (4, 8, 16, 32)


class Stage(nn.Module):
    """An embedding of stride 2 (except in the first stage), then blocks, those on tokens last.

    The change from (B, C, H, W) to tokens happens once, before the first MB3D.
    """

    def __init__(self, downsample: Optional[nn.Module], blocks: Sequence[nn.Module],
                 with_cp: bool = False):
        super().__init__()
        self.downsample = downsample or nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.with_cp = _check_flag('with_cp', with_cp)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, 2H, 2W) to (B, C, H, W), memory format kept."""
        return self.through(self.downsample(x), [*self.blocks])

    def through(self, x: Tensor, blocks: Sequence[nn.Module]) -> Tensor:
        """Return (B, C, H, W) after ``blocks``, those on tokens last: the same shape."""
        conv_blocks = [block for block in blocks if not isinstance(block, MB3D)]
        for block in conv_blocks:
            x = self._run(block, x)
        if len(conv_blocks) == len(blocks):
            return x
        grid, rowwise = x.shape[2:], x.is_contiguous()
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
        for block in blocks[len(conv_blocks):]:
            tokens = self._run(block, tokens, grid)
        # To channels_last, without a copy. The exporter to ONNX takes unflatten's sizes for fixed.
        x = tokens.view(tokens.shape[0], *grid, -1).permute(0, 3, 1, 2)
        return x.contiguous() if rowwise else x

    def _run(self, block: Any, x: Tensor, *args: Any) -> Tensor:
        # torch.func takes no checkpoints.
        if (self.with_cp and self.training and torch.is_grad_enabled()
                and not cpu.is_transformed()):
            # The compiler takes no contexts.
            contexts: Dict[str, Any] = {} if cpu.is_captured() else dict(
                context_fn=lambda: (nullcontext(), _statistics_kept(block)))
            return checkpoint(block, x, *args, use_reentrant=False, **contexts)
        if block.local:
            return cpu.by_strips(block, x, block.mlp.expand.conv.out_channels)
        return block(x, *args)


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Context manager: keep the running statistics of norms, as while a block is recomputed.

    Those that ``torch.func`` was given change.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, _NormBase) and norm.training]
    kept = [{name: buffer for name, buffer in norm.named_buffers(recurse=False)
             if not is_functorch_wrapped_tensor(buffer)} for norm in norms]
    for norm, buffers in zip(norms, kept):
        for name, buffer in buffers.items():
            setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)


class Backbone(BaseModule):
    """A stem and four stages, at strides 4, 8, 16 and 32; see :class:`EfficientFormer`.

    Args:
        arch: The network's arch.
        stem: Maps (B, in_channels, H, W) to (B, widths[0], H / 4, W / 4).
        stages: A :class:`Stage` for each of the arch's.
    """

    archs: Mapping[str, Arch] = {}  # a subclass's named archs
    # Loads the checkpoint of init_cfg; mmeffformer.weights sets it to its load_weights.
    pretrained_loader: Callable[..., Any]
    init_cfg: Union[dict, List[dict], None]

    def __init__(self, arch: Arch, stem: nn.Module, stages: Sequence[Stage], in_channels: int,
                 out_indices: Sequence[int], out_norm_cfg: Optional[dict], frozen_stages: int,
                 norm_eval: bool, init_cfg: Union[dict, List[dict], None]):
        super().__init__(init_cfg)
        if not is_integer(frozen_stages) or not -1 <= frozen_stages <= STAGES:
            raise ValueError(f'frozen_stages={frozen_stages!r}: expected -1 (none) to {STAGES}')
        self.arch = arch
        self.in_channels = in_channels
        self.out_indices = _check_out_indices(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = _check_flag('norm_eval', norm_eval)
        self.deployed = False
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.out_norms = nn.ModuleDict({
            str(i): build_norm(out_norm_cfg, arch.widths[i], 'out_norm_cfg')
            for i in self.out_indices
        } if out_norm_cfg is not None else {})
        # Stages after the last output never run. They stay, so that checkpoints are complete.
        self.stages[self.out_indices[-1] + 1:].requires_grad_(False)
        self._freeze()
        self._start_layers()

    @property
    def out_channels(self) -> Tuple[int, ...]:
        return tuple(self.arch.widths[i] for i in self.out_indices)

    @property
    def out_strides(self) -> Tuple[int, ...]:
        return tuple(STRIDES[i] for i in self.out_indices)

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        self._check_input(x)
        # torch.func refuses changes of what it was not given, such as running statistics.
        with _statistics_kept(self) if cpu.is_transformed() else nullcontext():
            return self._features(x)

    def _features(self, x: Tensor) -> Tuple[Tensor, ...]:
        x = self.stem(x)
        outs = []
        for i, stage in enumerate(self.stages[:self.out_indices[-1] + 1]):
            x = stage(x)
            if i in self.out_indices:
                outs.append(self.out_norms[str(i)](x) if self.out_norms else x)
        return tuple(outs)

    def switch_to_deploy(self) -> 'Backbone':
        """Fuse the backbone in place for inference, and return it in eval mode.

        Norms of convolutions and layer scales are folded into the layers before them. Results
        stay the same to rounding. Fused weights load into a fused backbone.
        """
        self.eval()
        for module in reversed([*self.modules()]):  # inner modules first
            if hasattr(module, 'fuse'):
                module.fuse()
        self.deployed = True
        return self.requires_grad_(False)

    def train(self, mode: bool = True) -> 'Backbone':
        if mode and self.deployed:
            raise RuntimeError('the backbone cannot be trained after switch_to_deploy(), which '
                               'fused its norms. Build it again and load its unfused weights')
        super().train(mode)
        if mode:
            self._freeze()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def init_weights(self) -> None:
        """Initialise as mmengine does, except that ``Pretrained`` loads any published layout."""
        cfgs = [self.init_cfg] if isinstance(self.init_cfg, dict) else list(self.init_cfg or [])
        pretrained = [cfg for cfg in cfgs if cfg['type'] in ('Pretrained', PretrainedInit)]
        if self.is_init or not pretrained:
            return super().init_weights()
        init_cfg, self.init_cfg = self.init_cfg, [cfg for cfg in cfgs if cfg not in pretrained]
        super().init_weights()
        self.init_cfg = init_cfg
        for cfg in pretrained:
            report = self.pretrained_loader(self, cfg['checkpoint'], prefix=cfg.get('prefix'))
            print_log(str(report), logger='current')

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str,
                              *args: Any) -> None:
        """Load a state dict; of any published layout if the backbone is the whole model.

        ``mmengine.hub.get_model(..., pretrained=True)`` loads this way, and skips unknown keys.

        Raises:
            ValueError: The keys are neither the backbone's nor those of a published layout.
        """
        native = state_dict.keys() <= self.state_dict().keys() or any(
            key.startswith('stem.0.') for key in state_dict)  # timm's keys overlap elsewhere
        if not prefix and not native:
            self.pretrained_loader(self, state_dict)
            state_dict.clear()
            state_dict.update(self.state_dict())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _start_layers(self) -> None:
        """Initialise linear layers and the 1 x 1 convolutions of MLPs as the authors do."""
        layers: List[Any] = [layer for layer in self.modules() if isinstance(layer, nn.Linear)]
        layers += [part.conv for mlp in self.modules() if isinstance(mlp, ConvMlp)
                   for part in (mlp.expand, mlp.project)]
        for layer in layers:
            trunc_normal_(layer.weight, std=.02)
            nn.init.zeros_(layer.bias)

    def _freeze(self) -> None:
        frozen = [self.stem, *self.stages[:self.frozen_stages]] if self.frozen_stages >= 0 else []
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise ValueError(f'input is a {type(x).__name__}: expected a float tensor '
                             f'(batch, {self.in_channels}, height, width)')
        if not x.is_floating_point():
            raise ValueError(f'input of dtype {x.dtype}: expected floats, normalised as the '
                             'weights were trained with')
        if x.dim() != 4 or x.shape[1] != self.in_channels or not x.shape[0]:
            raise ValueError(f'input of shape {tuple(x.shape)}: expected '
                             f'(batch, {self.in_channels}, height, width) of an image or more')
        if x.shape[2] < STRIDES[-1] or x.shape[3] < STRIDES[-1]:
            raise ValueError(f'input of {x.shape[2]} x {x.shape[3]} px (height x width): '
                             f'expected at least {STRIDES[-1]} each; resize or pad the image')


def _check_out_indices(out_indices: Sequence[int]) -> Tuple[int, ...]:
    given = tuple(out_indices) if isinstance(out_indices, (tuple, list)) else ()
    if (not given or not all(is_integer(i) and 0 <= i < STAGES for i in given)
            or list(given) != sorted({*given})):
        raise ValueError(f'out_indices={out_indices!r}: expected one or more of '
                         f'{tuple(range(STAGES))}, in increasing order')
    return given


def _check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f'{name}={value!r}: expected True or False')
    return value


def check_in_channels(in_channels: int) -> int:
    if not is_integer(in_channels) or in_channels < 1:
        raise ValueError(f'in_channels={in_channels!r}: expected a positive integer')
    return in_channels


def drop_path_rates(rate: float, depths: Sequence[int]) -> List[List[float]]:
    """Return each stage's rates, which grow linearly from 0 at the first block to ``rate``."""
    if not is_number(rate) or not 0 <= rate < 1:
        raise ValueError(f'drop_path_rate={rate!r}: expected 0 <= rate < 1')
    return [[rate * (sum(depths[:i]) + j) / (sum(depths) - 1) for j in range(depth)]
            for i, depth in enumerate(depths)]


def check_bias(bias_grid: Union[int, Grid], bias_mode: str) -> Grid:
    """Return the grid as (rows, cols)."""
    if bias_mode not in BIAS_MODES:
        raise ValueError(f'bias_mode={bias_mode!r}: expected one of {", ".join(BIAS_MODES)}')
    grid = tuple(bias_grid) if isinstance(bias_grid, (tuple, list)) else (bias_grid, bias_grid)
    if len(grid) != 2 or not all(is_integer(n) and n >= 1 for n in grid):
        raise ValueError(f'bias_grid={bias_grid!r}: expected a positive integer or (rows, cols)')
    return grid
