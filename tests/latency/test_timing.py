"""Samples in turns, and memory whose size can be told by hand."""
import time

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmeffformer.latency import timing
from mmeffformer.latency.timing import (
    Timer,
    interleave,
    kept_bytes,
    matmul,
    peak_bytes,
    speed_up,
    spread,
)


def test_spread_and_speed_up():
    assert spread([5., 1., 2., 4., 3.]) == (3, 2, 4)
    # The machine became half as fast: within rounds nothing changed.
    assert speed_up([1., 1., 2., 2.], [3., 3., 6., 6.]) == 3


def test_every_round_has_every_timer_in_an_order_of_its_own():
    timers = {name: (lambda name=name: ord(name)) for name in 'abcdef'}
    samples = list(interleave(timers, 8))
    orders = [''.join(sample.name for sample in samples if sample.round == i) for i in range(8)]
    assert len(samples) == 48 and all(sorted(order) == sorted('abcdef') for order in orders)
    assert len({*orders}) == 8
    assert samples == list(interleave(timers, 8)) != list(interleave(timers, 8, seed=1))
    assert all(sample.ms == ord(sample.name) for sample in samples)


def test_timer_repeats_what_is_short(monkeypatch):
    """On a clock that goes on by 3 ms a call, and by 1 ms where a call is not counted."""
    now, calls = [0.], []

    def call():
        calls.append(now[0])
        now[0] += .003

    monkeypatch.setattr(timing.time, 'perf_counter', lambda: now[0])
    timer = Timer(call, warm_ups=2, min_ms=20)
    assert (timer.repeats, len(calls)) == (7, 2)
    assert timer() == pytest.approx(3)
    assert len(calls) == 2 + 1 + 7  # the first of a turn does not count
    timer = Timer(call, warm_ups=1, min_ms=2)
    assert timer() == pytest.approx(3) and timer.repeats == 1 and len(calls) == 10 + 2


def test_timer_counts_the_time_of_a_call():
    assert Timer(lambda: time.sleep(.005), min_ms=1)() >= 5


def test_peak_is_of_what_lives_at_once():
    def call():
        a = torch.ones(1000, 250)  # 1 MB
        b = torch.empty(2000, 250)  # 2 MB
        del a
        c = torch.empty(500, 250)  # takes the place of a: 0.5 MB
        return b, c

    assert peak_bytes(call) == pytest.approx(3e6, abs=1e3)
    existing = torch.ones(1000, 250)
    assert peak_bytes(lambda: existing.add_(1)) < 1e3


def test_kept_for_backward_is_each_storage_once():
    network = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 50))
    x = torch.randn(10, 100)
    # The input, and what the ReLU gives, which it and the second layer keep.
    assert kept_bytes(lambda: network(x), network.parameters()) == 4 * 10 * (100 + 200)
    assert kept_bytes(lambda: network(x)) == 4 * (10 * 300 + 200 * 50)  # and the second weight
    with torch.no_grad():
        assert kept_bytes(lambda: network(x)) == 0


def test_kept_with_checkpoints_is_their_input():
    network = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 50))
    x = torch.randn(10, 100)
    assert kept_bytes(lambda: checkpoint(network, x, use_reentrant=False),
                      network.parameters()) == 4 * 10 * 100


def test_matmul_is_of_the_size_and_dtype():
    product = matmul(torch.bfloat16, 'cpu', 16)()
    assert product.shape == (16, 16) and product.dtype == torch.bfloat16
