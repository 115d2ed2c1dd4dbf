"""EfficientFormer as a multi-scale backbone.

Paper: EfficientFormer: Vision Transformers at MobileNet Speed (NeurIPS 2022),
https://arxiv.org/abs/2206.01191. Authors' code, from which nothing here is
copied: https://github.com/snap-research/EfficientFormer (Apache-2.0).

Different from it: any input size from 32 px, the attention bias kept as a
table over offsets (see ``attention.py``), channels_last kept throughout.

Shapes: B batch, C channels, H rows, W columns, N = H * W tokens.
"""
from functools import partial
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Union

from torch import nn

from ..utils.registry import MODELS
from .arch import ARCHS, Arch, get_arch
from .attention import MB3D, Grid
from .backbone import Backbone, Stage, check_bias, check_in_channels, drop_path_rates
from .layers import MB4D, ConvNorm, Stem, build_act


@MODELS.register_module()
class EfficientFormer(Backbone):
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
        bias_mode: How tables are resampled to the current grid: 'offset' resamples
            them over offsets; 'legacy' computes what the authors' detectors
            (``bias_grid`` 25) and segmentors (16) do, for their checkpoints.
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
        ValueError: An argument or the input is invalid. Valid inputs are float tensors of the
            weights' dtype with at least one image of 32 x 32 px and ``in_channels``. torch
            raises a ValueError where BatchNorm would train on a single value.
    """

    archs = ARCHS

    def __init__(self,
                 arch: Union[str, dict, Arch] = 'l1',
                 in_channels: int = 3,
                 out_indices: Sequence[int] = (0, 1, 2, 3),
                 drop_path_rate: float = 0.,
                 layer_scale_init_value: float = 1e-5,
                 bias_grid: Union[int, Grid] = 7,
                 bias_mode: str = 'offset',
                 out_norm_cfg: Optional[dict] = dict(type='GN', num_groups=1),
                 norm_cfg: dict = dict(type='BN'),
                 act_cfg: dict = dict(type='GELU'),
                 frozen_stages: int = -1,
                 norm_eval: bool = False,
                 with_cp: bool = False,
                 init_cfg: Union[dict, List[dict], None] = None):
        arch = get_arch(arch, self.archs)
        widths, rates = arch.widths, drop_path_rates(drop_path_rate, arch.depths)
        rows, cols = check_bias(bias_grid, bias_mode)
        build_act(act_cfg)  # a layer takes None for none
        stem = Stem(check_in_channels(in_channels), widths[0], norm_cfg, dict(type='ReLU'))
        stages = []
        for i, width in enumerate(widths):
            downsample = ConvNorm(widths[i - 1], width, 3, 2, norm_cfg=norm_cfg) if i else None
            finer = 2 ** (len(widths) - 1 - i)  # than the grid at stride 32
            cfgs = [dict(channels=width, hidden=hidden, drop_path=rate,
                         layer_scale_init_value=layer_scale_init_value, act_cfg=act_cfg)
                    for hidden, rate in zip(arch.hidden(i), rates[i])]
            kinds: Dict[str, Callable[..., nn.Module]] = dict(
                MB4D=partial(MB4D, norm_cfg=norm_cfg),
                MB3D=partial(MB3D, bias_grid=(rows * finer, cols * finer), bias_mode=bias_mode))
            stages.append(self._stage(i, arch, downsample, kinds, cfgs, with_cp))
        super().__init__(arch, stem, stages, in_channels, out_indices, out_norm_cfg,
                         frozen_stages, norm_eval, init_cfg)

    def _stage(self, stage: int, arch: Arch, downsample: Optional[nn.Module],
               kinds: Mapping[str, Callable[..., nn.Module]], cfgs: Sequence[dict],
               with_cp: bool) -> Stage:
        """Return a stage, its blocks built by ``kinds`` from ``cfgs``, one per block."""
        blocks = [kinds['MB3D' if arch.attends(stage, j) else 'MB4D'](**cfg)
                  for j, cfg in enumerate(cfgs)]
        return Stage(downsample, blocks, with_cp)
