"""Samples whose augmentation depends only on their position in the order of samples.

It depends neither on the worker process that makes a sample nor on whether the run was resumed.
"""
import random
from dataclasses import dataclass
from typing import Any, Iterator, List, NamedTuple, Tuple

import numpy as np
import torch
from torch.utils.data import BatchSampler, Sampler

from .traced import TracedDataset


def seed_all(*position: int) -> None:
    """Seed the random numbers of Python, numpy and torch with several numbers together.

    Args:
        position: Integers of at least 0, such as a seed, an epoch and an iteration.
    """
    # Neighbouring seeds give streams that are similar at first, so the numbers are mixed.
    seed = int(np.random.SeedSequence(position).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Index(NamedTuple):
    """The index of a sample, and the numbers that seed its augmentation."""

    index: Any
    position: Tuple[int, ...]


@dataclass(frozen=True)
class RepeatableBatches:
    """A batch sampler that adds positions to the indices of another one.

    Args:
        batches: The batch sampler of torch, mmengine or mmdet.
        seed: The seed of the run.
        rank, world_size: Number of this process, and of all. The samples of all ranks together
            are seeded as those of one process that takes all their batches.
        start: Number of batches to leave out in each pass: those of the iterations before a
            resume, for a sampler without end. Nothing is loaded for them.
    """

    batches: BatchSampler
    seed: int
    rank: int = 0
    world_size: int = 1
    start: int = 0

    @property
    def sampler(self) -> Sampler:
        """The sampler of samples; mmengine sets its epoch."""
        return self.batches.sampler

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[List[Index]]:
        epoch, position = getattr(self.sampler, 'epoch', 0), 0
        for number, batch in enumerate(self.batches):
            if number >= self.start:
                yield [Index(index, (self.seed, epoch, i * self.world_size + self.rank))
                       for i, index in enumerate(batch, position)]
            position += len(batch)


class RepeatableDataset(TracedDataset):
    """Seeds the random numbers before a sample whose index is an :class:`Index`."""

    def __getitem__(self, index):
        if isinstance(index, Index):
            seed_all(*index.position)
            index = index.index
        return super().__getitem__(index)
