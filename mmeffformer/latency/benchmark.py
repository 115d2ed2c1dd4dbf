"""Benchmark of candidates, interleaved in rounds, as a table and as a plot."""
import re
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from ..models import ARCHS
from ..utils.plots import Mark
from ..utils.stopwatch import POST_PROCESSING, REST, Stopwatch
from . import whole
from .building import build, set_tf32
from .candidates import DTYPES, RUNTIMES, TIMM, Candidate, Setting
from .exported import LEAST_CALLS
from .results import (
    Results,
    TimerEntry,
    build_all,
    header,
    machine,
    product_flops,
    time_rounds,
    title,
)
from .timing import Progress, Timer, matmul, no_progress, speed_up, spread

MATRIX_SIZE = {'cpu': 2048, 'cuda': 8192}
MIB = 2 ** 20
FIRST = ('backbone', 'neck')  # parts, in the order of their columns
NONE = '–'
# Prefixes of this project's configs
HEADS = {'maskrcnn_': 'Mask R-CNN ', 'semfpn_': 'Semantic FPN ', 'rtmdet-ins_': 'RTMDet-Ins '}
LEGEND = '× MODEL: speed-up over that model, the median over rounds.'
PARTS_LEGEND = 'Median ms of each part of a whole model, without the parts inside it.'
Panels = Dict[Tuple[str, str], List[Mark]]


def run(chosen: Sequence[Candidate], baselines: Sequence[Candidate], setting: Setting,
        rounds: int, seed: int, out: Path, progress: Progress = no_progress) -> Results:
    """Build all candidates, then time them in rounds; return the results.

    ``results.json`` in the folder ``out`` is written after building and after every round. A
    candidate that fails is in the results with the reason. Ctrl-C ends the rounds early.

    Args:
        baselines: Candidates that all are compared with; they are timed too.
    """
    order = list(dict.fromkeys([*chosen, *baselines]))
    results = dict(header=header(setting, rounds, seed), baselines=list(map(str, baselines)),
                   matrix_product={}, candidates=[])
    timers: List[TimerEntry] = []
    with tempfile.TemporaryDirectory() as folder:

        def add(candidate: Candidate, entry: Dict[str, Any]):
            builder = whole.build if candidate.is_whole else build
            built = builder(candidate, setting.for_candidate(candidate), Path(folder))
            entry.update(built._asdict(), parts_ms=[])
            del entry['call'], entry['stopwatch']
            timer: Callable = Timer(built.call, setting.device,
                                    least_calls=LEAST_CALLS.get(candidate.runtime, 1))
            if built.stopwatch:
                timer = _timer_of_parts(timer, built.stopwatch, entry['parts_ms'])
            timers.append((entry['name'], timer, entry['samples_ms']))

        build_all(results, order, add, progress)
        used = {entry['dtype'] for entry in results['candidates'] if not entry['error']}
        for dtype in [name for name in DTYPES if name in used]:
            size, samples = MATRIX_SIZE[setting.device], []
            results['matrix_product'][dtype] = dict(size=size, samples_ms=samples)
            product = Timer(set_tf32(matmul(DTYPES[dtype], setting.device, size), dtype),
                            setting.device)
            timers.append((f'matrix product, {dtype}', product, samples))
        time_rounds(results, timers, out, progress)
        timers.clear()  # before the exported files are deleted
    return results


def _timer_of_parts(timer: Timer, stopwatch: Stopwatch, samples: List[Dict[str, float]]
                    ) -> Callable[[], float]:
    """Return a timer that also appends the ms of each part, which sum to its sample."""

    def sample() -> float:
        stopwatch.take()
        ms, parts = timer(), stopwatch.take()
        whole_ms = sum(parts.values())  # of all repetitions
        samples.append({name: ms * part / whole_ms for name, part in parts.items()})
        return ms

    return sample


def parts_table(results: Results) -> Optional[Tuple[List[str], List[List[str]]]]:
    """Return columns and rows of the median ms of the parts of whole models, None without any."""
    entries = [entry for entry in results['candidates']
               if entry.get('parts_ms') and entry['samples_ms']]
    names = list(dict.fromkeys(name for entry in entries for name in entry['parts_ms'][0]))
    names.sort(key=lambda name: (name == REST, name == POST_PROCESSING,
                                 name not in FIRST, name))
    rows = [[entry['name'], *(
        format_ms(spread([parts[name] for parts in entry['parts_ms']]).median)
        if name in entry['parts_ms'][0] else NONE for name in names)] for entry in entries]
    return (['ms of', *names], rows) if rows else None


def table(results: Results) -> Tuple[List[str], List[List[str]]]:
    """Return the columns, and one row of texts per candidate, failed ones included."""
    train, entries = results['header']['mode'] == 'train', results['candidates']
    samples = {entry['name']: entry['samples_ms'] for entry in entries}
    columns = ['model', 'ms', 'quartiles', *(f'× {name}' for name in results['baselines'])]
    columns += ['kept for backward, MiB'] if train else ['GMACs', 'of matrix product']
    columns += ['peak, MiB', 'params, M', 'remark']
    rows = []
    for entry in entries:
        if not entry['samples_ms']:
            why = entry['error'] or 'no round was finished'
            rows.append([entry['name'], 'failed', *[NONE] * (len(columns) - 3),
                         ' '.join(why.split())[:160]])
            continue
        time = spread(entry['samples_ms'])
        cells = [entry['name'], format_ms(time.median),
                 f'{format_ms(time.q1)}–{format_ms(time.q3)}']
        cells += [f'{speed_up(entry["samples_ms"], samples[name]):.2f}' if samples[name] else NONE
                  for name in results['baselines']]
        cells += [_mib(entry['kept_bytes'])] if train else _macs(results, entry, time.median)
        rows.append([*cells, _mib(entry['peak_bytes']), f'{entry["params"] / 1e6:.1f}',
                     entry['remark']])
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return columns, rows


def _macs(results: Results, entry: Mapping[str, Any], ms: float) -> List[str]:
    """Return GMACs, and the rate as a share of the matrix product's."""
    if entry['macs'] is None:
        return [NONE, NONE]
    rate = 2e3 * entry['macs'] * results['header']['batch'] / ms  # FLOP/s
    share = (f'{rate / product_flops(results, entry["dtype"]):.0%}'
             if entry['dtype'] in results['matrix_product'] else NONE)
    return [f'{entry["macs"] / 1e9:.2f}', share]


def format_ms(ms: float) -> str:
    """Return ms with three digits, or more if they are 1000 or more."""
    return f'{ms:.0f}' if ms >= 100 else f'{ms:.3g}'


def _mib(size: Optional[int]) -> str:
    return NONE if size is None else f'{size / MIB:.0f}'


def network_name(model: str) -> str:
    """Return a candidate's network as config names have it, for example 'effformerv2_s0'.

    Of a whole model it is the config's name, for example 'maskrcnn_effformerv2_s0'.
    """
    if model.endswith('.py'):
        return Path(model).stem
    if model.startswith(TIMM):  # the suffix after a dot names weights
        return model[len(TIMM):].partition('.')[0].replace('efficientformer', 'effformer')
    return f'effformer{"" if model in ARCHS else "v2"}_{model}'


def tradeoff(results: Results, accuracy: Mapping[str, str], metric: str) -> Panels:
    """Return marks of accuracy against time, one panel per runtime and precision.

    Args:
        results: Of an inference benchmark.
        accuracy: Published figure as printed by candidate's model; ' ?' after it marks an
            unconfirmed one. Models without a figure are left out.
        metric: Name and unit of the figures.
    """
    panels: Panels = {}
    for entry in results['candidates']:
        figure, _, doubt = accuracy.get(entry['model'], '').partition(' ')
        if not figure or not entry['samples_ms']:
            continue
        time, is_whole = spread(entry['samples_ms']), entry['model'].endswith('.py')
        family, label = _family(entry['model'])
        is_port = entry['model'].startswith(TIMM) and family.startswith('Efficient')
        remarks = ', '.join([*['timm'] * is_port, *entry['variants']])
        panel = (f'{RUNTIMES[entry["runtime"]]}, {entry["dtype"]}{", whole models" * is_whole}',
                 f'{metric}\npublished by the authors, not measured')
        panels.setdefault(panel, []).append(Mark(
            f'{label} {doubt}'.strip(), family + (f' ({remarks})' if remarks else ''),
            time.median, float(figure), None, (time.q1, time.q3)))
    return panels


def _family(model: str) -> Tuple[str, str]:
    """Return the family of a candidate's model, and its name within the family."""
    library, _, _ = model.rpartition('::')
    name = network_name(model)
    if library:  # without the schedule, such as _8xb32-300e_coco or _1x_coco
        kind, _, label = re.split(r'_(?:\d+xb\d+|\d+x|amp)[-_]', name)[0].partition('_')
        return f'{library} {kind}', label.replace('_', ' ')
    head = ''
    for prefix, text in HEADS.items():
        if name.startswith(prefix):
            head, name = text, name[len(prefix):]
    family, label = re.fullmatch(r'(.+?)_?((?<=_)\w+|\d*)', name).groups()
    family = head + family.replace('effformer', 'EfficientFormer').replace('v2', 'V2')
    return family, label.upper().replace('_', ' ')


def caption(results: Results, has_levels: bool = False) -> str:
    """Return a caption for the plot.

    Args:
        has_levels: The plot has dashed lines of networks that are not measured.
    """
    levels = ' Dashed: published for networks whose time is not measured.' * has_levels
    return (f'Accuracy: published by the authors of each network, not measured here.{levels}\n'
            f'Time: {title(results).lower()}, measured on {machine(results)}; bars are quartiles; '
            'the grey line is the Pareto front.')
