"""EfficientFormerV2 as a multi-scale backbone.

Paper: Rethinking Vision Transformers for MobileNet Size and Speed (ICCV 2023),
https://arxiv.org/abs/2212.08059. Authors' code, from which nothing here is
copied: https://github.com/snap-research/EfficientFormer (Apache-2.0).

Different from it: any input size from 32 px, odd grids included, the attention
bias kept as a table over offsets (see ``attention.py``), channels_last kept
throughout.
"""
from typing import Any, Dict, List, Optional, Sequence, Union

from torch import Tensor, nn

from ..utils.registry import MODELS
from .arch import ARCHS_V2, Arch, get_arch
from .attention import AttentionDownsample, Grid, StridedAttention
from .backbone import Backbone, Stage, check_bias, check_in_channels, drop_path_rates
from .layers import ConvMlp, ConvNorm, ScaledBlock, Stem, build_act


class FfnBlock(ScaledBlock):
    """Unified FFN on (B, C, H, W) (V2, section 3.1)."""

    branches = {'layer_scale2': 'mlp.project'}
    local = True

    def __init__(self, channels: int, hidden: int, drop_path: float,
                 layer_scale_init_value: float, norm_cfg: dict, act_cfg: dict):
        super().__init__(channels, layer_scale_init_value, drop_path)
        self.mlp = ConvMlp(channels, hidden, norm_cfg, act_cfg, local=True)

    def forward(self, x: Tensor, rows: Optional[slice] = None) -> Tensor:
        """Return (B, C, H, W), or only these rows of it."""
        return self.add(x[:, :, rows] if rows else x, self.mlp(x, rows), self.layer_scale2)


class AttentionBlock(FfnBlock):
    """Attention, then a unified FFN, on (B, C, H, W)."""

    branches = {'layer_scale1': 'token_mixer.proj', **FfnBlock.branches}
    local = False

    def __init__(self, token_mixer: nn.Module, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.token_mixer = token_mixer

    def forward(self, x: Tensor, rows: Optional[slice] = None) -> Tensor:
        return super().forward(self.add(x, self.token_mixer(x), self.layer_scale1), rows)


@MODELS.register_module()
class EfficientFormerV2(Backbone):
    """EfficientFormerV2 S0, S1, S2, L or any arch given as a dict.

    Input, output, attributes and errors are those of :class:`EfficientFormer`,
    and so are the arguments, except for these.

    Args:
        arch: 's0', 's1', 's2', 'l', or a dict as for :class:`EfficientFormer`.
            Only the last two stages can have attention blocks.
        bias_grid: The grid of tokens at stride 32, at which the attention of both
            stages works; the tables of the attention between them are of twice
            its rows and columns.
        bias_mode: 'legacy' computes what the authors' detectors (``bias_grid`` 25)
            and segmentors (16) do, for their checkpoints.
        out_norm_cfg: Norm of each output. The authors' V2 has no such norms.
        act_cfg: Activation everywhere.
    """

    archs = ARCHS_V2

    def __init__(self,
                 arch: Union[str, dict, Arch] = 's0',
                 in_channels: int = 3,
                 out_indices: Sequence[int] = (0, 1, 2, 3),
                 drop_path_rate: float = 0.,
                 layer_scale_init_value: float = 1e-5,
                 bias_grid: Union[int, Grid] = 7,
                 bias_mode: str = 'offset',
                 out_norm_cfg: Optional[dict] = None,
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
        cfg: Dict[str, Any] = dict(norm_cfg=norm_cfg, act_cfg=act_cfg)
        stem = Stem(check_in_channels(in_channels), widths[0], **cfg)
        last = len(widths) - 1
        stages = []
        downsample: Optional[nn.Module]
        for i, width in enumerate(widths):
            if i == last:
                downsample = AttentionDownsample(widths[i - 1], width, (2 * rows, 2 * cols),
                                                 bias_mode, **cfg)
            else:
                downsample = ConvNorm(widths[i - 1], width, 3, 2, norm_cfg=norm_cfg) if i else None
            blocks: List[nn.Module] = []
            for j, (hidden, rate) in enumerate(zip(arch.hidden(i), rates[i])):
                block = (width, hidden, rate, layer_scale_init_value)
                if arch.attends(i, j):
                    attention = StridedAttention(width, (rows, cols), bias_mode,
                                                 stride=1 if i == last else 2, **cfg)
                    blocks.append(AttentionBlock(attention, *block, **cfg))
                else:
                    blocks.append(FfnBlock(*block, **cfg))
            stages.append(Stage(downsample, blocks, with_cp))
        super().__init__(arch, stem, stages, in_channels, out_indices, out_norm_cfg,
                         frozen_stages, norm_eval, init_cfg)
