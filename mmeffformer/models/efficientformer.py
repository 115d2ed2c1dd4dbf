"""EfficientFormer as a multi-scale backbone.

Paper: EfficientFormer: Vision Transformers at MobileNet Speed (NeurIPS 2022),
https://arxiv.org/abs/2206.01191. Authors' code, from which nothing here is
copied: https://github.com/snap-research/EfficientFormer (Apache-2.0).

Different from it: any input size from 32 px, the attention bias kept as a
table over offsets (see ``attention.py``), channels_last kept throughout.

Shapes: B batch, C channels, H rows, W columns, N = H * W tokens.
"""
from typing import List, Optional, Sequence, Tuple, Union

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.model.weight_init import PretrainedInit, trunc_normal_
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..registry import MODELS
from .arch import STAGES, Arch, get_arch
from .attention import MB3D, Grid
from .layers import MB4D, ConvNorm, Stem, build_norm

STRIDES = (4, 8, 16, 32)


class Stage(nn.Module):
    """An embedding of stride 2 (but in the first stage), MB4D blocks, MB3D blocks.

    The change from (B, C, H, W) to tokens happens once, before the first MB3D.
    """

    def __init__(self, downsample: Optional[nn.Module], blocks: Sequence[nn.Module],
                 with_cp: bool = False):
        super().__init__()
        self.downsample = downsample or nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, 2H, 2W) to (B, C, H, W), memory format kept."""
        x = self.downsample(x)
        conv_blocks = [block for block in self.blocks if not isinstance(block, MB3D)]
        for block in conv_blocks:
            x = self._run(block, x)
        if len(conv_blocks) == len(self.blocks):
            return x
        grid, rowwise = x.shape[2:], x.is_contiguous()
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
        for block in self.blocks[len(conv_blocks):]:
            tokens = self._run(block, tokens, grid)
        x = tokens.unflatten(1, grid).permute(0, 3, 1, 2)  # channels_last, without a copy
        return x.contiguous() if rowwise else x

    def _run(self, block: nn.Module, x: Tensor, *args) -> Tensor:
        if self.with_cp and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, *args, use_reentrant=False)
        return block(x, *args)


@MODELS.register_module()
class EfficientFormer(BaseModule):
    """EfficientFormer L1, L3, L7 or any arch given as a dict.

    Input: float (B, in_channels, H, W) with any H, W >= 32. Output: a tuple of
    (B, C_i, ceil(H / s_i), ceil(W / s_i)) for the strides s = 4, 8, 16, 32 at
    ``out_indices``. Attributes ``out_channels`` and ``out_strides`` list C_i
    and s_i in that order.

    Args:
        arch: 'l1', 'l3', 'l7', or a dict with ``widths``, ``depths``,
            ``attention_blocks`` and ``expansion`` (see :class:`Arch`).
        in_channels: Channels of the input image.
        out_indices: Stages to return, increasing, out of 0 to 3.
        drop_path_rate: Stochastic depth of the last block; it grows linearly
            from 0 at the first.
        layer_scale_init_value: Initial scale of every residual branch
            (the authors' dense L7 uses 1e-6).
        bias_grid: The grid of tokens at stride 32, an int or (rows, cols), for
            which attention bias tables are stored: 7 for ImageNet at 224 px,
            more for training at larger sizes. Tables of another grid are
            resampled when they are loaded.
        out_norm_cfg: Norm of each output. None returns the stages' raw outputs.
        norm_cfg: Norm after every convolution.
        act_cfg: Activation inside the blocks; the stem's is ReLU.
        frozen_stages: -1 trains all, 0 freezes the stem, n the stages up to the
            n-th as well (their norms in eval mode).
        norm_eval: Keep all BatchNorm statistics as they are while training.
        with_cp: Recompute every block in backward instead of keeping its
            activations.
        init_cfg: mmengine's; ``dict(type='Pretrained', checkpoint=...)`` takes
            every layout of :func:`mmeffformer.load_weights`.

    Raises:
        ValueError: An argument is out of range, or an input is smaller than
            32 px or has another number of channels.
    """

    def __init__(self,
                 arch: Union[str, dict, Arch] = 'l1',
                 in_channels: int = 3,
                 out_indices: Sequence[int] = (0, 1, 2, 3),
                 drop_path_rate: float = 0.,
                 layer_scale_init_value: float = 1e-5,
                 bias_grid: Union[int, Grid] = 7,
                 out_norm_cfg: Optional[dict] = dict(type='GN', num_groups=1),
                 norm_cfg: dict = dict(type='BN'),
                 act_cfg: dict = dict(type='GELU'),
                 frozen_stages: int = -1,
                 norm_eval: bool = False,
                 with_cp: bool = False,
                 init_cfg: Union[dict, List[dict], None] = None):
        super().__init__(init_cfg)
        self.arch = get_arch(arch)
        self.in_channels = in_channels
        self.out_indices = _check_out_indices(out_indices)
        if not isinstance(in_channels, int) or in_channels < 1:
            raise ValueError(f'in_channels={in_channels!r}: expected a positive integer')
        if frozen_stages not in range(-1, STAGES + 1):
            raise ValueError(f'frozen_stages={frozen_stages!r}: expected -1 (none) to {STAGES}')
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate={drop_path_rate!r}: expected 0 <= rate < 1')
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

        widths, depths = self.arch.widths, self.arch.depths
        self.stem = Stem(in_channels, widths[0], norm_cfg, dict(type='ReLU'))
        grid = _check_bias_grid(bias_grid)
        self.stages = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, depths)):
            downsample = ConvNorm(widths[i - 1], width, 3, 2, norm_cfg=norm_cfg) if i else None
            scale = STRIDES[-1] // STRIDES[i]
            blocks = []
            for j in range(depth):
                cfg = dict(channels=width, expansion=self.arch.expansion,
                           drop_path=drop_path_rate * (sum(depths[:i]) + j) / (sum(depths) - 1),
                           layer_scale_init_value=layer_scale_init_value, act_cfg=act_cfg)
                if j < depth - self.arch.attention_blocks[i]:
                    blocks.append(MB4D(norm_cfg=norm_cfg, **cfg))
                else:
                    blocks.append(MB3D(bias_grid=(grid[0] * scale, grid[1] * scale), **cfg))
            self.stages.append(Stage(downsample, blocks, with_cp))
        self.out_norms = nn.ModuleDict({
            str(i): build_norm(out_norm_cfg, widths[i]) for i in self.out_indices
        } if out_norm_cfg else {})
        # Stages after the last output never run: kept, for whole checkpoints, but not trained.
        self.stages[self.out_indices[-1] + 1:].requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=.02)
                nn.init.zeros_(module.bias)
        self._freeze()

    @property
    def out_channels(self) -> Tuple[int, ...]:
        return tuple(self.arch.widths[i] for i in self.out_indices)

    @property
    def out_strides(self) -> Tuple[int, ...]:
        return tuple(STRIDES[i] for i in self.out_indices)

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        self._check_input(x)
        x = self.stem(x)
        outs = []
        for i, stage in enumerate(self.stages[:self.out_indices[-1] + 1]):
            x = stage(x)
            if i in self.out_indices:
                outs.append(self.out_norms[str(i)](x) if self.out_norms else x)
        return tuple(outs)

    def train(self, mode: bool = True) -> 'EfficientFormer':
        super().train(mode)
        if mode:
            self._freeze()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def init_weights(self):
        """As mmengine's, but ``Pretrained`` loads any published layout."""
        cfgs = [self.init_cfg] if isinstance(self.init_cfg, dict) else list(self.init_cfg or [])
        pretrained = [cfg for cfg in cfgs if cfg['type'] in ('Pretrained', PretrainedInit)]
        if self.is_init or not pretrained:
            return super().init_weights()
        from ..weights import load_weights  # weights builds on models
        init_cfg, self.init_cfg = self.init_cfg, [cfg for cfg in cfgs if cfg not in pretrained]
        super().init_weights()
        self.init_cfg = init_cfg
        for cfg in pretrained:
            report = load_weights(self, cfg['checkpoint'], prefix=cfg.get('prefix'))
            print_log(str(report), logger='current')

    def _freeze(self):
        frozen = [self.stem, *self.stages[:self.frozen_stages]] if self.frozen_stages >= 0 else []
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def _check_input(self, x: Tensor):
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f'input of shape {tuple(x.shape)}: expected '
                             f'(batch, {self.in_channels}, height, width)')
        if x.shape[2] < STRIDES[-1] or x.shape[3] < STRIDES[-1]:
            raise ValueError(f'input of {x.shape[2]} x {x.shape[3]} px (height x width): '
                             f'both must be at least {STRIDES[-1]}; resize or pad the image')


def _check_out_indices(out_indices: Sequence[int]) -> Tuple[int, ...]:
    given = tuple(out_indices) if isinstance(out_indices, (tuple, list)) else ()
    if not given or any(i not in range(STAGES) for i in given) or list(given) != sorted({*given}):
        raise ValueError(f'out_indices={out_indices!r}: expected one or more of '
                         f'{tuple(range(STAGES))}, in increasing order')
    return given


def _check_bias_grid(bias_grid: Union[int, Grid]) -> Grid:
    grid = tuple(bias_grid) if isinstance(bias_grid, (tuple, list)) else (bias_grid, bias_grid)
    if len(grid) != 2 or not all(isinstance(n, int) and n >= 1 for n in grid):
        raise ValueError(f'bias_grid={bias_grid!r}: expected a positive integer or (rows, cols)')
    return grid
