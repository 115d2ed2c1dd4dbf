"""Latency lookup table: ms of the parts of an EfficientFormer by width, and their sums.

The paper slims by latency, which it looks up in a table of MB4D and MB3D over widths in multiples
of 16 (https://arxiv.org/abs/2206.01191, section 4.2). A prediction is the sum over the parts of a
network; ``mmeffformer.latency.measuring`` explains how the entries are measured.

Embeddings have two widths, and are measured on a lattice of about six values per axis, both ends
included; the table interpolates bilinearly. All other parts are measured at all widths.

Units: ms; widths in channels; shapes H, W in px; grids in rows, columns.
"""
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from ..models.arch import ARCHS, STAGES, Arch, get_arch
from ..utils.files import atomic_write

EXPANSION = 4
BLOCKS, EMBEDDING, STEM, OVERHEAD = ('MB4D', 'MB3D'), 'embedding', 'stem', 'overhead'
ATTENTION_STAGES = (2, 3)  # the stages of MB3D, as in the paper's supernet
LATTICE = 6


@dataclass(frozen=True)
class Part:
    """A part of a network that has an entry. ``str()`` gives the entry's key.

    Attributes:
        kind: 'MB4D', 'MB3D', 'embedding', 'stem' or 'overhead'.
        stage: From 0; an embedding belongs to the stage after it.
        widths: The width; of an embedding, the width before and after it.
    """

    kind: str
    stage: int = 0
    widths: Tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.kind == OVERHEAD:
            return self.kind
        stage = '' if self.kind == STEM else f' stage{self.stage + 1}'
        return f'{self.kind}{stage} {"-".join(map(str, self.widths))}'


def parts(arch: Arch) -> Iterator[Part]:
    """Yield the parts of a network in order, repeated parts each time."""
    yield Part(STEM, 0, arch.widths[:1])
    for stage in range(STAGES):
        if stage:
            yield Part(EMBEDDING, stage, arch.widths[stage - 1:stage + 1])
        for block in range(arch.depths[stage]):
            yield Part(BLOCKS[arch.attends(stage, block)], stage, (arch.widths[stage], ))
    yield Part(OVERHEAD)


def lattice(widths: Sequence[int]) -> List[int]:
    """Return about ``LATTICE`` of the widths, evenly spread, both ends included."""
    return sorted({widths[round(i)] for i in np.linspace(0, len(widths) - 1, LATTICE)})


def widths_of(header: Mapping) -> List[List[int]]:
    """Return the widths of each stage in a table with this header."""
    return [[*range(header['step'], widest + 1, header['step'])]
            for widest in header['max_widths']]


def parts_of(header: Mapping) -> List[Part]:
    """Return all parts of a complete table with this header, the overhead last."""
    widths = widths_of(header)
    found = [Part(STEM, 0, (width, )) for width in widths[0]]
    for kind, stages in zip(BLOCKS, (range(STAGES), ATTENTION_STAGES)):
        found += [Part(kind, stage, (width, )) for stage in stages for width in widths[stage]]
    found += [Part(EMBEDDING, stage, pair) for stage in range(1, STAGES)
              for pair in product(lattice(widths[stage - 1]), lattice(widths[stage]))]
    return [*found, Part(OVERHEAD)]


def title(header: Mapping) -> str:
    """Return runtime, image size and machine of a table."""
    return (f'{header["runtime"]}, {header["shape"][0]} x {header["shape"][1]} px, '
            f'{header["device"]}'  # the cores of a phone are unknown
            + (f', threads: {header["threads"]} of {header["cores"]}' if header['cores'] else ''))


class LatencyTable:
    """ms of the parts of an EfficientFormer, and their sums.

    Attributes:
        header: Machine and settings, see :func:`mmeffformer.latency.measuring.new_header`.
        entries: By key (``str`` of a :class:`Part`), a dict with ``ms``, its quartiles ``q1``
            and ``q3`` over rounds, ``kind``, ``stage`` (1 to 4), ``widths`` and ``grid``.
        check: Result of :func:`mmeffformer.latency.validation.check`, None before it.
    """

    def __init__(self, header: Mapping[str, Any], entries: Optional[Mapping[str, Any]] = None,
                 check: Optional[Mapping[str, Any]] = None):
        self.header, self.entries = dict(header), dict(entries or {})
        self.check = dict(check) if check else None

    @classmethod
    def load(cls, path: Union[str, Path]) -> 'LatencyTable':
        """Read a file of :meth:`save`.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is damaged or not a latency table.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f'latency table {str(path)!r} does not exist; '
                                    'tools/latency_table.py makes one')
        try:
            read = json.loads(path.read_text())
            return cls(read['header'], read['entries'], read['check'])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path} is damaged or not a latency table '
                             f'({type(error).__name__}: {error}): delete it, or name another '
                             'file') from error

    def save(self, path: Union[str, Path]) -> None:
        """Write JSON atomically."""
        with atomic_write(path) as tmp_path:
            tmp_path.write_text(json.dumps(dict(header=self.header, entries=self.entries,
                                                check=self.check), indent=1))

    def predict(self, arch: Union[str, Dict, Arch]) -> float:
        """Return the ms of a backbone without norms on its outputs.

        Args:
            arch: An :class:`Arch`, or 'l1', 'l3', 'l7', or a dict of its fields.

        Raises:
            ValueError: A part has no entry, or the expansion differs from the table's.
        """
        arch = get_arch(arch, ARCHS)
        for stage, width in enumerate(arch.widths):
            wrong = {*arch.hidden(stage)} - {round(width * self.header['expansion'])}
            if wrong:
                raise ValueError(
                    f'arch expansion={arch.expansion}: the table is of blocks with expansion '
                    f'{self.header["expansion"]}, stage {stage + 1} of width {width} has hidden '
                    f'channels {", ".join(map(str, sorted(wrong)))}')
        return sum(self.part_ms(part) for part in parts(arch))

    def block_ms(self, kind: str, stage: int, width: int) -> float:
        """Return the ms of one block.

        Args:
            kind: 'MB4D' or 'MB3D'.
            stage: 0 to 3.

        Raises:
            ValueError: The table has no such entry.
        """
        if kind not in BLOCKS or stage not in range(STAGES):
            raise ValueError(f'block {kind!r} of stage {stage!r}: expected {" or ".join(BLOCKS)}, '
                             f'and a stage from 0 to {STAGES - 1}')
        return self.part_ms(Part(kind, stage, (width, )))

    def part_ms(self, part: Part) -> float:
        """Return the ms of a part, of an embedding by interpolation.

        Raises:
            ValueError: The table has no such entry.
        """
        if str(part) in self.entries:
            return self.entries[str(part)]['ms']
        axes = [lattice(widths)
                for widths in widths_of(self.header)[part.stage - 1:part.stage + 1]]
        if part.kind != EMBEDDING or any(not axis[0] <= width <= axis[-1]
                                         for axis, width in zip(axes, part.widths)):
            raise self._missing(part)
        corners = [_neighbours(axis, width) for axis, width in zip(axes, part.widths)]
        try:
            ms = [[self.entries[str(Part(EMBEDDING, part.stage, (before, after)))]['ms']
                   for after in corners[1]] for before in corners[0]]
        except KeyError:
            raise self._missing(part) from None
        return float(np.interp(part.widths[0], corners[0],
                               [np.interp(part.widths[1], corners[1], row) for row in ms]))

    def missing(self) -> List[Part]:
        """Return the parts that are still to be measured."""
        return [part for part in parts_of(self.header) if str(part) not in self.entries]

    def _missing(self, part: Part) -> ValueError:
        alike = {tuple(entry['widths']) for entry in self.entries.values()
                 if (entry['kind'], entry['stage']) == (part.kind, part.stage + 1)}
        near = ' to '.join(' and '.join(map(str, _neighbours(sorted(set(axis)), width)))
                           for axis, width in zip(zip(*alike), part.widths))
        remedy = ('run tools/latency_table.py with the same arguments, which measures what is '
                  'missing' if part in parts_of(self.header) else 'choose among these widths and '
                  'stages, or make a table with other --max-widths or --step')
        return ValueError(f'the latency table has no {part}; '
                          f'nearest widths: {near or "none of this kind and stage"}; {remedy}')


def _neighbours(axis: Sequence[int], width: int) -> List[int]:
    """Return the nearest of the axis at or below, and at or above ``width``, as far as it goes."""
    below, above = [n for n in axis if n <= width], [n for n in axis if n >= width]
    return sorted({*below[-1:], *above[:1]})
