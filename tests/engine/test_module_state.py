"""Values of a model outside of its state dict, in a snapshot and set in another model."""
import pickle
import random
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

from mmeffformer.engine.module_state import changed_values, set_values, snapshot
from mmeffformer.weights import read_checkpoint


class Assigner:
    """An object that is not a module, as mmdet's assigners are."""

    def __init__(self):
        self.threshold, self.history = 0.5, []


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.inner[0].calls = 0
        self.size, self.untouched = None, (1, 2)
        self.assigners = [Assigner(), Assigner()]
        self.cfg, self.counts = dict(factor=1., of=self.inner), {}
        self.queue = deque([0], maxlen=3)
        self.python, self.numpy = random.Random(0), np.random.RandomState(0)
        self.new_numpy, self.torch = np.random.default_rng(0), torch.Generator().manual_seed(0)
        self.shared = np.random.mtrand._rand
        self.register_buffer('offset', torch.zeros(2), persistent=False)
        self.total = torch.zeros(())
        self.cache, self.last_batch = {}, None

    def step(self):
        self.inner[0].calls += 1
        self.size = (32 * self.python.randint(1, 99), np.int64(self.numpy.randint(99)))
        self.assigners[1].threshold *= 0.9
        self.assigners[1].history.append(self.new_numpy.random())
        self.cfg['factor'] = np.float32(2.5)
        self.counts[3] = self.counts.get(3, 0) + 1
        self.queue.append(self.inner[0].calls)
        self.offset += torch.rand(2, generator=self.torch)
        self.total = self.total + 1
        self.cache[8, 8] = self.last_batch = [torch.ones(9)]
        self.inner(torch.ones(2, 2))


def values(model: nn.Module) -> dict:
    """Return the plain values as text, without those of the last batch."""
    loaded = {path: pickle.loads(value) for path, value in snapshot(model).items()}
    return {path: repr(value.tolist() if hasattr(value, 'tolist') else value)
            for path, value in loaded.items() if path[1] not in ('cache', 'last_batch')}


def test_the_rest_of_a_run_is_the_same(tmp_path):
    torch.manual_seed(0)
    model, other = Stateful(), Stateful()
    before = snapshot(model)
    elsewhere = model.torch.get_state()  # the next copy of the state has another address
    assert changed_values(model, before) == {}
    del elsewhere
    model.step()
    model.step()
    torch.save(dict(module_state=changed_values(model, before)), tmp_path / 'state.pth')
    set_values(other, read_checkpoint(tmp_path / 'state.pth')['module_state'])
    other.load_state_dict(model.state_dict())
    for _ in range(2):
        assert values(other) == values(model)
        assert other.inner[0].calls and other.queue.maxlen == 3
        model.step()
        other.step()
    assert other.inner[0].calls == 4 and other.queue == deque([2, 3, 4])
    assert torch.equal(other.offset, model.offset) and other.total == 4
    assert other.assigners[1].history == model.assigners[1].history
    assert other.size == model.size and other.assigners[0].threshold == 0.5


@pytest.mark.parametrize('path, kept', [
    (('', 'untouched'), False),  # has not changed
    (('inner.0', 'calls'), True), (('', 'counts'), True), (('', 'offset'), False),
    (('', '_buffers', 'offset'), True), (('', 'total'), True), (('', 'queue'), True),
    (('', 'assigners', 1, 'threshold'), True), (('', 'assigners', 0, 'threshold'), False),
    (('inner.1', '_buffers', 'running_mean'), False),  # the state dict has it
    (('', 'shared'), False),  # seeded before each iteration
    (('', 'training'), False), (('', 'cache'), False), (('', 'last_batch', 0), False)])
def test_what_is_kept(path, kept):
    model = Stateful()
    before = snapshot(model)
    model.step()
    np.random.rand()
    assert (path in changed_values(model.eval(), before)) == kept


def test_values_without_a_place_are_ignored():
    model = Stateful()
    before = snapshot(model)
    set_values(model, {('gone', 'calls'): 1, ('', 'assigners', 7): 2, ('', 'untouched', 0): 3})
    assert snapshot(model) == before
