"""How other libraries name the tensors of an EfficientFormer, as tables.

Sources of the names: https://github.com/snap-research/EfficientFormer (its
classifiers, and its detectors and segmentors), mmpretrain, timm and transformers.
A layout's table pairs each of our keys with one of theirs, so it reads both ways.

Templates know these fields of block ``b`` in stage ``s`` (both from 0):
``even`` = 2 s and ``odd`` = 2 s - 1, where embeddings count as stages; ``flat``,
``b`` where the change to tokens counts as a block; ``after``, ``flat`` where the
embedding does too; ``attn``, ``b`` counted among the attention blocks;
``group``, transformers' name of the stage.
"""
import re
from dataclasses import dataclass
from math import isqrt
from typing import Dict, Iterable, List, Mapping, Tuple

from torch import Tensor

from ..models.arch import STAGES, Arch

NATIVE = 'mmeffformer'
PAIR = ('.weight', '.bias')
BATCH_NORM = PAIR + ('.running_mean', '.running_var', '.num_batches_tracked')

# Our templates, each with the leaves that are below it.
STEM = {'stem.0.conv': PAIR, 'stem.0.norm': BATCH_NORM,
        'stem.1.conv': PAIR, 'stem.1.norm': BATCH_NORM}
DOWNSAMPLE = {'stages.{s}.downsample.conv': PAIR, 'stages.{s}.downsample.norm': BATCH_NORM}
BLOCK = 'stages.{s}.blocks.{b}.'
TABLE = 'token_mixer.bias.table'
SCALES = {'layer_scale1': ('',), 'layer_scale2': ('',)}
MB4D = {'mlp.expand.conv': PAIR, 'mlp.expand.norm': BATCH_NORM,
        'mlp.project.conv': PAIR, 'mlp.project.norm': BATCH_NORM, **SCALES}
MB3D = {'norm1': PAIR, 'token_mixer.qkv': PAIR, 'token_mixer.proj': PAIR, TABLE: ('',),
        'norm2': PAIR, 'mlp.expand': PAIR, 'mlp.project': PAIR, **SCALES}
OUT_NORM = {'out_norms.{s}': PAIR}


@dataclass(frozen=True)
class Layout:
    """Their templates, in the order of ours above.

    Attributes:
        name: What reports and errors call it.
        stem, downsample: Templates of whole keys.
        mb4d_at, mb3d_at: Where a block of the kind is.
        mb4d, mb3d: Names inside a block.
        out_norm: Norm of a stage's output, none in classifiers.
        unused: Patterns (fnmatch) of keys that a backbone has no use for.
        marker: Keys of which one must be there, for a layout that is another
            one with parts added.
    """

    name: str
    stem: Tuple[str, ...]
    downsample: Tuple[str, ...]
    mb4d_at: str
    mb4d: Tuple[str, ...]
    mb3d_at: str
    mb3d: Tuple[str, ...]
    out_norm: Tuple[str, ...] = ()
    unused: Tuple[str, ...] = ()
    marker: Tuple[str, ...] = ()

    def table(self, arch: Arch) -> Dict[str, str]:
        """Return ``{our key: their key}`` of all tensors of ``arch``."""
        keys = {}

        def add(ours: Mapping, theirs: Tuple[str, ...], at: Tuple[str, str] = ('', ''), **fields):
            for (our, leaves), their in zip(ours.items(), theirs):
                for leaf in leaves:
                    key, value = (a + name + leaf for a, name in zip(at, (our, their)))
                    keys[key.format(**fields)] = value.format(**fields)

        add(STEM, self.stem)
        for s, (depth, attention) in enumerate(zip(arch.depths, arch.attention_blocks)):
            where = dict(s=s, even=2 * s, odd=2 * s - 1, group=(
                'last_stage' if s == STAGES - 1 else f'intermediate_stages.{2 * s}'))
            if s:
                add(DOWNSAMPLE, self.downsample, **where)
            for b in range(depth):
                attn = b - (depth - attention)
                flat = b + (attn >= 0)
                block = dict(where, b=b, flat=flat, after=flat + (s > 0), attn=attn)
                if attn < 0:
                    add(MB4D, self.mb4d, (BLOCK, self.mb4d_at), **block)
                else:
                    add(MB3D, self.mb3d, (BLOCK, self.mb3d_at), **block)
            add(OUT_NORM, self.out_norm, **where)
        return keys

    def network_keys(self, keys: Iterable[str]) -> List[str]:
        """Return those of ``keys`` that are of a stem, downsample or block in some arch."""
        every = self.table(Arch((2,) * STAGES, (2,) * STAGES, (1,) * STAGES)).items()
        known = {_unnumbered(key) for ours, key in every if not ours.startswith('out_norms.')}
        return [key for key in keys if _unnumbered(key) in known]


def _unnumbered(key: str) -> str:
    return re.sub(r'\.\d+(?=\.)', '.N', key)


_MLP = ('mlp.fc1', 'mlp.norm1', 'mlp.fc2', 'mlp.norm2')
_ATTENTION = ('norm1', 'token_mixer.qkv', 'token_mixer.proj', 'token_mixer.attention_biases',
              'norm2', 'mlp.fc1', 'mlp.fc2')
_INDICES = ('*.attention_bias_idxs',)

_OFFICIAL = dict(
    stem=('patch_embed.0', 'patch_embed.1', 'patch_embed.3', 'patch_embed.4'),
    downsample=('network.{odd}.proj', 'network.{odd}.norm'),
    mb4d_at='network.{even}.{flat}.', mb4d=_MLP + ('layer_scale_1', 'layer_scale_2'),
    mb3d_at='network.{even}.{flat}.')
_MMPRETRAIN = dict(
    stem=('patch_embed.0.conv', 'patch_embed.0.bn', 'patch_embed.1.conv', 'patch_embed.1.bn'),
    downsample=('network.{s}.0.conv', 'network.{s}.0.bn'),
    mb4d_at='network.{s}.{after}.', mb4d=_MLP + ('ls1.weight', 'ls2.weight'),
    mb3d_at='network.{s}.{after}.', mb3d=_ATTENTION + ('ls1.weight', 'ls2.weight'))

LAYOUTS = {layout.name: layout for layout in (
    Layout(NATIVE, tuple(STEM), tuple(DOWNSAMPLE), BLOCK, tuple(MB4D), BLOCK, tuple(MB3D),
           out_norm=tuple(OUT_NORM)),
    Layout('official', **_OFFICIAL, mb3d=_ATTENTION + ('layer_scale_1', 'layer_scale_2'),
           unused=_INDICES + ('norm.*', 'head.*', 'dist_head.*')),
    # The authors' detectors and segmentors add a bias table of their own grid and
    # never read ImageNet's, which their files hold as well.
    Layout('official-dense', **_OFFICIAL,
           mb3d=tuple(name + '_seg' if name.endswith('biases') else name for name in _ATTENTION)
           + ('layer_scale_1', 'layer_scale_2'), out_norm=('norm{even}',),
           unused=_INDICES + ('*.attention_bias_idxs_seg', '*.attention_biases'),
           marker=('norm0.weight', 'norm2.weight', 'norm4.weight', 'norm6.weight')),
    # Alone, mmpretrain's norm3 is the LayerNorm before a classifier.
    Layout('mmpretrain', **_MMPRETRAIN, unused=_INDICES + ('norm3.*',)),
    Layout('mmpretrain-dense', **_MMPRETRAIN, out_norm=('norm{s}',), unused=_INDICES,
           marker=('norm0.weight', 'norm1.weight', 'norm2.weight')),
    Layout('timm', ('stem.conv1', 'stem.norm1', 'stem.conv2', 'stem.norm2'),
           ('stages.{s}.downsample.conv', 'stages.{s}.downsample.norm'),
           'stages.{s}.blocks.{flat}.', _MLP + ('ls1.gamma', 'ls2.gamma'),
           'stages.{s}.blocks.{flat}.', _ATTENTION + ('ls1.gamma', 'ls2.gamma'),
           unused=_INDICES + ('norm.*', 'head.*', 'head_dist.*')),
    Layout('transformers',
           ('patch_embed.convolution1', 'patch_embed.batchnorm_before',
            'patch_embed.convolution2', 'patch_embed.batchnorm_after'),
           ('encoder.intermediate_stages.{odd}.projection',
            'encoder.intermediate_stages.{odd}.norm'),
           'encoder.{group}.meta4D_layers.blocks.{b}.',
           ('mlp.convolution1', 'mlp.batchnorm_before', 'mlp.convolution2',
            'mlp.batchnorm_after', 'layer_scale_1', 'layer_scale_2'),
           'encoder.{group}.meta3D_layers.blocks.{attn}.',
           ('layernorm1', 'token_mixer.qkv', 'token_mixer.projection',
            'token_mixer.attention_biases', 'layernorm2', 'mlp.linear_in', 'mlp.linear_out',
            'layer_scale_1', 'layer_scale_2'),
           unused=_INDICES + ('layernorm.*',)),
)}


def from_theirs(ours: str, value: Tensor, layout: str) -> Tensor:
    """Return a tensor of ``layout`` as ours: bias tables (heads, n * n) become (heads, n, n).

    Raises:
        ValueError: A bias table which is not of a square grid.
    """
    if layout == NATIVE or not ours.endswith(TABLE):
        return value
    side = isqrt(value.shape[-1]) if value.dim() == 2 else 0
    if not side or side * side != value.shape[1]:
        raise ValueError(f'bias table of shape {tuple(value.shape)}: expected (heads, n * n), '
                         'the offsets of a square grid')
    return value.unflatten(1, (side, side))


def convert(state_dict: Mapping[str, Tensor], arch: Arch, source: str,
            target: str) -> Dict[str, Tensor]:
    """Return the backbone's tensors of ``state_dict`` under the names of another layout.

    Args:
        state_dict: Tensors of a backbone in layout ``source``, without prefix.
        arch: Its arch.
        source, target: Names out of ``LAYOUTS``.

    Raises:
        ValueError: Unknown layout, a tensor of the arch which is missing, or a
            bias table of an oblong grid where the target knows square ones only.
    """
    for name in (source, target):
        if name not in LAYOUTS:
            raise ValueError(f'layout {name!r} is unknown; choose from {", ".join(LAYOUTS)}')
    theirs, converted = LAYOUTS[target].table(arch), {}
    for ours, key in LAYOUTS[source].table(arch).items():
        if key not in state_dict:
            if ours.startswith('out_norms.'):  # present where the backbone has them
                continue
            raise ValueError(f'{key} is missing, so this is not a whole {source} state dict of '
                             f'widths={arch.widths}, depths={arch.depths}')
        value = from_theirs(ours, state_dict[key], source)
        if target != NATIVE and ours.endswith(TABLE):
            if value.shape[1] != value.shape[2]:
                raise ValueError(f'{key} is of a {value.shape[1]} x {value.shape[2]} grid: '
                                 f'{target} holds tables of square grids only')
            value = value.flatten(1)
        if ours in theirs:
            converted[theirs[ours]] = value
    return converted
