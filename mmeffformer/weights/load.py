"""Loads the weights of a backbone from any published layout."""
import os
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Set, Tuple, Union

import torch
from torch import Tensor, nn

from ..models.arch import ARCHS, ARCHS_V2, STAGES, Arch, ArchV2
from ..models.attention import resample_table
from ..models.backbone import Backbone
from .fetch import locate
from .layouts import NATIVE, TABLE, Layout, layouts_of
from .safe_loading import WRAPPERS, read_checkpoint

Grid = Tuple[int, ...]
COUNTER = '.num_batches_tracked'
# Names that torch.compile, FSDP and activation checkpointing put into keys.
ADDED = re.compile(r'(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')


@dataclass(frozen=True)
class Report:
    """Result of :func:`load_weights`.

    Attributes:
        source: The file, or a description of another source.
        layout: Name of the layout found.
        prefix: Prefix of the layout's own keys, wrapper included.
        loaded: The backbone's keys that were set.
        resampled: Bias tables of another grid: ``{backbone's key: (from, to)}``, as (rows, cols).
        dropped: The file's keys that a backbone does not need.
        unknown: The file's keys that are in no layout.
        missing: The backbone's keys that kept their initial values: output norms, which
            classifiers lack, and the counters of BatchNorm.
        others: Other sets of weights in the file, which were not read.
    """

    source: str
    layout: str
    prefix: str
    loaded: Tuple[str, ...]
    resampled: Dict[str, Tuple[Grid, Grid]]
    dropped: Tuple[str, ...]
    unknown: Tuple[str, ...]
    missing: Tuple[str, ...]
    others: Tuple[str, ...] = ()

    def __str__(self) -> str:
        under = f' under {self.prefix!r}' if self.prefix else ''
        lines = [f'loaded {len(self.loaded)} tensors from {self.source} '
                 f'(layout {self.layout}{under})']
        grids = {f'{a[0]} x {a[1]} to {b[0]} x {b[1]}' for a, b in self.resampled.values()}
        for title, keys in (
                (f'bias tables resampled from {", ".join(sorted(grids))}', self.resampled),
                ('not needed by a backbone', self.dropped),
                ('left over, in no known layout', self.unknown),
                ('missing, initial values kept', self.missing),
                ('also in the file, choose with prefix=', self.others)):
            if keys:
                lines.append(f'  {title}: {_some(keys)}')
        return '\n'.join(lines)


def load_weights(backbone: nn.Module, source: Union[str, os.PathLike, Mapping],
                 prefix: Optional[str] = None) -> Report:
    """Load a checkpoint of any known layout into a backbone.

    Attention bias tables of another grid are resampled. Device and dtype of the backbone are
    kept. On any error the backbone is unchanged.

    Args:
        backbone: An :class:`EfficientFormer` or :class:`EfficientFormerV2`.
        source: A path of a file or of a folder of ``save_pretrained``, an http(s) URL,
            ``hf-hub:OWNER/NAME``, or a dict of tensors; with or without a wrapper such as
            ``state_dict``.
        prefix: Prefix of the backbone's keys, such as ``backbone``; by default it is
            found. It may start with a wrapper's name (``model_ema``).

    Raises:
        TypeError: ``backbone`` is another module.
        FileNotFoundError, ConnectionError: The checkpoint is not there.
        ValueError: The checkpoint cannot be read or is incompatible: unknown layout, missing or
            misshapen weights, or weights that are not finite.
    """
    if not isinstance(backbone, Backbone):
        raise TypeError(f'load_weights got a {type(backbone).__name__}; expected a backbone of '
                        'mmeffformer (of a detector or segmentor, pass model.backbone)')
    if isinstance(source, Mapping):
        return _load(backbone, source, 'a state dict in memory', prefix)
    path = locate(source)
    return _load(backbone, read_checkpoint(path), str(path), prefix)


def _load(backbone: Backbone, checkpoint: Mapping, name: str, prefix: Optional[str]) -> Report:
    wrapper, state, others, prefix = unwrap(checkpoint, prefix)
    layout, prefix = _recognise(state, backbone.arch, name, prefix)
    targets = backbone.state_dict()
    table = layout.table(backbone.arch)
    if layout.name == NATIVE:  # its norms may hold more than BatchNorm's tensors
        table.update((key, key) for key in targets)
    table = {target_key: prefix + source_key for target_key, source_key in table.items()}
    used = {source_key for target_key, source_key in table.items() if target_key in targets}
    unused = [key for key in state if key not in used]
    known = {*table.values()}
    dropped = [key for key in unused if not key.startswith(prefix) or key in known or any(
        fnmatchcase(key[len(prefix):], pattern) for pattern in layout.unused)]
    unknown = tuple(key for key in unused if key not in {*dropped})
    try:
        found = {target_key: _read_tensor(state, source_key, target_key, layout, targets)
                 for target_key, source_key in table.items() if source_key in state}
        _check_complete(targets, table, found, _foreign_keys(
            unknown, layout, prefix, backbone.arch))
    except ValueError as error:
        raise ValueError(f'{name} (layout {layout.name}) is incompatible'
                         f'{_describe_arch(backbone.arch, state, prefix)}: {error}. '
                         'Nothing was loaded.') from error
    # Resampled here, since an error in load_state_dict would leave half of the tensors loaded.
    new = {key: resample_table(value, targets[key].shape[1:]) if key.endswith(TABLE) else value
           for key, value in found.items() if key in targets}
    backbone.load_state_dict(new, strict=False)
    return Report(
        source=name, layout=layout.name, prefix='.'.join(filter(None, (wrapper, prefix))),
        loaded=tuple(new),
        resampled={key: (tuple(found[key].shape[1:]), tuple(value.shape[1:]))
                   for key, value in new.items() if value.shape != found[key].shape},
        dropped=tuple(dropped), unknown=unknown,
        missing=tuple(key for key in targets if key not in new), others=others)


def unwrap(checkpoint: Mapping, prefix: Optional[str]
           ) -> Tuple[str, Dict[str, Any], Tuple[str, ...], Optional[str]]:
    """Return the wrapper's name, its state dict, other wrappers and the rest of ``prefix``.

    The names of wrappers that are not among ``WRAPPERS`` become prefixes of the keys.
    """
    inside = [key for key in WRAPPERS if isinstance(checkpoint.get(key), Mapping)
              and any(isinstance(value, Tensor) for _, value in _leaves(checkpoint[key]))]
    if not inside:
        state = {ADDED.sub('', key): value for key, value in _leaves(checkpoint)}
        return '', state, (), prefix and ADDED.sub('', prefix)
    first, _, rest = (prefix or '').partition('.')
    chosen, prefix = (first, rest or None) if first in inside else (inside[0], prefix)
    wrapper, state, others, prefix = unwrap(checkpoint[chosen], prefix)
    others = (*(key for key in inside if key != chosen), *others)
    return '.'.join(filter(None, (chosen, wrapper))), state, others, prefix


def _leaves(checkpoint: Mapping, prefix: str = '') -> Iterator[Tuple[str, Any]]:
    """Yield the keys and values of nested dicts, keys joined with dots."""
    for key, value in checkpoint.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f'{prefix}{key}.')
        elif isinstance(key, str):
            yield prefix + key, value


def _recognise(state: Mapping, arch: Arch, name: str,
               prefix: Optional[str]) -> Tuple[Layout, str]:
    """Return the layout that names the most keys of ``state``, and the prefix before them."""
    if prefix:
        prefix = prefix.rstrip('.') + '.'
        if not any(key.startswith(prefix) for key in state):
            raise ValueError(f'{name} has no keys under prefix {prefix!r}; it has '
                             f'{_some(sorted({key.split(".")[0] for key in state}))}')
    layouts = layouts_of(arch)
    hits: Dict[Tuple[str, str], Tuple[int, bool]] = {}
    for layout in layouts.values():
        table = layout.table(arch)
        for before in _prefixes(state, next(iter(table.values())), prefix):
            if not layout.marker or any(before + key in state for key in layout.marker):
                count = sum(before + key in state for key in table.values())
                if count >= len(table) / 10:  # fewer are names that other networks use too
                    hits[layout.name, before] = count, bool(layout.marker)
    best = [key for key, each in hits.items() if each == max(hits.values())]
    if not best:
        under = f' under prefix {prefix!r}' if prefix else ''
        under += _describe_arch(arch, state, prefix)
        raise ValueError(f'{name} has no known layout{under}; accepted are {", ".join(layouts)}. '
                         f'{_describe_keys(state)}')
    if len(best) > 1:
        raise ValueError(f'{name} holds more than one backbone; choose with prefix= one of '
                         f'{", ".join(sorted(repr(before) for _, before in best))}')
    return layouts[best[0][0]], best[0][1]


def _describe_keys(state: Mapping) -> str:
    tensors = {key: tuple(value.shape) for key, value in state.items()
               if isinstance(value, Tensor)}
    if not tensors:
        return f'It has no tensors, only {_some(state) or "an empty dict"}'
    tops = {key.split('.')[0] for key in tensors}
    return (f'Its {len(tensors)} tensors are under {_some(sorted(tops), 9)}, such as '
            f'{_some(f"{key} {shape}" for key, shape in tensors.items())}')


def _read_tensor(state: Mapping, source_key: str, target_key: str, layout: Layout,
                 targets: Mapping) -> Tensor:
    """Return a tensor of the file as the backbone has it."""
    value = state[source_key]
    if not isinstance(value, Tensor):
        raise ValueError(f'{source_key} is a {type(value).__name__}, expected a tensor')
    if not target_key.endswith(COUNTER):
        if not value.is_floating_point():
            raise ValueError(f'{source_key} is of {value.dtype}, expected floating point')
        if not torch.isfinite(value).all():
            raise ValueError(f'{source_key} has values that are NaN or infinite')
    try:
        grid = tuple(targets[target_key].shape[1:]) if target_key in targets else None
        return layout.to_native(target_key, value, grid)
    except ValueError as error:
        raise ValueError(f'{source_key} is a {error}') from error


def _check_complete(targets: Mapping, table: Mapping, found: Mapping,
                    foreign: List[str]) -> None:
    """Raise a ValueError unless ``found`` has all tensors of the backbone, and of no larger one.

    Args:
        targets: The backbone's tensors.
        table: ``{target_key: source_key}``.
        found: The file's tensors, by target_key.
        foreign: The file's keys of blocks that the backbone does not have.
    """
    misshapen = []
    for key, value in found.items():
        dims = slice(1 if key.endswith(TABLE) else None)  # grids of bias tables may differ
        target = targets.get(key, value)
        if value.dim() != target.dim() or value.shape[dims] != target.shape[dims]:
            misshapen.append(f'{table[key]} is {tuple(value.shape)} and should be '
                             f'{tuple(target.shape)}')
    if misshapen:
        raise ValueError(f'{len(misshapen)} tensors have another shape, first {misshapen[0]}')
    statistics = [table[key] for key in found if key not in targets and not _is_optional(key)]
    unexpected = statistics + foreign
    if unexpected:
        hint = ' (its norm_cfg has to be of type BN or SyncBN)' if statistics else ''
        raise ValueError(f'{len(unexpected)} of the keys are unexpected, first '
                         f'{_some(unexpected)}{hint}')
    missing = [table.get(key, key) for key in targets
               if key not in found and not _is_optional(key) and not key.endswith(COUNTER)]
    if missing:
        raise ValueError(f'it lacks {_some(missing)}')


def _foreign_keys(unknown: Iterable[str], layout: Layout, prefix: str, arch: Arch) -> List[str]:
    """Return the keys of a stem, downsample or block in a larger network of the same version."""
    attention = (0, 0, 1, 1) if isinstance(arch, ArchV2) else (1,) * STAGES
    every_part = type(arch)((2,) * STAGES, (2,) * STAGES, attention)
    known = {_unnumbered(prefix + source_key) for key, source_key in layout.table(
        every_part).items() if not _is_optional(key)}
    return [key for key in unknown if _unnumbered(key) in known]


def _unnumbered(key: str) -> str:
    return re.sub(r'\.\d+', '.N', key)


def _is_optional(target_key: str) -> bool:
    return target_key.startswith('out_norms.')  # which classifiers lack


def _describe_arch(arch: Arch, state: Mapping, prefix: Optional[str]) -> str:
    """Return a phrase that names the arch of ``state`` if it is another named one, else ''."""
    named = {**ARCHS, **ARCHS_V2}

    def fits(key: str, value: Any, other: Arch) -> bool:
        if '.blocks.0.mlp.expand' not in key:
            return isinstance(value, Tensor)
        return isinstance(value, Tensor) and (
            value.dim() < 2 or value.shape[1] == other.widths[int(key[len('stages.')])])

    def matches(other: Arch, layout: Layout) -> bool:
        table = {key: source_key for key, source_key in layout.table(other).items()
                 if not _is_optional(key) and key.endswith('.weight')}
        return any(all(fits(key, state.get(before + source_key), other)
                       for key, source_key in table.items())
                   for before in _prefixes(state, next(iter(table.values())), prefix))

    own = next((name for name, other in named.items() if other == arch), 'another arch')
    found = next((name for name, other in named.items() if other != arch and any(
        matches(other, layout) for layout in layouts_of(other).values())), None)
    return f', checkpoint is {found}, backbone is {own}' if found else ''


def _prefixes(state: Mapping, anchor: str, prefix: Optional[str]) -> Set[str]:
    """Return the prefixes of a layout's first key, or ``prefix`` alone where one is given."""
    found = {key[:-len(anchor)] for key in state if ('.' + key).endswith('.' + anchor)}
    return found if prefix is None else found & {prefix}


def _some(keys: Iterable[str], most: int = 3) -> str:
    keys = list(keys)
    rest = f' and {len(keys) - most} more' if len(keys) > most else ''
    return ', '.join(keys[:most]) + rest
