"""What makes one EfficientFormer differ from another, as data."""
from dataclasses import dataclass, fields
from math import isfinite
from typing import Dict, Mapping, Tuple, Union

STAGES = 4


@dataclass(frozen=True)
class Arch:
    """A network of four stages (Table 6 of the EfficientFormer paper).

    Attributes:
        widths: Channels of each stage.
        depths: Blocks of each stage.
        attention_blocks: How many of a stage's blocks, counted from its end,
            are attention blocks (MB3D); the others are MB4D.
        expansion: Hidden over outer channels of every block's MLP.
    """

    widths: Tuple[int, ...]
    depths: Tuple[int, ...]
    attention_blocks: Tuple[int, ...] = (0, 0, 0, 0)
    expansion: float = 4

    def __post_init__(self):
        for name, lowest in (('widths', 1), ('depths', 1), ('attention_blocks', 0)):
            value = getattr(self, name)
            if (not isinstance(value, (tuple, list)) or len(value) != STAGES
                    or not all(type(v) is int and v >= lowest for v in value)):
                raise ValueError(f'arch {name}={value!r}: expected {STAGES} integers, '
                                 f'one a stage, each at least {lowest}')
            object.__setattr__(self, name, tuple(value))
        if self.widths[0] % 2:
            raise ValueError(f'arch widths={self.widths}: the first must be even, '
                             'the stem starts with half of it')
        for stage, (depth, attention) in enumerate(zip(self.depths, self.attention_blocks), 1):
            if attention > depth:
                raise ValueError(f'arch attention_blocks={self.attention_blocks}: stage {stage} '
                                 f'has only {depth} blocks in all')
        if not isinstance(self.expansion, (int, float)) or not isfinite(self.expansion) \
                or round(min(self.widths) * self.expansion) < 1:
            raise ValueError(f'arch expansion={self.expansion!r}: expected a number that leaves '
                             'every block at least one hidden channel, usually 4')


ARCHS: Dict[str, Arch] = {
    'l1': Arch((48, 96, 224, 448), (3, 2, 6, 4), (0, 0, 0, 1)),
    'l3': Arch((64, 128, 320, 512), (4, 4, 12, 6), (0, 0, 0, 4)),
    'l7': Arch((96, 192, 384, 768), (6, 6, 18, 8), (0, 0, 0, 8)),
}


def get_arch(arch: Union[str, Mapping, Arch], named: Mapping[str, Arch] = ARCHS) -> Arch:
    """Return the arch that a name or a dict of :class:`Arch`'s fields stands for.

    Raises:
        ValueError: Unknown name, missing or unknown keys, or values which do
            not fit together.
    """
    if isinstance(arch, Arch):
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
        said = [f'lacks {", ".join(sorted(missing))}'] * bool(missing)
        said += [f'has unknown keys {", ".join(sorted(map(str, unknown)))}'] * bool(unknown)
        raise ValueError(f'arch dict {" and ".join(said)}; {choices}')
    return Arch(**arch)
