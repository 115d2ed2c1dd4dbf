"""Measurement of a latency table, and of whole networks at the speed of a table.

An entry is what a part takes within a network:

- The weights of a network come from memory, since they do not fit into the caches; activations
  come from the layer before. Therefore a chain of blocks with separate weights is timed and
  divided by their number. Stems and embeddings change the grid: their copies run in parallel.
- The cost of a call beyond its parts (its start, first use of buffers, outputs) is the entry
  'overhead': the time of shallow networks minus their parts.
- The machine's speed drifts. A reference network is timed in every round. An entry is the median
  over rounds of its time divided by the reference's, times ``reference_ms`` of the header: the
  reference's time when the machine was fastest. So entries measured at different times agree.
"""
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Sequence, Union

import numpy as np
import torch

from ..models.arch import ARCHS, STAGES, Arch
from . import results, timing
from .building import BIAS_GRID
from .candidates import Setting
from .exported import FILES, HALF, PACKAGES
from .parts import Size, copies, grid, open_network, open_part, part_bytes
from .table import EXPANSION, OVERHEAD, LatencyTable, Part, parts, parts_of, widths_of
from .timing import Progress, Spread, Timer, interleave, no_progress, spread

RUNTIMES = ('pytorch', *FILES)
BATCHES = {'tensorrt': 64}  # as in the paper; a table's ms are of the whole batch
REFERENCE = Arch((32, 64, 160, 256), (2, 2, 4, 3), (0, 0, 0, 1))
GROUP, GROUP_BYTES = 8, 3 * 2 ** 30  # parts timed together, and the memory that they may use
UNSTEADY, TRIES = .25, 3  # quartiles this far apart, relative to the median, mean a disturbance
NOT_SETTINGS = ('date', 'reference_ms')

Timers = Mapping[str, Callable[[], float]]
Entry = Dict[str, Any]


def new_header(runtime: str = 'pytorch', shape: Size = (224, 224), threads: int = 1,
               max_widths: Sequence[int] = ARCHS['l3'].widths, step: int = 16, rounds: int = 7
               ) -> Dict[str, Any]:
    """Return the header of a table to be measured on this machine.

    Raises:
        ValueError: An argument is out of range.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f'runtime {runtime!r}: expected one of {", ".join(RUNTIMES)}')
    if rounds < 1:
        raise ValueError(f'rounds {rounds}: expected 1 or more')
    if step < 2 or step % 2:
        raise ValueError(f'step {step}: expected an even number, as the stem starts with half '
                         'of the first width')
    max_widths = list(max_widths)
    if len(max_widths) != STAGES or any(n < step or n % step for n in max_widths):
        raise ValueError(f'max-widths {" ".join(map(str, max_widths))}: expected {STAGES} '
                         f'multiples of {step}')
    setting = Setting(tuple(shape), BATCHES.get(runtime, 1), threads,
                      'cuda' if runtime == 'tensorrt' else 'cpu')
    here = results.header(setting, rounds, 0)
    packages = ['Python', 'torch', *PACKAGES[runtime][1:], 'mmeffformer']
    return dict(
        unit='ms', device=here['gpu'] or here['cpu'], cores=here['cores'], runtime=runtime,
        versions={name: here['versions'][name] for name in packages},
        precision='fp16' if runtime in HALF else 'fp32', threads=threads,
        batch=setting.batch, shape=list(shape), warm_ups=timing.WARM_UPS, rounds=rounds,
        expansion=EXPANSION, bias_grid=BIAS_GRID, max_widths=max_widths, step=step,
        reference=[list(REFERENCE.widths), list(REFERENCE.depths),
                   list(REFERENCE.attention_blocks)],
        reference_ms=None, date=here['date'])


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> List[str]:
    """Return the settings in which two headers differ, so that their figures do not compare."""
    return [f'{name} {old.get(name)} there, {new.get(name)} here'
            for name in dict.fromkeys([*old, *new])
            if name not in NOT_SETTINGS and old.get(name) != new.get(name)]


def open_table(path: Union[str, Path], header: Mapping[str, Any]) -> LatencyTable:
    """Return the table in ``path``, to resume it, or a new one if the file does not exist.

    Raises:
        ValueError: The file is not a latency table, or was measured with other settings.
    """
    if not Path(path).exists():
        return LatencyTable(header)
    table = LatencyTable.load(path)
    found = differences(table.header, header)
    if found:
        raise ValueError(f'{path} was measured with other settings: {"; ".join(found)}. Choose '
                         'another --out, or the arguments of that file')
    return table


def measure(table: LatencyTable, path: Union[str, Path], progress: Progress = no_progress) -> None:
    """Measure the missing entries of a table, and save it after every group of parts.

    An interrupted measurement loses its current group; calling again measures the rest.

    Args:
        table: Table of :func:`open_table`.
        path: File to save to.
    """
    count = len(parts_of(table.header))
    todo = [part for part in table.missing() if part.kind != OVERHEAD]
    if not table.missing():
        return
    table.check = None  # of the incomplete table
    with tempfile.TemporaryDirectory() as folder:
        progress('reference', count - len(table.missing()), count)
        reference = reference_timer(table.header, Path(folder))
        calibrate(table, reference)
        for group in group_parts(todo, table.header['shape']):
            progress(f'{group[0]} to {group[-1]}', count - len(table.missing()), count)
            table.entries.update(measure_parts(group, table.header, reference))
            calibrate(table, reference)
            table.save(path)
        if table.missing():
            progress(OVERHEAD, count - 1, count)
            table.entries[OVERHEAD] = measure_overhead(table, reference)
            table.save(path)
        del reference  # before its file is deleted
    progress('measured', count, count)


def calibrate(table: LatencyTable, reference: Callable[[], float]) -> None:
    """Scale the table to the fastest speed seen, which a busy start would otherwise hide."""
    ms, old = (spread([reference() for _ in range(table.header['rounds'])]).median,
               table.header['reference_ms'])
    if old is None or ms < old:
        table.header['reference_ms'] = ms
        for found in table.entries.values():
            found.update({name: found[name] * ms / old for name in ('ms', 'q1', 'q3')})


def group_parts(todo: Sequence[Part], shape: Size) -> Iterator[List[Part]]:
    """Yield groups of parts of one kind and stage, which fit into memory together."""
    group: List[Part] = []
    for part in todo:
        size = sum(copies(each, shape) * part_bytes(each, shape) for each in [*group, part])
        if group and (len(group) == GROUP or size > GROUP_BYTES
                      or (part.kind, part.stage) != (group[0].kind, group[0].stage)):
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def reference_timer(header: Mapping[str, Any], folder: Path) -> Callable[[], float]:
    """Return the timer of the reference network; set torch's threads to the table's."""
    torch.set_num_threads(header['threads'])
    widths, depths, attention = header['reference']
    return Timer(open_network(Arch(widths, depths, attention), header, folder))


def time_steadily(timers: Timers, reference: Callable[[], float], header: Mapping[str, Any],
                  rounds: int, progress: Progress = no_progress) -> Dict[str, Spread]:
    """Return the ms of each timer at the table's speed, timed interleaved with the reference.

    A timer whose quartiles show a disturbance is timed again; its steadiest result counts.
    """
    best: Dict[str, Spread] = {}
    pending = list(timers)
    for _ in range(TRIES):
        calls = {**{name: timers[name] for name in pending}, 'reference': reference}
        found = [*interleave(calls, rounds, progress=progress)]
        factors = [header['reference_ms'] / samples['reference'] for samples in found]
        for name in pending:
            ms = spread(np.multiply(factors, [samples[name] for samples in found]))
            if name not in best or ms.unsteadiness < best[name].unsteadiness:
                best[name] = ms
        pending = [name for name in pending if best[name].unsteadiness > UNSTEADY]
        if not pending:
            break
    return best


def measure_parts(group: Sequence[Part], header: Mapping[str, Any],
                  reference: Callable[[], float]) -> Dict[str, Entry]:
    """Return the entries of some parts, interleaved with each other and the reference."""
    with tempfile.TemporaryDirectory() as folder:
        timers, counts = {}, {}
        for part in group:
            call, counts[str(part)] = open_part(part, header, Path(folder))
            timers[str(part)] = Timer(call)
        found = time_steadily(timers, reference, header, header['rounds'])
        timers.clear()  # before the files are deleted
        del call
    return {str(part): entry(part, found[str(part)], header['shape'], counts[str(part)])
            for part in group}


def entry(part: Part, found: Spread, shape: Size, count: int = 1) -> Entry:
    """Return the entry of a part, from the time of ``count`` copies."""
    return dict(kind=part.kind, stage=part.stage + 1, widths=list(part.widths),
                grid=list(grid(part.stage, shape)), copies=count,
                **{name: ms / count for name, ms in zip(('ms', 'q1', 'q3'), found)})


def overhead_archs(header: Mapping[str, Any]) -> List[Arch]:
    """Return networks with one block per stage, narrow to wide."""
    return [Arch(tuple(widths[round(share * (len(widths) - 1))] for widths in widths_of(header)),
                 (1, ) * STAGES, (0, 0, 0, 1)) for share in (.25, .5, .75)]


def measure_overhead(table: LatencyTable, reference: Callable[[], float]) -> Entry:
    """Return the entry of a network's time beyond its parts, the median of a few networks."""
    header, archs = table.header, {str(i): arch
                                   for i, arch in enumerate(overhead_archs(table.header))}
    found = time_networks(archs, header, header['rounds'], reference)
    beyond = [found[name].median
              - sum(table.part_ms(part) for part in parts(arch) if part.kind != OVERHEAD)
              for name, arch in archs.items()]
    return entry(Part(OVERHEAD), spread(beyond), header['shape'])


def time_networks(archs: Mapping[str, Arch], header: Mapping[str, Any], rounds: int,
                  reference: Callable[[], float], progress: Progress = no_progress
                  ) -> Dict[str, Spread]:
    """Return the ms of backbones by name, at the table's speed."""
    with tempfile.TemporaryDirectory() as folder:
        timers = {}
        for i, (name, arch) in enumerate(archs.items()):
            progress(f'building {name}', i, len(archs))
            timers[name] = Timer(open_network(arch, header, Path(folder)))
        found = time_steadily(timers, reference, header, rounds, progress)
        timers.clear()  # before the files are deleted
    return found


def measure_networks(archs: Mapping[str, Arch], header: Mapping[str, Any], rounds: int,
                     progress: Progress = no_progress) -> Dict[str, Spread]:
    """Measure backbones, interleaved, at the speed of a table; return ms by name.

    Args:
        archs: By name, of any widths.
        header: Header of the table.
        rounds: Samples of each.

    Raises:
        ValueError: The table is of another machine, or of other versions.
    """
    here = new_header(header['runtime'], header['shape'], header['threads'],
                      header['max_widths'], header['step'], header['rounds'])
    found = differences(header, here)
    if found:
        raise ValueError(f'the table was measured with other settings: {"; ".join(found)}. Its '
                         'figures do not compare with this machine; make a table here')
    threads = torch.get_num_threads()
    try:
        with tempfile.TemporaryDirectory() as folder:
            reference = reference_timer(header, Path(folder))
            measured = time_networks(archs, header, rounds, reference, progress)
            del reference  # before its file is deleted
    finally:
        torch.set_num_threads(threads)
    return measured
