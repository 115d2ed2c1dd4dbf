"""Layouts: the names that other libraries give to the tensors of an EfficientFormer.

Sources of the names: https://github.com/snap-research/EfficientFormer (its
classifiers, and its detectors and segmentors), mmpretrain, timm and transformers.
A layout's table pairs each native key, one of this project's backbones, with one of the
layout's, so it works in both directions.

Templates have these fields of block ``b`` in stage ``s`` (both from 0):
``even`` = 2 s and ``odd`` = 2 s - 1, where embeddings count as stages; ``flat``,
``b`` where the change to tokens counts as a block; ``after``, ``flat`` where the
embedding does too; ``attn``, ``b`` counted among the attention blocks;
``group``, transformers' name of the stage.
"""
import re
from dataclasses import dataclass
from math import isqrt, prod
from typing import Dict, Iterable, Iterator, Mapping, Optional, Tuple

from torch import Tensor

from ..models.arch import STAGES, Arch, ArchV2

NATIVE = 'mmeffformer'
PAIR = ('.weight', '.bias')
BATCH_NORM = PAIR + ('.running_mean', '.running_var', '.num_batches_tracked')
TABLE = 'bias.table'
LAYER_SCALES = ('.layer_scale1', '.layer_scale2')


def _conv_norm(*names: str) -> Dict[str, Tuple[str, ...]]:
    return {f'{name}.{part}': leaves for name in names
            for part, leaves in (('conv', PAIR), ('norm', BATCH_NORM))}


def _at(where: str, names: Iterable[str]) -> Tuple[str, ...]:
    return tuple(where + name for name in names)


def _under(where: str, parts: Mapping[str, Tuple[str, ...]]) -> Dict[str, Tuple[str, ...]]:
    return {where + name: leaves for name, leaves in parts.items()}


# The parts of a network: templates of native keys, each with its leaves.
_BLOCK = 'stages.{s}.blocks.{b}.'
_SCALES = {'layer_scale1': ('',), 'layer_scale2': ('',)}
PARTS: Dict[str, Dict[str, Tuple[str, ...]]] = {
    'stem': _conv_norm('stem.0', 'stem.1'),
    'downsample': _conv_norm('stages.{s}.downsample'),
    'mb4d': _under(_BLOCK, {**_conv_norm('mlp.expand', 'mlp.project'), **_SCALES}),
    'mb3d': _under(_BLOCK, {
        'norm1': PAIR, 'token_mixer.qkv': PAIR, 'token_mixer.proj': PAIR,
        'token_mixer.bias.table': ('',), 'norm2': PAIR, 'mlp.expand': PAIR, 'mlp.project': PAIR,
        **_SCALES}),
    'ffn': _under(_BLOCK, {**_conv_norm('mlp.expand', 'mlp.mid', 'mlp.project'),
                           'layer_scale2': ('',)}),
    'attention': _under(_BLOCK, {
        **_under('token_mixer.', {
            **_conv_norm('q', 'k', 'v', 'v_local'), 'talking_head1': PAIR, 'talking_head2': PAIR,
            **_conv_norm('proj'), 'bias.table': ('',)}),
        'layer_scale1': ('',)}),
    'stride': _under(_BLOCK, _conv_norm('token_mixer.stride_conv')),
    'attention_downsample': _under('stages.{s}.downsample.', {
        **_conv_norm('embed'), 'q_local': PAIR, **_conv_norm('q', 'k', 'v', 'v_local', 'proj'),
        'bias.table': ('',)}),
    'out_norm': {'out_norms.{s}': PAIR},
}


def _parts(arch: Arch) -> Iterator[Tuple[str, dict]]:
    """Yield the parts of a network in order, each with the fields of its templates."""
    v2, last = isinstance(arch, ArchV2), STAGES - 1
    yield 'stem', {}
    for s, (depth, attention) in enumerate(zip(arch.depths, arch.attention_blocks)):
        stage = dict(s=s, even=2 * s, odd=2 * s - 1, group=(
            'last_stage' if s == last else f'intermediate_stages.{2 * s}'))
        if s:
            yield 'attention_downsample' if v2 and s == last else 'downsample', stage
        for b in range(depth):
            attn = b - (depth - attention)
            flat = b + (attn >= 0 and not v2)
            block = dict(stage, b=b, flat=flat, after=flat + (s > 0), attn=attn)
            if not v2:
                yield 'mb3d' if attn >= 0 else 'mb4d', block
                continue
            if attn >= 0:
                if s != last:
                    yield 'stride', block
                yield 'attention', block
            yield 'ffn', block
        yield 'out_norm', stage


@dataclass(frozen=True)
class Layout:
    """A naming of a network's tensors: templates of keys, in the order of ``PARTS``.

    Attributes:
        name: The name in reports and errors.
        parts: ``{part: templates}``, without the parts that the layout does not have.
        unused: Patterns (fnmatch) of keys that a backbone does not need.
        marker: Keys that distinguish the layout from one with fewer keys; any of them is enough.
        scale_shape: The shape of a layer scale after C.
    """

    name: str
    parts: Mapping[str, Tuple[str, ...]]
    unused: Tuple[str, ...] = ()
    marker: Tuple[str, ...] = ()
    scale_shape: Tuple[int, ...] = ()

    def table(self, arch: Arch) -> Dict[str, str]:
        """Return ``{native key: key in this layout}`` of all tensors of ``arch``."""
        return {native.format(**fields) + leaf: template.format(**fields) + leaf
                for part, fields in _parts(arch) if part in self.parts
                for (native, leaves), template in zip(PARTS[part].items(), self.parts[part])
                for leaf in leaves}

    def to_native(self, native_key: str, value: Tensor,
                  grid: Optional[Tuple[int, ...]] = None) -> Tensor:
        """Return a tensor of this layout in its native shape; bias tables (heads, rows, cols).

        Args:
            grid: Rows and columns of the backbone's bias table. A table of as many offsets is of
                the same grid, others are of a square one.

        Raises:
            ValueError: A bias table is neither of ``grid`` nor of a square grid.
        """
        if self.name == NATIVE:
            return value
        if native_key.endswith(LAYER_SCALES) and value.shape[1:] == self.scale_shape:
            return value.flatten()
        if not native_key.endswith(TABLE):
            return value
        offsets = value.shape[1] if value.dim() == 2 else 0
        if grid is None or prod(grid) != offsets:
            grid = (isqrt(offsets),) * 2
        if not offsets or prod(grid) != offsets:
            raise ValueError(f'bias table of shape {tuple(value.shape)}: expected '
                             '(heads, n * n), the offsets of a square grid; for another, build '
                             'the backbone with its bias_grid=(rows, cols) at stride 32')
        return value.unflatten(1, grid)

    def from_native(self, native_key: str, value: Tensor) -> Tensor:
        """Return a tensor of native shape in the shape that it has in this layout.

        Raises:
            ValueError: A bias table of an oblong grid, but the layout has square ones only.
        """
        if self.name == NATIVE:
            return value
        if native_key.endswith(LAYER_SCALES):
            return value.reshape(-1, *self.scale_shape)
        if not native_key.endswith(TABLE):
            return value
        if value.shape[1] != value.shape[2]:
            raise ValueError(f'bias table of a {value.shape[1]} x {value.shape[2]} grid: '
                             f'{self.name} holds tables of square grids only')
        return value.flatten(1)


_MLP = ('mlp.fc1', 'mlp.norm1', 'mlp.fc2', 'mlp.norm2')
_ATTENTION = ('norm1', 'token_mixer.qkv', 'token_mixer.proj', 'token_mixer.attention_biases',
              'norm2', 'mlp.fc1', 'mlp.fc2')
_INDICES = ('*.attention_bias_idxs',)
_DENSE_INDICES = _INDICES + ('*.attention_bias_idxs_seg', '*.attention_biases')
_CLASSIFIER = ('norm.*', 'head.*', 'dist_head.*', 'head_dist.*')


def _native(*parts: str) -> Layout:
    return Layout(NATIVE, {part: tuple(PARTS[part]) for part in (*parts, 'out_norm')})


def _seg(names: Iterable[str]) -> Tuple[str, ...]:
    """Return the names in the authors' detectors and segmentors.

    These add bias tables of their own grid. ImageNet's, which their files hold too, are unused.
    """
    return tuple(name + '_seg' if name.endswith('attention_biases') else name for name in names)


_OFFICIAL = dict(
    stem=('patch_embed.0', 'patch_embed.1', 'patch_embed.3', 'patch_embed.4'),
    downsample=('network.{odd}.proj', 'network.{odd}.norm'),
    mb4d=_at('network.{even}.{flat}.', _MLP + ('layer_scale_1', 'layer_scale_2')),
    mb3d=_at('network.{even}.{flat}.', _ATTENTION + ('layer_scale_1', 'layer_scale_2')))
_MMPRETRAIN = dict(
    stem=('patch_embed.0.conv', 'patch_embed.0.bn', 'patch_embed.1.conv', 'patch_embed.1.bn'),
    downsample=('network.{s}.0.conv', 'network.{s}.0.bn'),
    mb4d=_at('network.{s}.{after}.', _MLP + ('ls1.weight', 'ls2.weight')),
    mb3d=_at('network.{s}.{after}.', _ATTENTION + ('ls1.weight', 'ls2.weight')))

LAYOUTS = {layout.name: layout for layout in (
    _native('stem', 'downsample', 'mb4d', 'mb3d'),
    Layout('official', _OFFICIAL, unused=_INDICES + _CLASSIFIER),
    Layout('official-dense',
           dict(_OFFICIAL, mb3d=_seg(_OFFICIAL['mb3d']), out_norm=('norm{even}',)),
           unused=_DENSE_INDICES,
           marker=('norm0.weight', 'norm2.weight', 'norm4.weight', 'norm6.weight')),
    # Alone, mmpretrain's norm3 is the LayerNorm before a classifier.
    Layout('mmpretrain', _MMPRETRAIN, unused=_INDICES + ('norm3.*',)),
    Layout('mmpretrain-dense', dict(_MMPRETRAIN, out_norm=('norm{s}',)), unused=_INDICES,
           marker=('norm0.weight', 'norm1.weight', 'norm2.weight')),
    Layout('timm', dict(
        stem=('stem.conv1', 'stem.norm1', 'stem.conv2', 'stem.norm2'),
        downsample=('stages.{s}.downsample.conv', 'stages.{s}.downsample.norm'),
        mb4d=_at('stages.{s}.blocks.{flat}.', _MLP + ('ls1.gamma', 'ls2.gamma')),
        mb3d=_at('stages.{s}.blocks.{flat}.', _ATTENTION + ('ls1.gamma', 'ls2.gamma'))),
        unused=_INDICES + _CLASSIFIER),
    Layout('transformers', dict(
        stem=('patch_embed.convolution1', 'patch_embed.batchnorm_before',
              'patch_embed.convolution2', 'patch_embed.batchnorm_after'),
        downsample=('encoder.intermediate_stages.{odd}.projection',
                    'encoder.intermediate_stages.{odd}.norm'),
        mb4d=_at('encoder.{group}.meta4D_layers.blocks.{b}.', (
            'mlp.convolution1', 'mlp.batchnorm_before', 'mlp.convolution2',
            'mlp.batchnorm_after', 'layer_scale_1', 'layer_scale_2')),
        mb3d=_at('encoder.{group}.meta3D_layers.blocks.{attn}.', (
            'layernorm1', 'token_mixer.qkv', 'token_mixer.projection',
            'token_mixer.attention_biases', 'layernorm2', 'mlp.linear_in', 'mlp.linear_out',
            'layer_scale_1', 'layer_scale_2'))),
        unused=_INDICES + ('layernorm.*',)),
)}

_OFFICIAL_V2 = dict(
    stem=_OFFICIAL['stem'], downsample=_OFFICIAL['downsample'],
    ffn=_at('network.{even}.{b}.', (
        'mlp.fc1', 'mlp.norm1', 'mlp.mid', 'mlp.mid_norm', 'mlp.fc2', 'mlp.norm2',
        'layer_scale_2')),
    attention=_at('network.{even}.{b}.', (
        *(f'token_mixer.{name}.{i}' for name in ('q', 'k', 'v', 'v_local') for i in (0, 1)),
        'token_mixer.talking_head1', 'token_mixer.talking_head2', 'token_mixer.proj.1',
        'token_mixer.proj.2', 'token_mixer.attention_biases', 'layer_scale_1')),
    stride=_at('network.{even}.{b}.token_mixer.', ('stride_conv.0', 'stride_conv.1')),
    attention_downsample=_at('network.{odd}.', (
        'conv', 'bn', 'attn.q.local.0', 'attn.q.proj.0', 'attn.q.proj.1',
        *(f'attn.{name}.{i}' for name in ('k', 'v', 'v_local') for i in (0, 1)),
        'attn.proj.1', 'attn.proj.2', 'attn.attention_biases')))
_TIMM_V2 = dict(
    stem=('stem.conv1.conv', 'stem.conv1.bn', 'stem.conv2.conv', 'stem.conv2.bn'),
    downsample=('stages.{s}.downsample.conv.conv', 'stages.{s}.downsample.conv.bn'),
    ffn=_at('stages.{s}.blocks.{b}.', (
        *(f'mlp.{name}.{part}' for name in ('fc1', 'mid', 'fc2') for part in ('conv', 'bn')),
        'ls2.gamma')),
    attention=_at('stages.{s}.blocks.{b}.', (
        *(f'token_mixer.{name}.{part}' for name in ('q', 'k', 'v', 'v_local')
          for part in ('conv', 'bn')),
        'token_mixer.talking_head1', 'token_mixer.talking_head2', 'token_mixer.proj.conv',
        'token_mixer.proj.bn', 'token_mixer.attention_biases', 'ls1.gamma')),
    stride=_at('stages.{s}.blocks.{b}.token_mixer.', ('stride_conv.conv', 'stride_conv.bn')),
    attention_downsample=_at('stages.{s}.downsample.', (
        'conv.conv', 'conv.bn', 'attn.q.local', 'attn.q.proj.conv', 'attn.q.proj.bn',
        *(f'attn.{name}.{part}' for name in ('k', 'v', 'v_local', 'proj')
          for part in ('conv', 'bn')),
        'attn.attention_biases')))

LAYOUTS_V2 = {layout.name: layout for layout in (
    _native('stem', 'downsample', 'ffn', 'attention', 'stride', 'attention_downsample'),
    Layout('official', _OFFICIAL_V2, unused=_INDICES + _CLASSIFIER, scale_shape=(1, 1)),
    Layout('official-dense',
           {part: _seg(names) for part, names in _OFFICIAL_V2.items()}, unused=_DENSE_INDICES,
           marker=('network.5.attn.attention_biases_seg',), scale_shape=(1, 1)),
    Layout('timm', _TIMM_V2, unused=_INDICES + _CLASSIFIER),
    # timm.create_model(..., features_only=True)
    Layout('timm-features', {
        part: tuple(re.sub('^(stem|stages)\\.', r'\1_', name) for name in names)
        for part, names in _TIMM_V2.items()}, unused=_INDICES),
)}


def layouts_of(arch: Arch) -> Dict[str, Layout]:
    """Return the layouts that networks of the arch's version are published in, by name."""
    return LAYOUTS_V2 if isinstance(arch, ArchV2) else LAYOUTS


def convert(state_dict: Mapping[str, Tensor], arch: Arch, source: str,
            target: str) -> Dict[str, Tensor]:
    """Return the backbone's tensors of ``state_dict`` under the names of another layout.

    Args:
        state_dict: Tensors of a backbone in layout ``source``, without prefix.
        arch: Its arch.
        source, target: Names in ``layouts_of(arch)``.

    Raises:
        ValueError: A layout is unknown, a tensor of the arch is missing, or a bias table is of
            an oblong grid and the target has square ones only.
    """
    layouts = layouts_of(arch)
    for name in (source, target):
        if name not in layouts:
            raise ValueError(f'layout {name!r} is unknown; choose from {", ".join(layouts)}')
    old, new = layouts[source], layouts[target]
    new_keys, converted = new.table(arch), {}
    for native_key, old_key in old.table(arch).items():
        if old_key not in state_dict:
            if native_key.startswith('out_norms.'):  # backbones without norms lack them
                continue
            raise ValueError(f'{old_key} is missing, so this is not a complete {source} '
                             f'state dict of widths={arch.widths}, depths={arch.depths}')
        if native_key in new_keys:
            try:
                converted[new_keys[native_key]] = new.from_native(
                    native_key, old.to_native(native_key, state_dict[old_key]))
            except ValueError as error:
                raise ValueError(f'{old_key} is a {error}') from error
    return converted
