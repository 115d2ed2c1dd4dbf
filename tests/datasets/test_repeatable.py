"""The augmentation of a sample depends only on its position in the order of samples."""
import random

import numpy as np
import pytest
import torch
from mmdet.datasets.samplers import AspectRatioBatchSampler
from mmengine.dataset import DefaultSampler, InfiniteSampler
from torch.utils.data import BatchSampler, DataLoader, Dataset

from mmeffformer.datasets.repeatable import RepeatableBatches, RepeatableDataset, seed_all


class Draws(Dataset):
    """Eleven samples: each is its index and three random numbers."""

    def __len__(self):
        return 11

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), torch.rand(()).item()

    def get_data_info(self, index):
        return dict(width=index % 2, height=0.5)


def loader(batch_size, rank=0, world_size=1, workers=0, seed=3, **kwargs):
    dataset = RepeatableDataset(Draws())
    sampler = InfiniteSampler(dataset, seed=1)
    sampler.rank, sampler.world_size = rank, world_size
    batches = RepeatableBatches(BatchSampler(sampler, batch_size, False), seed, rank, world_size,
                                **kwargs)
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers,
                      collate_fn=lambda batch: batch)


def first(count, *args, **kwargs):
    batches = iter(loader(*args, **kwargs))
    return [next(batches) for _ in range(count)]


def test_only_the_position_matters():
    expected = first(6, 4)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert first(6, 4) == expected
    assert first(6, 4, workers=2) == expected
    flat = sum(expected, [])
    assert len({numbers for _, *drawn in flat for numbers in drawn}) == 3 * 24
    assert sum(first(12, 2), []) == flat
    assert sum(first(6, 4, seed=4), []) != flat


def test_two_processes_have_the_samples_of_one_process():
    together = first(5, 4)
    apart = [first(5, 2, rank, 2) for rank in (0, 1)]
    for batch, *halves in zip(together, *apart):
        assert sorted(batch) == sorted(sum(halves, []))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_resumed_run_starts_at_its_batch_without_loading(workers):
    assert first(2, 4, workers=workers, start=4) == first(6, 4)[4:]
    loaded = []
    resumed = loader(4, start=4)
    resumed.dataset.dataset.__class__ = type('Counting', (Draws,), dict(
        __getitem__=lambda self, index: loaded.append(index)))
    next(iter(resumed))
    assert len(loaded) == 4


def test_epochs_differ_and_end():
    dataset = RepeatableDataset(Draws())
    sampler = DefaultSampler(dataset, seed=1)
    made = DataLoader(dataset, collate_fn=lambda batch: batch, batch_sampler=RepeatableBatches(
        AspectRatioBatchSampler(sampler, batch_size=2), seed=3))
    assert len(made) == 6
    epochs = []
    for epoch in (0, 1, 0):
        made.batch_sampler.sampler.set_epoch(epoch)
        epochs.append([*made])
    assert epochs[0] == epochs[2] and len(epochs[0]) == 6
    drawn = [{sample[0]: sample[1:] for batch in epoch for sample in batch} for epoch in epochs]
    assert drawn[0].keys() == drawn[1].keys() == {*range(11)}
    assert not {*drawn[0].values()} & {*drawn[1].values()}
    assert all(len({index % 2 for index, *_ in batch}) == 1 for batch in epochs[0][:4])


def test_indices_may_be_anything():
    batches = RepeatableBatches(BatchSampler([(0, 1), (0, 2), (3, 1)], 2, False), seed=3)
    assert [[index.index for index in batch] for batch in batches] == [[(0, 1), (0, 2)], [(3, 1)]]


def test_other_indices_are_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    assert RepeatableDataset(Draws())[3][3] == expected


def test_streams_of_neighbouring_positions_share_no_number():
    drawn = []
    for position in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 1)]:
        seed_all(*position)
        drawn += [random.random(), np.random.rand(), torch.rand(()).item()]
    assert len({*drawn}) == 15
