"""Samples whose augmentation depends on their place in the order of samples alone.

Not on the worker process that makes them, nor on how often the training was interrupted.
"""
import random
from typing import Any, Iterator, List, NamedTuple, Optional

import numpy as np
import torch
from torch.utils.data import BatchSampler

from .guarded import GuardedDataset


def seed_all(*position: int) -> None:
    """Seed the random numbers of Python, numpy and torch by some numbers together.

    Args:
        position: Integers from 0 on, such as a seed, an epoch and an iteration.
    """
    # Mixed, since neighbouring seeds give streams that are alike at first.
    seed = int(np.random.SeedSequence(position).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Index(NamedTuple):
    """The index of a sample, with what it is to be seeded by; None of a sample not wanted."""

    index: Any
    position: Optional[tuple]


class Batches:
    """The batches of a batch sampler, their indices as :class:`Index`.

    Args:
        batches: mmengine's, mmdet's or torch's.
        seed: Of the training.
        rank, world_size: Which of how many processes this is. The samples of all ranks
            are seeded as one process would seed them that takes their batches together.
        done: How many batches the training has had already. The loop takes them again;
            nothing is loaded for them.
    """

    def __init__(self, batches: BatchSampler, seed: int, rank: int = 0, world_size: int = 1,
                 done: int = 0):
        self.batches, self.seed, self.rank, self.world_size = batches, seed, rank, world_size
        self.done, self._given = done, True

    def __getattr__(self, name):
        if name == 'batches':  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.batches, name)  # sampler, batch_size, drop_last

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[List[Index]]:
        epoch, at = getattr(self.sampler, 'epoch', 0), 0
        for batch in self.batches:
            self.done -= 1
            if self.done < 0 or self._given:
                yield [Index(index, None if self.done >= 0 else (
                    self.seed, epoch, (at + k) * self.world_size + self.rank))
                       for k, index in enumerate(batch)]
            at += len(batch)

    @property
    def skip(self):
        """What newer loops call, where samples are endless, instead of taking batches again."""
        if not hasattr(self.sampler, 'skip'):
            raise AttributeError('skip')
        return self._skip

    def _skip(self, num_samples: int):
        self.done, self._given = num_samples // self.batch_size, False


class RepeatableDataset(GuardedDataset):
    """Seeds what an :class:`Index` says before each sample; other indices are as they were."""

    def __getitem__(self, index):
        if not isinstance(index, Index):
            return super().__getitem__(index)
        if index.position is None:
            return {}
        seed_all(*index.position)
        return super().__getitem__(index.index)
