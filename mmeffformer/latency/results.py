"""Results of measurements: a dict for JSON, saved after every round and described in words."""
import datetime
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch

from ..utils.files import atomic_write
from ..utils.markdown import markdown_table
from .candidates import Candidate, Setting
from .timing import Progress, cpu_name, interleave, spread

PACKAGES = ('torch', 'torchvision', 'timm', 'onnxruntime', 'openvino', 'executorch', 'coremltools',
            'tensorrt', 'mmeffformer')
Results = Dict[str, Any]
TimerEntry = Tuple[str, Callable[[], Any], List]


def header(setting: Setting, rounds: int, seed: int) -> Dict[str, Any]:
    """Return the machine, the versions and the settings of a measurement."""
    gpu = torch.cuda.get_device_name() if setting.device == 'cuda' else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return dict(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        cpu=cpu_name(), cores=cores, gpu=gpu, threads=setting.threads, device=setting.device,
        versions=dict(Python=sys.version.split()[0],
                      **{name: _version(name) for name in PACKAGES}),
        mode='train' if setting.train else 'inference', shape=list(setting.shape),
        batch=setting.batch, rounds=rounds, rounds_done=0, seed=seed)


def _version(package: str) -> Optional[str]:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def build_all(results: Results, order: Sequence[Candidate],
              build: Callable[[Candidate, Dict[str, Any]], None], progress: Progress) -> None:
    """Call ``build`` with each candidate and its entry in ``results``.

    An error becomes the entry's ``error``; the other candidates continue.
    """
    for i, candidate in enumerate(order):
        progress(f'building {candidate}', i, len(order))
        entry = dict(name=str(candidate), model=candidate.model, runtime=candidate.runtime,
                     dtype=candidate.dtype, variants=list(candidate.variants), error=None,
                     samples_ms=[])
        results['candidates'].append(entry)
        try:
            build(candidate, entry)
        except Exception as error:
            entry['error'] = f'{type(error).__name__}: {error}'


def time_rounds(results: Results, timers: Sequence[TimerEntry], out: Path, progress: Progress
                ) -> None:
    """Time the rounds that the header of ``results`` asks for; save after each. Ctrl-C ends early.

    Args:
        results: Has the lists of the timers inside.
        timers: Name, timer, and the list that receives a sample in each complete round.
        out: Folder of ``results.json``.
    """
    head = results['header']
    save(results, out)
    calls = {name: timer for name, timer, _ in timers}
    try:
        for found in interleave(calls, head['rounds'], head['seed'], progress):
            for name, _, samples in timers:
                samples.append(found[name])
            head['rounds_done'] += 1
            save(results, out)
    except KeyboardInterrupt:
        head['interrupted'] = True
        save(results, out)


def save(results: Results, out: Path) -> Path:
    """Write ``results.json`` into the folder ``out`` atomically."""
    path = Path(out) / 'results.json'
    with atomic_write(path) as tmp_path:
        tmp_path.write_text(json.dumps(results, indent=1))
    return path


def load(out: Path) -> Results:
    """Return the results of tools/benchmark.py in the folder ``out``.

    Raises:
        FileNotFoundError: The folder has no ``results.json``.
        ValueError: The file is damaged or was not written by tools/benchmark.py.
    """
    path = Path(out) / 'results.json'
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist: expected the results of '
                                'tools/benchmark.py')
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f'{path} is damaged: {error}') from error
    if not isinstance(results, dict) or not {'header', 'candidates', 'baselines'} <= {*results}:
        raise ValueError(f'{path} was not written by tools/benchmark.py')
    return results


def title(results: Results) -> str:
    """Return the mode, batch size and image size."""
    head = results['header']
    images = f'{head["batch"]} image{"s" if head["batch"] > 1 else ""}'
    mode = 'a training step of' if head['mode'] == 'train' else 'inference of'
    return f'{mode} {images} of {head["shape"][0]} x {head["shape"][1]} px'.capitalize()


def machine(results: Results) -> str:
    """Return the device and its threads."""
    head = results['header']
    cpu = f'{head["cpu"]}, threads: {head["threads"]} of {head["cores"]}'
    return f'{head["gpu"]} ({cpu})' if head['gpu'] else cpu


def notes(results: Results) -> List[str]:
    """Return lines on the machine, the versions and the rounds."""
    head = results['header']
    lines = [
        f'{machine(results)}; {head["date"]}',
        ', '.join(f'{name} {number}' for name, number in head['versions'].items() if number),
        f'{head["rounds_done"]} of {head["rounds"]} rounds, each of all models in shuffled '
        f'order (seed {head["seed"]})']
    for dtype, product in results.get('matrix_product', {}).items():
        if product['samples_ms']:
            lines.append(f'product of two {dtype} matrices of {product["size"]} x '
                         f'{product["size"]}: {product_flops(results, dtype) / 1e9:.0f} GFLOP/s')
    return lines


def product_flops(results: Results, dtype: str) -> float:
    """Return the FLOP/s of the matrix product in ``dtype``."""
    product = results['matrix_product'][dtype]
    return 2 * product['size'] ** 3 / spread(product['samples_ms']).median * 1e3


def markdown(results: Results, *tables: Tuple[Sequence[str], Sequence[Sequence[str]], str]) -> str:
    """Return the title, the notes, and tables of columns, rows and a legend."""
    lines = [f'### {title(results)}', '', *(f'- {line}' for line in notes(results)), '']
    for columns, rows, legend in tables:
        lines += [markdown_table(columns, rows), '', legend, '']
    return '\n'.join(lines)
