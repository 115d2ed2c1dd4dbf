"""Timing of calls that are compared, and the memory that a call needs.

The speed of a machine drifts with its clock and its other load. Calls that are compared are
therefore interleaved: each is timed once per round, in shuffled order, and compared within rounds.
"""
import math
import platform
import random
import time
import warnings
from itertools import accumulate
from timeit import timeit
from typing import Any, Callable, Dict, Iterable, Iterator, Mapping, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Any]
Progress = Callable[[str, int, int], None]  # current step as text, steps done, number of steps

WARM_UPS = 2
MIN_MS = 20.  # shorter calls are repeated, for the resolution of the clock and for warm caches


class Spread(NamedTuple):
    """Median and quartiles of some samples, in their unit."""

    median: float
    q1: float
    q3: float

    @property
    def unsteadiness(self) -> float:
        return (self.q3 - self.q1) / self.median


def spread(samples: Sequence[float]) -> Spread:
    """Return median and quartiles of ``samples``."""
    return Spread(*map(float, np.percentile(samples, (50, 25, 75))))


class Timer:
    """Timer of one call, which it warms up first.

    Calling the timer returns one sample: ms per call. A call shorter than ``min_ms`` is repeated,
    after one repetition that does not count, because other calls have used the caches meanwhile.

    Args:
        call: The call to time. On a GPU it need not wait for its results.
        device: 'cpu' or 'cuda'.
        warm_ups: Calls before the first that counts, at least one.
        min_ms: Least duration of all repetitions of a sample together.
        least_calls: Least number of these repetitions.
    """

    def __init__(self, call: Call, device: str = 'cpu', warm_ups: int = WARM_UPS,
                 min_ms: float = MIN_MS, least_calls: int = 1):
        self.call, self.device, self.repeats = call, device, 1
        for _ in range(warm_ups):
            ms = self._elapsed_ms()
        self.repeats = max(least_calls, math.ceil(min_ms / max(ms, 1e-3)))

    def __call__(self) -> float:
        if self.repeats > 1:
            self.call()
        return self._elapsed_ms() / self.repeats

    def _elapsed_ms(self) -> float:
        def sample() -> None:
            for _ in range(self.repeats):
                self.call()

        if self.device == 'cpu':  # garbage collection is off
            return 1e3 * timeit(sample, timer=time.perf_counter, number=1)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        timeit(sample, number=1)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def no_progress(text: str, done: int, steps: int) -> None:
    """Report nothing."""


def interleave(timers: Mapping[str, Callable[[], Any]], rounds: int, seed: int = 0,
               progress: Progress = no_progress) -> Iterator[Dict[str, Any]]:
    """Yield the samples of all timers per round, called in an order shuffled in each round."""
    shuffle, names = random.Random(seed).shuffle, list(timers)
    for i in range(rounds):
        shuffle(names)
        samples = {}
        for name in names:
            progress(f'round {i + 1}: {name}', i * len(names) + len(samples), rounds * len(names))
            samples[name] = timers[name]()
        yield samples


def speed_up(samples: Sequence[float], of_baseline: Sequence[float]) -> float:
    """Return the median over rounds of the baseline's time divided by the other's time."""
    return float(np.median(np.divide(of_baseline, samples)))


def matmul(dtype: torch.dtype, device: str, size: int) -> Call:
    """Return a product of two matrices of ``size`` x ``size``: 2 * size ** 3 FLOP."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b


def peak_bytes(call: Call, device: str = 'cpu') -> int:
    """Return the peak of torch's allocator during a call, minus what was allocated before.

    Weights and inputs exist before. Buffers that libraries allocate outside of torch (oneDNN's
    scratch, cuDNN's handles) are not counted.
    """
    if device == 'cuda':
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the profiler's advice on several steps
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            call()
    # Allocations and frees in the order of time.
    events = [event for event in profiled.profiler.kineto_results.events()
              if event.name() == '[memory]']
    events.sort(key=_start)
    return max(accumulate(event.nbytes() for event in events), default=0)


def _start(event) -> int:
    return event.start_ns() if hasattr(event, 'start_ns') else event.start_us()  # torch 2.1


def kept_bytes(forward: Call, without: Iterable[Tensor] = ()) -> int:
    """Return the bytes that ``forward`` keeps for its backward, each storage counted once.

    Args:
        without: Tensors that are not counted: the network's parameters and buffers.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    kept: Dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()  # keeps the graph alive, so that no storage is reused
    del outputs
    return sum(kept.values())


def cpu_name() -> str:
    """Return the processor's name, on Linux from /proc/cpuinfo."""
    try:
        with open('/proc/cpuinfo') as lines:
            return next(line.partition(':')[2].strip() for line in lines
                        if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
