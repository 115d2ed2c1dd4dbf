"""A sub-network of a supernet: the block of each path and the width of each stage.

It also has the paper's three actions that make a network faster (section 4.2).
"""
from dataclasses import dataclass, replace
from typing import Dict, Iterable, Iterator, List, Mapping, Sequence, Tuple

from ..models.arch import STAGES, Arch

IDENTITY = 'I'
KINDS = ('MB4D', 'MB3D', IDENTITY)
STEP = 16  # channels that an action takes from a stage

Importances = Sequence[Sequence[Mapping[str, float]]]  # by stage, path and kind


@dataclass(frozen=True)
class Subnetwork:
    """A sub-network of a supernet.

    Attributes:
        choices: For each stage and path 'MB4D', 'MB3D' or 'I'. No MB4D follows an MB3D: a
            network changes from 4D to 3D once.
        widths: Channels of each stage.

    Raises:
        ValueError: The choices break that rule, or leave a stage without a block.
    """

    choices: Tuple[Tuple[str, ...], ...]
    widths: Tuple[int, ...]

    def __post_init__(self):
        object.__setattr__(self, 'choices', tuple(map(tuple, self.choices)))
        object.__setattr__(self, 'widths', tuple(self.widths))
        if len(self.choices) != STAGES or len(self.widths) != STAGES:
            raise ValueError(f'choices for {len(self.choices)} stages and {len(self.widths)} '
                             f'widths: expected {STAGES} of both')
        unknown = {kind for stage in self.choices for kind in stage} - {*KINDS}
        if unknown:
            raise ValueError(f'choices {", ".join(map(repr, sorted(map(str, unknown))))}: '
                             f'expected {", ".join(KINDS)}')
        for i, stage in enumerate(self.choices):
            if {*stage} <= {IDENTITY}:
                raise ValueError(f'choices leave stage {i + 1} without a block')
        blocks = [kind for _, _, kind in self.blocks()]
        if 'MB3D' in blocks and 'MB4D' in blocks[blocks.index('MB3D'):]:
            raise ValueError('choices have an MB4D after an MB3D: a network changes from 4D to 3D '
                             'once')

    def blocks(self) -> Iterator[Tuple[int, int, str]]:
        """Yield stage, path and kind of every block except the identities."""
        for i, stage in enumerate(self.choices):
            for j, kind in enumerate(stage):
                if kind != IDENTITY:
                    yield i, j, kind

    @property
    def arch(self) -> Arch:
        """The network as an arch."""
        return Arch(self.widths, tuple(len(stage) - stage.count(IDENTITY)
                                       for stage in self.choices),
                    tuple(stage.count('MB3D') for stage in self.choices))

    def check_within(self, widths: Sequence[int], kinds: Sequence[Sequence[Sequence[str]]]
                     ) -> None:
        """Raise a ValueError unless a supernet of these widths and kinds has this network."""
        if any(not 1 <= width <= largest for width, largest in zip(self.widths, widths)):
            raise ValueError(f'widths {self.widths}: expected 1 to {tuple(widths)}, the '
                             "supernet's")
        for i, (chosen, offered) in enumerate(zip(self.choices, kinds)):
            if len(chosen) != len(offered):
                raise ValueError(f'choices for {len(chosen)} paths in stage {i + 1}: expected '
                                 f'{len(offered)}')
            for j, (kind, kinds_of_path) in enumerate(zip(chosen, offered)):
                if kind not in kinds_of_path:
                    raise ValueError(f'choice {kind} for path {j + 1} of stage {i + 1}: expected '
                                     f'{", ".join(kinds_of_path)}')

    def key(self) -> str:
        """Return a text that identifies this network, such as 'aa|ab|…/48-96-224-448'."""
        letters = {'MB4D': 'a', 'MB3D': 'b', IDENTITY: '-'}
        return '|'.join(''.join(letters[kind] for kind in stage) for stage in self.choices) \
            + '/' + '-'.join(map(str, self.widths))

    # The paper's actions --------------------------------------------------------------------

    def actions(self, importances: Importances) -> Dict[str, 'Subnetwork']:
        """Return the results of the paper's three actions, by description.

        (a) The least important path becomes I. (b) The first MB3D becomes an MB4D. (c) The least
        important stage loses 16 channels. Actions that are impossible are left out.
        """
        paths = [(i, j) for i, j, _ in self.blocks()]
        of_stage = [sum(worth(importances[i][j]) for k, j in paths if k == i)
                    for i in range(STAGES)]
        chosen = [min(self._removable(), key=lambda path: worth(importances[path[0]][path[1]]),
                      default=None),
                  min(self._narrowable(), key=of_stage.__getitem__, default=None)]
        removed, narrowed = (() if each is None else (each,) for each in chosen)
        return {**self._removals(removed), **self._exchange(), **self._narrowings(narrowed)}

    def neighbours(self) -> Dict[str, 'Subnetwork']:
        """Return the results of removing any path, exchanging the first MB3D, or narrowing any
        stage, by description."""
        return {**self._removals(self._removable()), **self._exchange(),
                **self._narrowings(self._narrowable())}

    def _removable(self) -> List[Tuple[int, int]]:
        """Return stage and path of the blocks in stages that have more than one."""
        depths = self.arch.depths
        return [(i, j) for i, j, _ in self.blocks() if depths[i] > 1]

    def _narrowable(self) -> List[int]:
        return [i for i in range(STAGES) if self.widths[i] > STEP]

    def _removals(self, paths: Iterable[Tuple[int, int]]) -> Dict[str, 'Subnetwork']:
        return {f'remove {self.choices[i][j]} {j + 1} of stage {i + 1}':
                self._changed(i, j, IDENTITY) for i, j in paths}

    def _exchange(self) -> Dict[str, 'Subnetwork']:
        first = [(i, j) for i, j, kind in self.blocks() if kind == 'MB3D'][:1]
        return {f'MB3D {j + 1} of stage {i + 1} becomes MB4D': self._changed(i, j, 'MB4D')
                for i, j in first}

    def _narrowings(self, stages: Iterable[int]) -> Dict[str, 'Subnetwork']:
        """Narrow stages to the next smaller multiple of 16 channels."""
        found = {}
        for stage in stages:
            widths = list(self.widths)
            widths[stage] = (widths[stage] - 1) // STEP * STEP
            found[f'stage {stage + 1} narrows to {widths[stage]}'] = replace(
                self, widths=tuple(widths))
        return found

    def _changed(self, stage: int, path: int, kind: str) -> 'Subnetwork':
        choices = [list(each) for each in self.choices]
        choices[stage][path] = kind
        return replace(self, choices=tuple(map(tuple, choices)))


def worth(path: Mapping[str, float]) -> float:
    """Return a path's importance, (a3D + a4D) / aI or a4D / aI (paper, section 4.2).

    The ratio is that of the softmax, because importances may be negative.
    """
    return (1 - path[IDENTITY]) / path[IDENTITY]


def smallest(network: Subnetwork) -> Subnetwork:
    """Return the end of all actions: one block per stage, stages of at most 16 channels."""
    choices: List[Tuple[str, ...]] = []
    for stage in network.choices:
        kept = next(j for j, kind in enumerate(stage) if kind != IDENTITY)
        choices.append(tuple('MB4D' if j == kept else IDENTITY for j in range(len(stage))))
    return Subnetwork(tuple(choices), tuple(min(width, STEP) for width in network.widths))
