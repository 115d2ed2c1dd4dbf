"""Interleaved samples, and memory whose size is computed by hand."""
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmeffformer.latency import timing


def test_spread_and_speed_up():
    assert timing.spread([5., 1., 2., 4., 3.]) == (3, 2, 4)
    # The machine became half as fast: within rounds nothing changed.
    assert timing.speed_up([1., 1., 2., 2.], [3., 3., 6., 6.]) == 3


def test_every_round_calls_every_timer_in_its_own_order():
    called, steps = [], []
    timers = {name: (lambda name=name: called.append(name) or ord(name)) for name in 'abcdef'}
    rounds = list(timing.interleave(timers, 8, progress=lambda *args: steps.append(args)))
    assert rounds == [{name: ord(name) for name in 'abcdef'}] * 8
    orders = [''.join(called[i:i + 6]) for i in range(0, 48, 6)]
    assert all(sorted(order) == sorted('abcdef') for order in orders) and len({*orders}) == 8
    assert steps[7] == (f'round 2: {called[7]}', 7, 48)
    first = called[:]
    for seed, same in ((0, True), (1, False)):
        called.clear()
        list(timing.interleave(timers, 8, seed))
        assert (called == first) == same


def test_timer_repeats_what_is_short(monkeypatch):
    """Use a clock that advances by 3 ms per call."""
    now, calls = [0.], []

    def call():
        calls.append(now[0])
        now[0] += .003

    monkeypatch.setattr(timing.time, 'perf_counter', lambda: now[0])
    timer = timing.Timer(call, warm_ups=2, min_ms=20)
    assert (timer.repeats, len(calls)) == (7, 2)
    assert timer() == pytest.approx(3)
    assert len(calls) == 2 + 1 + 7  # the first of a sample does not count
    timer = timing.Timer(call, warm_ups=1, min_ms=2)
    assert timer() == pytest.approx(3) and timer.repeats == 1 and len(calls) == 10 + 2
    assert timing.Timer(call, min_ms=2, least_calls=1000).repeats == 1000


def test_peak_is_of_what_lives_at_once():
    def call():
        a = torch.ones(1000, 250)  # 1 MB
        b = torch.empty(2000, 250)  # 2 MB
        del a
        c = torch.empty(500, 250)  # reuses the memory of a: 0.5 MB
        return b, c

    assert timing.peak_bytes(call) == pytest.approx(3e6, abs=1e3)
    existing = torch.ones(1000, 250)
    assert timing.peak_bytes(lambda: existing.add_(1)) < 1e3


def test_kept_for_backward_is_each_storage_once():
    network = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 50))
    x = torch.randn(10, 100)
    # The input, and what the ReLU gives, which it and the second layer keep.
    assert timing.kept_bytes(lambda: network(x), network.parameters()) == 4 * 10 * (100 + 200)
    # Without knowing the parameters, the second weight counts too.
    assert timing.kept_bytes(lambda: network(x)) == 4 * (10 * 300 + 200 * 50)
    with torch.no_grad():
        assert timing.kept_bytes(lambda: network(x)) == 0
    assert timing.kept_bytes(lambda: checkpoint(network, x, use_reentrant=False),
                      network.parameters()) == 4 * 10 * 100  # the input alone


def test_matmul_is_of_the_size_and_dtype():
    product = timing.matmul(torch.bfloat16, 'cpu', 16)()
    assert product.shape == (16, 16) and product.dtype == torch.bfloat16
