"""Loading a backbone's weights from any published layout, whole or not at all."""
import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Dict, List, Mapping, Optional, Set, Tuple, Union

import torch
from torch import Tensor, nn

from ..models.arch import ARCHS, ARCHS_V2, Arch
from ..models.attention import resample_table
from .fetch import locate
from .layouts import NATIVE, TABLE, Layout, layouts_of
from .read import read_checkpoint

# In the order of preference. Names of an average come last: the authors' training code stores
# one, but evaluates the raw weights. mmengine swaps the two: with its EMAHook, `state_dict` is
# the average, which its runs evaluate, and `ema_state_dict` the raw weights.
WRAPPERS = ('state_dict', 'model', 'module', 'net', 'state_dict_ema', 'model_ema',
            'ema_state_dict')
Grid = Tuple[int, int]


@dataclass(frozen=True)
class Report:
    """What :func:`load_weights` did.

    Attributes:
        source: The file, or what else the weights came from.
        layout: Name of the layout found.
        prefix: What stood before the layout's own keys, wrapper included.
        loaded: Our keys that were set.
        resampled: Bias tables of another grid: ``{our key: (from, to)}``, as (rows, cols).
        dropped: The file's keys that a backbone has no use for.
        unknown: The file's keys that no table knows.
        missing: Our keys that kept their initial values: output norms, which
            classifiers do not have, and BatchNorm's counters.
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

    @property
    def left_over(self) -> Tuple[str, ...]:
        """The file's keys that were not loaded."""
        return self.dropped + self.unknown

    def __str__(self) -> str:
        under = f' under {self.prefix!r}' if self.prefix else ''
        lines = [f'loaded {len(self.loaded)} tensors from {self.source} '
                 f'(layout {self.layout}{under})']
        grids = {f'{a[0]} x {a[1]} to {b[0]} x {b[1]}' for a, b in self.resampled.values()}
        for title, what in (
                (f'bias tables resampled from {", ".join(sorted(grids))}', self.resampled),
                ('not needed by a backbone', self.dropped),
                ('left over, known to no layout', self.unknown),
                ('missing, initial values kept', self.missing),
                ('also in the file, choose with prefix=', self.others)):
            if what:
                lines.append(f'  {title}: {_some(what)}')
        return '\n'.join(lines)


def load_weights(backbone: nn.Module, source: Union[str, os.PathLike, Mapping],
                 prefix: Optional[str] = None) -> Report:
    """Load a checkpoint of any known layout into a backbone.

    Attention bias tables of another grid are resampled. Device and dtype of the
    backbone stay as they are. On any error the backbone is left as it was.

    Args:
        backbone: An :class:`EfficientFormer` or :class:`EfficientFormerV2`.
        source: A path, an http(s) URL, ``hf-hub:OWNER/NAME``, or a dict of tensors;
            with or without a wrapper such as ``state_dict``.
        prefix: What stands before the backbone's keys, such as ``backbone``; by
            default it is found. May start with a wrapper's name (``model_ema``).

    Raises:
        TypeError: ``backbone`` is none.
        FileNotFoundError, ConnectionError: The checkpoint is not there.
        ValueError: It cannot be read or does not fit: unknown layout, missing or
            misshapen weights, or weights that are not finite.
    """
    if not isinstance(getattr(backbone, 'arch', None), Arch):
        raise TypeError(f'load_weights got a {type(backbone).__name__}; expected a backbone of '
                        'mmeffformer (of a detector or segmentor, pass model.backbone)')
    if isinstance(source, Mapping):
        return _load(backbone, source, 'a state dict in memory', prefix)
    path = locate(source)
    return _load(backbone, read_checkpoint(path), str(path), prefix)


def _load(backbone: nn.Module, checkpoint: Mapping, name: str, prefix: Optional[str]) -> Report:
    wrapper, state, others, prefix = unwrap(checkpoint, prefix)
    layout, prefix = _recognise(state, backbone.arch, name, prefix)
    wanted = backbone.state_dict()
    table = layout.table(backbone.arch)
    if layout.name == NATIVE:  # whatever else its norms hold
        table.update((key, key) for key in wanted)
    table = {ours: prefix + theirs for ours, theirs in table.items()}
    taken = {theirs for ours, theirs in table.items() if ours in wanted}
    rest = [key for key in state if key not in taken]
    known = {*table.values()}
    dropped = [key for key in rest if not key.startswith(prefix) or key in known or any(
        fnmatchcase(key[len(prefix):], pattern) for pattern in layout.unused)]
    unknown = tuple(key for key in rest if key not in {*dropped})
    try:
        present = {ours: _checked(state, theirs, ours, layout)
                   for ours, theirs in table.items() if theirs in state}
        _check_fit(wanted, table, present, [prefix + key for key in layout.network_keys(
            (key[len(prefix):] for key in unknown), backbone.arch)])
    except ValueError as error:
        raise ValueError(f'{name} (layout {layout.name}) does not fit'
                         f'{_other_arch(backbone.arch, state, prefix)}: {error}. '
                         'Nothing was loaded.') from error

    # Resampled here, since load_state_dict stops half way at an error in a module.
    new = {ours: resample_table(value, wanted[ours].shape[1:]) if ours.endswith(TABLE) else value
           for ours, value in present.items() if ours in wanted}
    backbone.load_state_dict(new, strict=False)
    return Report(
        source=name, layout=layout.name, prefix='.'.join(filter(None, (wrapper, prefix))),
        loaded=tuple(new),
        resampled={ours: (tuple(present[ours].shape[1:]), tuple(value.shape[1:]))
                   for ours, value in new.items() if value.shape != present[ours].shape},
        dropped=tuple(dropped), unknown=unknown,
        missing=tuple(key for key in wanted if key not in new), others=others)


def unwrap(checkpoint: Mapping, prefix: Optional[str]):
    """Return the wrapper's name, what it holds, other wrappers there and the prefix left."""
    state, path, others = checkpoint, [], ()
    while True:
        inside = [key for key in WRAPPERS if isinstance(state.get(key), Mapping)]
        if not inside:
            state = {key: value for key, value in state.items() if isinstance(key, str)}
            return '.'.join(path), state, others, prefix
        first, _, rest = (prefix or '').partition('.')
        if first in inside:
            prefix = rest or None
        chosen = first if first in inside else inside[0]
        path.append(chosen)
        others += tuple(key for key in inside if key != chosen)
        state = state[chosen]


def _recognise(state: Mapping, arch: Arch, name: str,
               prefix: Optional[str]) -> Tuple[Layout, str]:
    """Return the layout that names the most keys of ``state``, and the prefix before them."""
    if prefix:
        prefix = prefix.rstrip('.') + '.'
        if not any(key.startswith(prefix) for key in state):
            raise ValueError(f'{name} has no keys under prefix {prefix!r}; it has '
                             f'{_some(sorted({key.split(".")[0] for key in state}))}')
    layouts = layouts_of(arch)
    found: Dict[Tuple[str, str], Tuple[int, bool]] = {}
    for layout in layouts.values():
        table = layout.table(arch)
        for before in _prefixes(state, next(iter(table.values())), prefix):
            if not layout.marker or any(before + key in state for key in layout.marker):
                hits = sum(before + key in state for key in table.values())
                found[layout.name, before] = hits, bool(layout.marker)
    best = [key for key, hits in found.items() if hits == max(found.values())]
    if not best:
        under = f' under prefix {prefix!r}' if prefix else ''
        under += _other_arch(arch, state, prefix)
        raise ValueError(f'{name} has no known layout{under}; accepted are {", ".join(layouts)}. '
                         f'It starts with {_some(state)}')
    if len(best) > 1:
        raise ValueError(f'{name} holds more than one backbone; choose with prefix= one of '
                         f'{", ".join(sorted(repr(before) for _, before in best))}')
    return layouts[best[0][0]], best[0][1]


def _checked(state: Mapping, key: str, ours: str, layout: Layout) -> Tensor:
    value = state[key]
    if not isinstance(value, Tensor):
        raise ValueError(f'{key} is a {type(value).__name__}, expected a tensor')
    if not ours.endswith('.num_batches_tracked'):
        if not value.is_floating_point():
            raise ValueError(f'{key} is of {value.dtype}, expected floating point')
        if not torch.isfinite(value).all():
            raise ValueError(f'{key} has values that are NaN or infinite')
    try:
        return layout.from_theirs(ours, value)
    except ValueError as error:
        raise ValueError(f'{key} is a {error}') from error


def _check_fit(wanted: Mapping, table: Mapping, present: Mapping, foreign: List[str]):
    """Raise a ValueError unless ``present`` can be loaded whole and is all of a network."""
    lacking = [table.get(ours, ours) for ours in wanted if ours not in present
               and not ours.startswith('out_norms.') and not ours.endswith('.num_batches_tracked')]
    wrong = []
    for ours, value in present.items():
        if ours in wanted:
            # Grids of bias tables may differ.
            dims = slice(1 if ours.endswith(TABLE) else None)
            target = wanted[ours]
            if value.dim() != target.dim() or value.shape[dims] != target.shape[dims]:
                wrong.append(f'{table[ours]} is {tuple(value.shape)} and should be '
                             f'{tuple(target.shape)}')
    if wrong:
        raise ValueError(f'{len(wrong)} tensors have another shape, first {wrong[0]}')
    statistics = [table[ours] for ours in present
                  if ours not in wanted and not ours.startswith('out_norms.')]
    nowhere = statistics + foreign
    if nowhere:
        hint = ' (its norm_cfg has to be of type BN or SyncBN)' if statistics else ''
        raise ValueError(f'the backbone has no place for {len(nowhere)} of the keys, first '
                         f'{_some(nowhere)}{hint}')
    if lacking:
        raise ValueError(f'it lacks {_some(lacking)}')


def _other_arch(arch: Arch, state: Mapping, prefix: Optional[str]) -> str:
    """Return what to say when ``state`` is of another named arch, '' when it is not."""
    named = {**ARCHS, **ARCHS_V2}

    def fits(other: Arch, layout: Layout) -> bool:
        table = {ours: theirs for ours, theirs in layout.table(other).items()
                 if not ours.startswith('out_norms.') and ours.endswith('.weight')}
        weights = {before: {ours: state.get(before + theirs) for ours, theirs in table.items()}
                   for before in _prefixes(state, next(iter(table.values())), prefix)}
        return any(all(isinstance(value, Tensor) for value in each.values()) and all(
            value.shape[1] == other.widths[int(ours[len('stages.')])]
            for ours, value in each.items() if '.blocks.0.mlp.expand' in ours and value.dim() > 1)
            for each in weights.values())

    own = next((name for name, other in named.items() if other == arch), 'another arch')
    found = next((name for name, other in named.items() if other != arch and any(
        fits(other, layout) for layout in layouts_of(other).values())), None)
    return f', checkpoint is {found}, backbone is {own}' if found else ''


def _prefixes(state: Mapping, anchor: str, prefix: Optional[str]) -> Set[str]:
    """Return what stands before a layout's first key, ``prefix`` alone where one is given."""
    at = {key[:-len(anchor)] for key in state if ('.' + key).endswith('.' + anchor)}
    return at if prefix is None else at & {prefix}


def _some(keys) -> str:
    keys: List[str] = list(keys)
    return ', '.join(keys[:3]) + (f' and {len(keys) - 3} more' if len(keys) > 3 else '')
