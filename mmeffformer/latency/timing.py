"""Times of calls that are to be compared, and the memory that a call takes.

A machine is not as fast at noon as it was at ten: clocks and neighbours change. What is to be
compared is therefore timed in turns, each call once in every round, in shuffled order, and
compared within rounds.
"""
import gc
import math
import platform
import random
import time
import warnings
from itertools import accumulate
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Any]

MIN_MS = 20.  # what is faster is repeated, for the clock and the caches


class Spread(NamedTuple):
    """Median and quartiles of some samples, in their unit."""

    median: float
    q1: float
    q3: float


def spread(samples: Sequence[float]) -> Spread:
    return Spread(*map(float, np.percentile(samples, (50, 25, 75))))


class Timer:
    """Takes the time of a call, which it warms up first.

    Calling the timer returns one sample: ms per call. A call shorter than ``min_ms`` is
    repeated for it, after one that does not count, as the caches are then another's.

    Args:
        call: What is timed. On a GPU it need not wait for its results.
        device: 'cpu' or 'cuda'.
        warm_ups: Calls before any that counts, at least one.
        min_ms: How long the calls of a sample take together, at least.
    """

    def __init__(self, call: Call, device: str = 'cpu', warm_ups: int = 2,
                 min_ms: float = MIN_MS):
        self.call, self.device, self.repeats = call, device, 1
        for _ in range(warm_ups):
            ms = self._elapsed_ms()
        self.repeats = max(1, math.ceil(min_ms / max(ms, 1e-3)))

    def __call__(self) -> float:
        if self.repeats > 1:
            self.call()
        return self._elapsed_ms() / self.repeats

    def _elapsed_ms(self) -> float:
        collecting = gc.isenabled()
        gc.disable()
        try:
            if self.device == 'cuda':
                return self._elapsed_cuda_ms()
            start = time.perf_counter()
            for _ in range(self.repeats):
                self.call()
            return 1e3 * (time.perf_counter() - start)
        finally:
            if collecting:
                gc.enable()

    def _elapsed_cuda_ms(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(self.repeats):
            self.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


class Sample(NamedTuple):
    round: int  # from 0
    name: str
    ms: float


def interleave(timers: Mapping[str, Callable[[], float]], rounds: int, seed: int = 0
               ) -> Iterator[Sample]:
    """Yield a sample of each timer in every round, in an order shuffled anew each time."""
    shuffle, names = random.Random(seed).shuffle, list(timers)
    for i in range(rounds):
        shuffle(names)
        for name in names:
            yield Sample(i, name, timers[name]())


def speed_up(samples: Sequence[float], of_baseline: Sequence[float]) -> float:
    """Return the median over rounds of the baseline's time by the other's time."""
    return float(np.median(np.divide(of_baseline, samples)))


def matmul(dtype: torch.dtype, device: str, size: int) -> Call:
    """Return a product of two matrices of ``size`` x ``size``: 2 * size ** 3 FLOP."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b


def peak_bytes(call: Call, device: str = 'cpu') -> int:
    """Return how much torch's allocator held at most during a call, beyond what it held before.

    Weights and inputs exist before. Scratch that libraries allocate by themselves (oneDNN's,
    cuDNN's handles) is not seen.
    """
    if device == 'cuda':
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # what the profiler says of use over several steps
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
    """Return how much ``forward`` keeps for its backward: each storage once.

    Args:
        without: Tensors that exist anyway, the network's parameters and buffers.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    kept: Dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()  # holds the graph: as long as it lives, no storage is used again
    del outputs
    return sum(kept.values())


def cpu_name() -> str:
    """Return the processor's name as Linux tells it, elsewhere as Python does."""
    try:
        with open('/proc/cpuinfo') as lines:
            names: List[str] = [line.partition(':')[2].strip() for line in lines
                                if line.startswith('model name')]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
