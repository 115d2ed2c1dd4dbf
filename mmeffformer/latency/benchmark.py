"""Candidates timed side by side, and what was found as a table and as a plot.

Results are a dict that JSON can hold, written after every round; tables and plots are made of
that alone.
"""
import datetime
import json
import os
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch

from ..apis.report import Model, read_models
from ..models import ARCHS
from ..utils.files import atomic_write
from ..utils.plots import TimedMark
from .candidates import DTYPES, RUNTIMES, TIMM, Candidate, Setting, build
from .timing import Timer, cpu_name, interleave, matmul, speed_up, spread

MATRIX_SIZE = {'cpu': 2048, 'cuda': 8192}
PACKAGES = ('torch', 'torchvision', 'timm', 'onnxruntime', 'openvino', 'mmeffformer')
MIB = 2 ** 20
NONE = '–'


class Accuracy(NamedTuple):
    """A published figure: its name with the unit, and the metafiles' names of model and metric."""

    title: str
    model: str
    metric: str


ACCURACIES = {
    'top1': Accuracy('ImageNet-1K top-1, %', '{}', 'Top 1 Accuracy 300 Epochs'),
    'box_ap': Accuracy('Mask R-CNN 1x, COCO box AP, %', 'maskrcnn_{}', 'box AP'),
    'miou': Accuracy('Semantic FPN, ADE20K mIoU, %', 'semfpn_{}', 'mIoU'),
}

Report = Callable[[str, int, int], None]  # what is done, how much of it, of how much


# Measuring -----------------------------------------------------------------------------------


def run(chosen: Sequence[Candidate], baselines: Sequence[Candidate], setting: Setting,
        rounds: int, seed: int, out: Path, progress: Report = lambda *_: None) -> Dict[str, Any]:
    """Build all candidates, then time them in rounds; return the results.

    ``results.json`` in the folder ``out`` is written after building and after every round. A
    candidate that fails is in the results, with the reason. Ctrl-C ends the rounds early.

    Args:
        baselines: Those of the candidates that all are compared with.
        progress: Is told what is done now, the steps done and all steps.
    """
    order = list(dict.fromkeys([*chosen, *baselines]))
    results = dict(header=header(setting, rounds, seed), baselines=list(map(str, baselines)),
                   matrix_product={}, candidates=[])
    timers: Dict[str, Timer] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, candidate in enumerate(order):
            progress(f'building {candidate}', i, len(order))
            entry = dict(name=str(candidate), model=candidate.model, runtime=candidate.runtime,
                         dtype=candidate.dtype, variants=list(candidate.variants),
                         error=None, samples_ms=[])
            results['candidates'].append(entry)
            try:
                built = build(candidate, setting, Path(folder))
                timers[str(candidate)] = Timer(built.call, setting.device)
            except Exception as error:  # whatever it is, the others go on
                entry['error'] = f'{type(error).__name__}: {error}'
                continue
            entry.update(built._asdict())
            del entry['call']
        _time(results, timers, setting, rounds, seed, out, progress)
        timers.clear()  # before the exported files are deleted
    return results


def _time(results: Dict[str, Any], timers: Dict[str, Timer], setting: Setting, rounds: int,
          seed: int, out: Path, progress: Report):
    entries = {entry['name']: entry for entry in results['candidates']}
    size = MATRIX_SIZE[setting.device]
    used = {entries[name]['dtype'] for name in timers}
    for dtype in DTYPES:
        if dtype not in used:
            continue
        name = f'matrix product, {dtype}'
        timers[name] = Timer(matmul(DTYPES[dtype], setting.device, size), setting.device)
        entries[name] = results['matrix_product'][dtype] = dict(size=size, samples_ms=[])
    save(results, out)
    try:
        pending = {}
        for i, sample in enumerate(interleave(timers, rounds, seed)):
            progress(f'round {sample.round + 1}: {sample.name}', i, rounds * len(timers))
            pending[sample.name] = sample.ms
            if len(pending) == len(timers):  # whole rounds only, for comparing within them
                for name, ms in pending.items():
                    entries[name]['samples_ms'].append(ms)
                results['header']['rounds_done'] = sample.round + 1
                save(results, out)
                pending.clear()
    except KeyboardInterrupt:
        results['header']['interrupted'] = True
        save(results, out)


def header(setting: Setting, rounds: int, seed: int) -> Dict[str, Any]:
    """Return on what and how it is measured."""
    gpu = torch.cuda.get_device_name() if setting.device == 'cuda' else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return dict(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        cpu=cpu_name(), cores=cores, gpu=gpu, threads=setting.threads, device=setting.device,
        tf32=dict(convolutions=torch.backends.cudnn.allow_tf32,
                  matrix_products=torch.backends.cuda.matmul.allow_tf32) if gpu else None,
        versions=dict(Python=sys.version.split()[0],
                      **{name: _version(name) for name in PACKAGES}),
        mode='train' if setting.train else 'inference', shape=list(setting.shape),
        batch=setting.batch, rounds=rounds, rounds_done=0, seed=seed)


def _version(package: str) -> Optional[str]:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def save(results: Dict[str, Any], out: Path) -> Path:
    """Write ``results.json`` whole or not at all."""
    path = Path(out) / 'results.json'
    with atomic_write(path) as tmp_path:
        tmp_path.write_text(json.dumps(results, indent=1))
    return path


def load(out: Path, tool: str = 'tools/benchmark.py', *more: str) -> Dict[str, Any]:
    """Return what :func:`save` wrote.

    Args:
        tool: Whose results they have to be.
        more: Keys that these have besides ``header`` and ``candidates``.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: It is something else, or damaged.
    """
    path = Path(out) / 'results.json'
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist: expected what {tool} wrote')
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f'{path} is damaged: {error}') from error
    if not isinstance(results, dict) or not {'header', 'candidates', *more} <= {*results}:
        raise ValueError(f'{path} was not written by {tool}')
    return results


# Reporting -----------------------------------------------------------------------------------


def title(results: Dict[str, Any]) -> str:
    head = results['header']
    images = f'{head["batch"]} image{"s" if head["batch"] > 1 else ""}'
    what = 'a training step of' if head['mode'] == 'train' else 'inference of'
    return f'{what} {images} of {head["shape"][0]} x {head["shape"][1]} px'.capitalize()


def machine(results: Dict[str, Any]) -> str:
    head = results['header']
    cpu = f'{head["cpu"]}, threads: {head["threads"]} of {head["cores"]}'
    return f'{head["gpu"]} ({cpu})' if head['gpu'] else cpu


def about(results: Dict[str, Any]) -> List[str]:
    """Return lines that say on what and how it was measured."""
    head = results['header']
    lines = [
        f'{machine(results)}; {head["date"]}',
        ', '.join(f'{name} {number}' for name, number in head['versions'].items() if number),
        f'{head["rounds_done"]} of {head["rounds"]} rounds, each of all models in shuffled '
        f'order (seed {head["seed"]})',
    ]
    for dtype in results['matrix_product']:
        if head['rounds_done']:
            product = results['matrix_product'][dtype]
            lines.append(f'product of two {dtype} matrices of {product["size"]} x '
                         f'{product["size"]}: {flops(results, dtype) / 1e9:.0f} GFLOP/s')
    if head['tf32']:
        lines.append('TF32: ' + ', '.join(f'{what} {"on" if on else "off"}'
                                          for what, on in head['tf32'].items()))
    return lines


def flops(results: Dict[str, Any], dtype: str) -> float:
    """Return the FLOP/s of the matrix product in ``dtype``."""
    product = results['matrix_product'][dtype]
    return 2 * product['size'] ** 3 / spread(product['samples_ms']).median * 1e3


def table(results: Dict[str, Any]) -> Tuple[List[str], List[List[str]]]:
    """Return the columns and a row of texts for each candidate, those that failed included."""
    head, entries = results['header'], results['candidates']
    train = head['mode'] == 'train'
    samples = {entry['name']: entry['samples_ms'] for entry in entries}
    columns = ['model', 'ms', 'quartiles', *(f'× {name}' for name in results['baselines'])]
    columns += ['kept for backward, MiB'] if train else ['GMACs', 'of matrix product']
    columns += ['peak, MiB', 'params, M', 'remark']
    rows = []
    for entry in entries:
        if entry['error'] or not entry['samples_ms']:
            why = entry['error'] or 'no round was finished'
            rows.append([entry['name'], NONE if entry['samples_ms'] else 'failed',
                         *[NONE] * (len(columns) - 3), ' '.join(why.split())[:160]])
            continue
        time = spread(entry['samples_ms'])
        cells = [entry['name'], _digits(time.median), f'{_digits(time.q1)}–{_digits(time.q3)}']
        cells += [f'{speed_up(entry["samples_ms"], samples[name]):.2f}' if samples[name] else NONE
                  for name in results['baselines']]
        if train:
            cells.append(_mib(entry['kept_bytes']))
        elif entry['macs'] is None:
            cells += [NONE, NONE]
        else:
            rate, dtype = 2e3 * entry['macs'] * head['batch'] / time.median, entry['dtype']
            cells += [f'{entry["macs"] / 1e9:.2f}', f'{rate / flops(results, dtype):.0%}'
                      if dtype in results['matrix_product'] else NONE]
        rows.append([*cells, _mib(entry['peak_bytes']), f'{entry["params"] / 1e6:.1f}',
                     entry['remark']])
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return columns, rows


def _digits(ms: float) -> str:
    return f'{ms:.0f}' if ms >= 100 else f'{ms:.3g}'


def _mib(size: Optional[int]) -> str:
    return NONE if size is None else f'{size / MIB:.0f}'


def markdown(results: Dict[str, Any]) -> str:
    """Return the table with all that is needed to understand it."""
    columns, rows = table(results)
    lines = [f'### {title(results)}', '', *(f'- {line}' for line in about(results)), '',
             _cells(columns), _cells(['---'] + ['---:'] * (len(columns) - 1)), *map(_cells, rows),
             '']
    if results['baselines']:
        lines += ['×: how many times as fast as that model, the median over rounds.', '']
    return '\n'.join(lines)


def _cells(texts: Sequence[str]) -> str:
    return f'| {" | ".join(text.replace("|", "/") for text in texts)} |'


def published(model: str, accuracy: str) -> str:
    """Return the published figure of a network as printed, '' if there is none.

    Args:
        model: As in :class:`Candidate`.
        accuracy: One of ``ACCURACIES``.
    """
    entry = _entry(model, accuracy)
    return entry.published.get(ACCURACIES[accuracy].metric, '') if entry else ''


def _entry(model: str, accuracy: str) -> Optional[Model]:
    """The metafile's entry for a model, ours or timm's, and the task of an accuracy."""
    if model.startswith(TIMM):  # the part after a dot names weights
        name = model[len(TIMM):].partition('.')[0].replace('efficientformer', 'effformer')
    else:
        name = f'effformer{"" if model in ARCHS else "v2"}_{model}'
    return read_models().get(ACCURACIES[accuracy].model.format(name))


def marks(results: Dict[str, Any], accuracy: str) -> Dict[Tuple[str, str], List[TimedMark]]:
    """Return a mark for each candidate that was timed and has a published figure, by panel.

    A panel is a runtime in a precision.
    """
    panels: Dict[Tuple[str, str], List[TimedMark]] = {}
    for entry in results['candidates']:
        figure = published(entry['model'], accuracy)
        if not figure or not entry['samples_ms']:
            continue
        name = _entry(entry['model'], accuracy).metadata['Backbone']
        family, _, size = name.partition('-')
        time = spread(entry['samples_ms'])
        of = [*['timm'] * (entry['model'].startswith(TIMM) and 'Efficient' in family),
              *entry['variants']]
        panel = (f'{RUNTIMES[entry["runtime"]]}, {entry["dtype"]}',
                 f'{ACCURACIES[accuracy].title}\npublished by the authors, not measured')
        panels.setdefault(panel, []).append(TimedMark(
            size + ' ?' * figure.endswith('?'),
            family + (f' ({", ".join(of)})' if of else ''), time.median,
            float(figure.removesuffix(' ?')), None, (time.q1, time.q3)))
    return panels


def caption(results: Dict[str, Any]) -> str:
    """Return what the plot shows."""
    return (f'Accuracy: published by the authors of each network, not measured here.\n'
            f'Time: {title(results).lower()}, measured on {machine(results)}; bars are quartiles; '
            'the grey line is the Pareto front.')
