"""Where the time of a network goes, by kind of operator.

Section 3 of the EfficientFormer paper (https://arxiv.org/abs/2206.01191) asks this of phones.

What a call takes beyond its operators is a kind of its own, so that kinds sum up to the call. As
profiling takes time too, each round also times the network without it, and both are reported.
ONNX Runtime's profiler takes so long for each operator that it would distort networks of many
small ones: what it takes is measured in the same rounds, on a chain of convolutions that take
next to nothing, and taken off; how much that was is reported as well.
"""
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from torch import nn

from ..deploy.runtimes import SUFFIXES, require
from . import benchmark, observations
from .candidates import (
    FILES,
    OPEN,
    Candidate,
    Setting,
    make,
    prepare,
    write_file,
    write_graph,
)
from .profilers import BETWEEN, KINDS, PROFILERS, Modules, Sample, TorchProfiler, by_kind
from .timing import Call, Timer, interleave

RUNTIMES = ('pytorch', *FILES)  # those with a profiler
TOLERANCE = .1  # of the sum of all kinds, relative to the time without a profiler
MIN_MS = 100.  # of a sample, in which calls are repeated


def profiled(network: nn.Module, candidate: Candidate, setting: Setting, folder: Path
             ) -> Tuple[Modules, Call, Any]:
    """Return the modules of a network, a call of it, and the profiler of another such call.

    Args:
        network: As of :func:`make`.
        folder: Where exported files go, which may be deleted when nothing runs any more.

    Raises:
        ValueError: The runtime has no profiler, or its package is missing.
        Exception: Anything that a network or a runtime fails with.
    """
    check(candidate)
    torch.set_num_threads(setting.threads)
    network.eval()
    torch.manual_seed(0)
    image = torch.randn(setting.batch, 3, *setting.shape)
    modules = Modules(network, image)
    if candidate.runtime not in FILES:
        call = torch.no_grad()(prepare(network, candidate, setting, image))
        call()  # fills caches
        return modules, call, TorchProfiler(network, call)
    path = folder / f'{len([*folder.iterdir()])}{SUFFIXES[candidate.runtime]}'
    write_file(network, candidate, setting.shape, path)
    return (modules, OPEN[candidate.runtime](path, image, setting.threads),
            PROFILERS[candidate.runtime](path, image, setting.threads, modules))


def check(candidate: Candidate):
    """Raise a ValueError where a candidate cannot be profiled."""
    if candidate.runtime not in RUNTIMES:
        raise ValueError(f'{candidate}: {candidate.runtime} does not tell the time of each '
                         f'operator; choose from {", ".join(RUNTIMES)}')
    require_packages(candidate.runtime)


def require_packages(runtime: str):
    """Raise a ValueError where a package that profiling takes is missing."""
    if runtime in FILES:
        require('onnx', runtime)
        require({'onnx': 'onnxruntime'}.get(runtime, runtime), runtime)


# Measuring -----------------------------------------------------------------------------------


class Overhead(NamedTuple):
    """What a profiler takes for each operator, ms: counted as the operator's, and after it."""

    within: float = 0.
    between: float = 0.

    def taken_off(self, kinds: Mapping[str, float], counts: Mapping[str, int]
                  ) -> Dict[str, float]:
        """Return kinds, ms, without it. ``counts`` are the operators of each kind."""
        rest = {kind: ms - self.within * counts.get(kind, 0) for kind, ms in kinds.items()}
        rest[BETWEEN] -= self.between * sum(counts.values())
        return rest


CHAIN, CHAIN_LENGTH = 'a chain of 1 x 1 convolutions of one pixel', 300


def chain(folder: Path, threads: int) -> '_InTurns':
    """Return what times such a chain, for ONNX Runtime, with its profiler and without."""
    image = torch.zeros(1, 8, 1, 1)
    network = nn.Sequential(*(nn.Conv2d(8, 8, 1) for _ in range(CHAIN_LENGTH))).eval()
    path = folder / 'chain.onnx'
    write_graph(network, image, 'onnx', path)
    return _InTurns(OPEN['onnx'](path, image, threads),
                    PROFILERS['onnx'](path, image, threads, Modules(nn.Tanh(), image)),
                    min_ms=1.)  # which are thousands of operators, each a line in the profile


def overhead(turns: '_InTurns', samples: Sequence[Sample]) -> Overhead:
    """Return what the profiler took for each operator of the chain, medians over rounds."""
    count = len(samples[0].operators)  # changes of layout among them
    plain = np.median(turns.plain_ms) / count
    whole = np.median([sample.whole_ms for sample in samples]) / count
    within = np.median([sample.whole_ms - sample.between_ms for sample in samples]) / count
    # What the operator itself takes is less than what it takes in the chain without a profiler.
    return Overhead(float(max(within - plain, 0.)), float(max(whole - max(within, plain), 0.)))


class _InTurns:
    """Times a call without its profiler and with it, the one or the other first."""

    def __init__(self, call: Call, profiler, min_ms: float = MIN_MS):
        self.timer, self.profiler, self.plain_ms = Timer(call, min_ms=min_ms), profiler, []
        profiler(1)  # warms up

    def __call__(self) -> float:
        turns = [self._plain, self._profiled]
        for turn in turns if len(self.plain_ms) % 2 else turns[::-1]:
            turn()
        return self.plain_ms[-1]

    def _plain(self):
        self.plain_ms.append(self.timer())

    def _profiled(self):
        self.profiler(self.timer.repeats)


def run(chosen: Sequence[Candidate], setting: Setting, rounds: int, seed: int, out: Path,
        progress: benchmark.Report = lambda *_: None) -> Dict[str, Any]:
    """Profile all candidates, in rounds; return the results.

    ``results.json`` is written into the folder ``out``. A candidate that fails is in the
    results, with the reason. Ctrl-C ends the rounds early.

    Args:
        progress: Is told what is done now, the steps done and all steps.
    """
    results = dict(header=benchmark.header(setting, rounds, seed), kinds=list(KINDS),
                   matrix_product={}, candidates=[], observations=[])
    turns: Dict[str, _InTurns] = {}
    found: Dict[str, Tuple[Dict[str, Any], Modules]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, candidate in enumerate(dict.fromkeys(chosen)):
            progress(f'building {candidate}', i, len(chosen))
            entry = dict(name=str(candidate), model=candidate.model, runtime=candidate.runtime,
                         remark='', error=None, whole_ms=[], profiled_ms=[], taken_off_ms=0.,
                         kinds={}, operators=[])
            results['candidates'].append(entry)
            try:
                network, entry['remark'] = make(candidate, setting.shape)
                modules, call, profiler = profiled(network, candidate, setting, Path(folder))
                turns[str(candidate)] = _InTurns(call, profiler)
                found[str(candidate)] = entry, modules
            except Exception as error:  # whatever it is, the others go on
                entry['error'] = f'{type(error).__name__}: {error}'
        if any(entry['runtime'] == 'onnx' for entry, _ in found.values()):
            turns[CHAIN] = chain(Path(folder), setting.threads)
        try:
            for i, sample in enumerate(interleave(turns, rounds, seed)):
                progress(f'round {sample.round + 1}: {sample.name}', i, rounds * len(turns))
                results['header']['rounds_done'] = (i + 1) // len(turns)
        except KeyboardInterrupt:
            results['header']['interrupted'] = True
        done = results['header']['rounds_done']
        costs = {}
        if done and CHAIN in turns:
            costs['onnx'] = overhead(turns[CHAIN], turns[CHAIN].profiler.collect()[1:done + 1])
        results['profiler_ms_per_operator'] = {key: cost._asdict() for key, cost in costs.items()}
        for name, (entry, modules) in found.items():
            try:
                _summarise(entry, modules, turns[name].profiler.collect()[1:done + 1],
                           costs.get(entry['runtime'], Overhead()))
            except RuntimeError as error:  # what was profiled does not fit together
                entry['error'] = f'{type(error).__name__}: {error}'
            else:
                entry['whole_ms'] = turns[name].plain_ms[:done]
        turns.clear()  # before the exported files are deleted
    benchmark.save(results, out)
    return results


def _summarise(entry: Dict[str, Any], modules: Modules, samples: Sequence[Sample],
               cost: Overhead):
    """Put the ms of each round into an entry, what the profiler takes taken off."""
    if not samples:
        return
    kinds = modules.kinds(samples[0].operators)
    counts = Counter(kinds)
    sums = [cost.taken_off(by_kind(modules, sample), counts) for sample in samples]
    entry['kinds'] = {kind: [each[kind] for each in sums] for kind in KINDS}
    entry['profiled_ms'] = [sample.whole_ms for sample in samples]
    entry['taken_off_ms'] = sum(cost) * len(kinds)
    medians_ms = np.median([[ran.ms for ran in sample.operators] for sample in samples], 0)
    entry['operators'] = [dict(type=ran.type, module=ran.scope, kind=kind, ms=round(ms, 5))
                          for ran, kind, ms in zip(samples[0].operators, kinds, medians_ms)]


# Reporting -----------------------------------------------------------------------------------


def load(out: Path) -> Dict[str, Any]:
    """Return what :func:`run` wrote, see :func:`mmeffformer.latency.benchmark.load`."""
    return benchmark.load(out, 'tools/latency_profile.py', 'kinds')


def medians(entry: Mapping[str, Any]) -> Dict[str, float]:
    """Return the ms of each kind, the median over rounds."""
    return {kind: float(np.median(samples)) for kind, samples in entry['kinds'].items()}


def ratio(entry: Mapping[str, Any]) -> float:
    """Return the sum of all kinds by the time without a profiler, the median over rounds."""
    sums = np.sum([*entry['kinds'].values()], 0)
    return float(np.median(sums / np.array(entry['whole_ms'])))


def table(results: Dict[str, Any]) -> Tuple[List[str], List[List[str]]]:
    """Return the columns, and a row of texts for each candidate, by runtime."""
    columns = ['model', *KINDS, 'sum', 'whole', 'ratio', 'taken off']
    rows = []
    for entry in sorted(results['candidates'], key=lambda entry: RUNTIMES.index(entry['runtime'])):
        if entry['error'] or not entry['whole_ms']:
            why = ' '.join((entry['error'] or 'no round was finished').split())[:160]
            rows.append([entry['name'], f'failed: {why}', *[''] * (len(columns) - 2)])
            continue
        kinds, off = medians(entry), abs(ratio(entry) - 1) > TOLERANCE
        total = sum(kinds.values())
        rows.append([entry['name'], *(
            f'{ms:.2f} ({ms / total:.0%})' if abs(ms) >= .005 else '–' for ms in kinds.values()),
            f'{total:.1f}', f'{np.median(entry["whole_ms"]):.1f}',
            f'{ratio(entry):.2f}{" !" if off else ""}',
            f'{entry["taken_off_ms"]:.1f}' if entry['taken_off_ms'] else '–'])
    return columns, rows


NOTES = (
    'ms, and share of the sum; medians over rounds. whole: as timed without a profiler. !: the '
    'sum is off from it by more than 10 %.',
    'taken off: what the profiler takes for as many convolutions of one pixel.',
    'What a runtime fuses into a convolution or a linear layer is part of its time.')


def markdown(results: Dict[str, Any]) -> str:
    """Return the tables with all that is needed to understand them."""
    lines = [f'### {benchmark.title(results)}', '',
             *(f'- {line}' for line in benchmark.about(results)), '']
    if results['candidates']:
        lines += [*_rows(*table(results)), '', *NOTES, '']
    if results['observations']:
        lines += [*_rows(*observations.table(results)), '', observations.NOTE, '']
    return '\n'.join(lines)


def _rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> List[str]:
    texts = [columns, ['---'] + ['---:'] * (len(columns) - 1), *rows]
    return [f'| {" | ".join(text.replace("|", "/") for text in row)} |' for row in texts]


def bars(results: Dict[str, Any]) -> Dict[str, Dict[str, Tuple[Dict[str, float], float]]]:
    """Return, by runtime and model, the ms of each kind and those without a profiler."""
    found: Dict[str, Dict[str, Tuple[Dict[str, float], float]]] = {}
    for entry in results['candidates']:
        if entry['whole_ms']:
            found.setdefault(entry['runtime'], {})[entry['name'].replace(
                f':{entry["runtime"]}', '')] = medians(entry), float(np.median(entry['whole_ms']))
    return found
