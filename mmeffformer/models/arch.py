"""Architecture tables."""
from dataclasses import dataclass, fields
from math import inf
from typing import Any, Dict, Mapping, Tuple, Union

STAGES = 4
MAX_EXPANSION = 1000  # far beyond any use


Expansion = Union[float, Tuple[Union[float, Tuple[float, ...]], ...]]


def is_integer(value: Any) -> bool:
    """Return whether a value is an int, and neither True nor False."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is an int or a finite float."""
    return is_integer(value) or isinstance(value, float) and -inf < value < inf


@dataclass(frozen=True)
class Arch:
    """A network of four stages (Table 6 of the EfficientFormer paper).

    Attributes:
        widths: Channels of each stage.
        depths: Blocks of each stage.
        attention_blocks: How many of a stage's blocks, counted from its end,
            are attention blocks.
        expansion: Hidden over outer channels of the MLPs: one number, or one for
            each stage, where a stage's may again be one for each of its blocks.
    """

    widths: Tuple[int, ...]
    depths: Tuple[int, ...]
    attention_blocks: Tuple[int, ...] = (0, 0, 0, 0)
    expansion: Expansion = 4

    def __post_init__(self) -> None:
        for name, lowest in (('widths', 1), ('depths', 1), ('attention_blocks', 0)):
            value = getattr(self, name)
            if (not isinstance(value, (tuple, list)) or len(value) != STAGES
                    or not all(is_integer(v) and v >= lowest for v in value)):
                raise ValueError(f'arch {name}={value!r}: expected {STAGES} integers, '
                                 f'one per stage, each at least {lowest}')
            object.__setattr__(self, name, tuple(value))
        if self.widths[0] % 2:
            raise ValueError(f'arch widths={self.widths}: the first must be even, '
                             'the stem starts with half of it')
        for stage, (depth, attention) in enumerate(zip(self.depths, self.attention_blocks), 1):
            if attention > depth:
                raise ValueError(f'arch attention_blocks={self.attention_blocks}: stage {stage} '
                                 f'has only {depth} blocks in all')
        given = self.expansion
        if isinstance(given, (tuple, list)):
            object.__setattr__(self, 'expansion', tuple(
                tuple(stage) if isinstance(stage, (tuple, list)) else stage
                for stage in given))
            if len(given) != STAGES:
                raise ValueError(f'arch expansion={given!r}: expected one number for all '
                                 f'or one entry for each of the {STAGES} stages')
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths)):
            numbers = self._expansions(stage)
            if len(numbers) != depth:
                raise ValueError(f'arch expansion={given!r}: stage {stage + 1} has {depth} '
                                 f'blocks, but {len(numbers)} numbers are given for them')
            if not all(is_number(n) and n <= MAX_EXPANSION and round(width * n) >= 1
                       for n in numbers):
                raise ValueError(f'arch expansion={given!r}: expected numbers that leave '
                                 f'every block at least one hidden channel, up to {MAX_EXPANSION},'
                                 ' usually 4')

    def _expansions(self, stage: int) -> Tuple[float, ...]:
        given = self.expansion[stage] if isinstance(self.expansion, tuple) else self.expansion
        return given if isinstance(given, tuple) else (given,) * self.depths[stage]

    def hidden(self, stage: int) -> Tuple[int, ...]:
        """Return the hidden channels of the MLP of each block of ``stage`` (from 0)."""
        return tuple(round(self.widths[stage] * n) for n in self._expansions(stage))

    def attends(self, stage: int, block: int) -> bool:
        """Return whether that block (both from 0) is an attention block."""
        return block >= self.depths[stage] - self.attention_blocks[stage]


@dataclass(frozen=True)
class ArchV2(Arch):
    """An EfficientFormerV2 (its Table 6); only the last two stages may have attention."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(self.attention_blocks[:2]):
            raise ValueError(f'arch attention_blocks={self.attention_blocks}: EfficientFormerV2 '
                             'has attention in its last two stages only')


ARCHS: Dict[str, Arch] = {
    'l1': Arch((48, 96, 224, 448), (3, 2, 6, 4), (0, 0, 0, 1)),
    'l3': Arch((64, 128, 320, 512), (4, 4, 12, 6), (0, 0, 0, 4)),
    'l7': Arch((96, 192, 384, 768), (6, 6, 18, 8), (0, 0, 0, 8)),
}

# EfficientFormerV2's search gave each block of the last two stages its own expansion.
ARCHS_V2: Dict[str, ArchV2] = {
    's0': ArchV2((32, 48, 96, 176), (2, 2, 6, 4), (0, 0, 2, 2),
                 (4, 4, (4, 3, 3, 3, 4, 4), (4, 3, 3, 4))),
    's1': ArchV2((32, 48, 120, 224), (3, 3, 9, 6), (0, 0, 2, 2),
                 (4, 4, (4, 4, 3, 3, 3, 3, 4, 4, 4), (4, 4, 3, 3, 4, 4))),
    's2': ArchV2((32, 64, 144, 288), (4, 4, 12, 8), (0, 0, 4, 4),
                 (4, 4, (4, 4, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4), (4, 4, 3, 3, 3, 3, 4, 4))),
    'l': ArchV2((40, 80, 192, 384), (5, 5, 15, 10), (0, 0, 6, 6),
                (4, 4, (4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4),
                 (4, 4, 4, 3, 3, 3, 3, 4, 4, 4))),
}


def get_arch(arch: Union[str, Mapping, Arch], named: Mapping[str, Arch]) -> Arch:
    """Return the arch that a name or a dict of :class:`Arch`'s fields stands for.

    Args:
        arch: A name out of ``named``, a dict, or an arch.
        named: ``ARCHS`` or ``ARCHS_V2``.

    Raises:
        ValueError: Unknown name, missing or unknown keys, an arch of the other
            version, or values that contradict each other.
    """
    kind = type(next(iter(named.values())))
    if type(arch) is kind:
        return arch
    choices = f'choose from {", ".join(named)} or pass a dict with the keys ' \
              f'{", ".join(field.name for field in fields(Arch))}'
    if isinstance(arch, str):
        if arch not in named:
            raise ValueError(f'arch {arch!r} is unknown; {choices}')
        return named[arch]
    if not isinstance(arch, Mapping):
        raise ValueError(f'arch {arch!r} is neither a name nor a dict; {choices}')
    unknown = set(arch) - {field.name for field in fields(Arch)}
    missing = {'widths', 'depths'} - set(arch)
    if unknown or missing:
        problems = [f'lacks {", ".join(sorted(missing))}'] * bool(missing)
        problems += [f'has unknown keys {", ".join(sorted(map(str, unknown)))}'] * bool(unknown)
        raise ValueError(f'arch dict {" and ".join(problems)}; {choices}')
    return kind(**arch)
