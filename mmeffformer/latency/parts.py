"""Parts of an EfficientFormer and whole backbones, as calls that are timed."""
import copy
from pathlib import Path
from typing import Any, Mapping, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..deploy.export import export
from ..deploy.runtimes import SUFFIXES
from ..models import cpu
from ..models.arch import STAGES, Arch
from ..models.attention import AttentionBias
from ..models.backbone import STRIDES
from ..models.efficientformer import EfficientFormer
from .building import BIAS_GRID
from .exported import open_file, open_module
from .table import BLOCKS, EMBEDDING, EXPANSION, STEM, Part
from .timing import Call

WEIGHT_BYTES = 64 * 2 ** 20  # more than the last cache of common CPUs holds for one process
COPIES = (2, 12)  # least and most copies of a part

Size = Tuple[int, int]


def grid(stage: int, shape: Size) -> Size:
    """Return rows and columns of a stage (from 0)."""
    return tuple(-(-size // STRIDES[stage]) for size in shape)


def part_bytes(part: Part, shape: Size) -> int:
    """Return the approximate bytes of a part's weights and attention bias."""
    width, rows_cols = part.widths[-1], grid(part.stage, shape)
    numbers = {'MB4D': 2 * EXPANSION * width ** 2,
               'MB3D': (2 * EXPANSION * width + 2560) * width
               + 8 * (rows_cols[0] * rows_cols[1]) ** 2,
               EMBEDDING: 9 * part.widths[0] * width, STEM: 5 * width ** 2}[part.kind]
    return 4 * numbers


def copies(part: Part, shape: Size) -> int:
    """Return the number of copies timed together, which exceed the caches."""
    least, most = COPIES
    return min(max(least, -(-WEIGHT_BYTES // part_bytes(part, shape))), most)


class ParallelCopies(nn.Module):
    """Copies of a layer with separate weights, applied to the same input."""

    def __init__(self, layer: nn.Module, count: int):
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(count))
        for parameter in self.parameters():  # a runtime computes equal layers only once
            nn.init.normal_(parameter, std=.02)

    def forward(self, x: Tensor) -> Union[Tensor, Tuple[Tensor, ...]]:
        """Return the last copy's output; in an exported graph the means of all outputs."""
        if cpu.is_captured():
            # Layers without outputs would be removed. Means are small and keep the maps in the
            # runtime's own layout, where outputs would be converted to NCHW.
            return tuple(F.adaptive_avg_pool2d(layer(x), 1) for layer in self.layers)
        for layer in self.layers:
            out = layer(x)
        return out


def build_part(part: Part, count: int, shape: Size) -> Tuple[nn.Module, Tensor]:
    """Return ``count`` fused copies of a part and their input.

    Blocks are a chain; that of MB3D starts with the change from (B, C, H, W) to tokens.
    """
    widths, depths, attention = [16] * STAGES, [1] * STAGES, [0] * STAGES
    widths[part.stage] = part.widths[-1]
    if part.kind == EMBEDDING:
        widths[part.stage - 1] = part.widths[0]
    elif part.kind in BLOCKS:
        depths[part.stage] = count
        attention[part.stage] = count if part.kind == 'MB3D' else 0
    network = build_network(Arch(tuple(widths), tuple(depths), tuple(attention)))
    network = network.switch_to_deploy()
    if part.kind == STEM:
        return ParallelCopies(network.stem, count), torch.randn(1, 3, *shape)
    stage = network.stages[part.stage]
    if part.kind == EMBEDDING:
        image = torch.randn(1, part.widths[0], *grid(part.stage - 1, shape))
        return ParallelCopies(stage.downsample, count), image
    stage.downsample = nn.Identity()
    return stage, torch.randn(1, part.widths[0], *grid(part.stage, shape))


def build_network(arch: Arch) -> EfficientFormer:
    """Return a backbone in eval mode with random biases."""
    network = EfficientFormer(arch, bias_grid=BIAS_GRID, out_norm_cfg=None).eval()
    for module in network.modules():
        if isinstance(module, AttentionBias):  # an exporter stores equal tables only once
            nn.init.normal_(module.table, std=.02)
    return network


def open_part(part: Part, header: Mapping[str, Any], folder: Path) -> Tuple[Call, int]:
    """Return a call that runs copies of a part, and their number."""
    count = copies(part, header['shape'])
    module, image = build_part(part, count, header['shape'])
    image = image.repeat(header['batch'], 1, 1, 1)
    path = folder / str(part).replace(' ', '_')
    return open_module(module, image, header['runtime'], header['threads'], path,
                       header['precision']), count


def open_network(arch: Arch, header: Mapping[str, Any], folder: Path) -> Call:
    """Return a call that runs a backbone; an exported one is compared with PyTorch.

    One for TensorRT is not compared.
    """
    network, runtime = build_network(arch), header['runtime']
    image, precision = torch.randn(header['batch'], 3, *header['shape']), header['precision']
    path = folder / str(len([*folder.iterdir()]))
    if runtime not in SUFFIXES:
        return open_module(network.switch_to_deploy(), image, runtime, header['threads'], path,
                           precision)
    path = path.with_suffix(SUFFIXES[runtime])
    export(network, path, runtime, 'backbone', tuple(header['shape']), precision=precision)
    return open_file(runtime, path, image, header['threads'], precision)
