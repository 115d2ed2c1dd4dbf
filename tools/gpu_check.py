"""Check, train and measure on a GPU:

  python tools/gpu_check.py
  python tools/gpu_check.py operators networks --out work_dirs/gpu

Each part runs commands of this project one after the other, and ends within --limit seconds. A
failure ends neither the part nor the others. The folder --out receives the output of every
command, gpu_check.md and gpu_check.json.
"""
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, Iterable, List

import torch

from mmeffformer.apis.options import exit_on_error
from mmeffformer.latency.candidates import Setting
from mmeffformer.latency.results import header
from mmeffformer.utils.console import print_table
from mmeffformer.utils.markdown import markdown_table

ROOT = Path(__file__).resolve().parents[1]
PYTEST = 'pytest -m gpu -n 4 --junitxml {out}/junit.xml -p no:cacheprovider'
SHAPES = '--train 1440 --val 80 --size 192 192'
TIME = 'tools/benchmark.py --device cuda --rounds 7 --threads 4'
PEERS = [f'timm:{name}' for name in (
    'resnet18', 'resnet50', 'efficientformerv2_s0', 'poolformer_s24', 'repvit_m1_1',
    'fastvit_sa12', 'convnext_tiny')]
# l1:legacy,unfused,nchw computes as the authors' code does.
BACKBONES = f'l1 l3 l7 s0 s2 l1:legacy,unfused,nchw {" ".join(PEERS)}'
FEW = ('l1', 'l3', 's0', 'timm:resnet18', 'timm:resnet50')
DETECTORS = [f'configs/detection/maskrcnn_{name}.py' for name in (
    'resnet50', 'effformer_l1', 'effformer_l3', 'poolformer_s24')]
WITH_CP = [f'{DETECTORS[1]}:with_cp', f'{DETECTORS[2]}:with_cp']


def having(option: str, models: Iterable[str]) -> str:
    """Return the specs of models with a further option."""
    return ' '.join(f'{model}{"," if model.endswith("_cp") else ":"}{option}' for model in models)


def demo(config: str, data: str, layout: str, steps: int, at_least: str) -> List[str]:
    """Return the commands that train and evaluate a demo in fp16 and bf16."""
    commands = [f'tools/make_shapes.py {{out}}/{data} --layout {layout} {SHAPES}']
    for amp in ('float16', 'bfloat16'):
        run = f'--data-root {{out}}/{data} --work-dir {{out}}/{amp}'
        commands += [f'tools/train.py {config} {run} --amp {amp}',
                     f'tools/test.py {config} {{out}}/{amp}/iter_{steps}.pth {run}/test '
                     f'--at-least {at_least}']
    return commands


PARTS: Dict[str, List[str]] = {
    'operators': [f'{PYTEST} tests/ops', 'tools/dev/time_roi_align.py --device cuda'],
    'networks': [f'{PYTEST} tests/models'],
    'jobs': [f'{PYTEST} tests/engine tests/e2e'],
    'detector': demo('configs/demo/maskrcnn_effformer_l1_shapes.py', 'shapes', 'coco', 360,
                     'coco/bbox_mAP_50=0.7 coco/segm_mAP_50=0.7'),
    'segmentor': demo('configs/demo/semfpn_effformer_l1_shapes.py', 'shapes_ade20k', 'ade20k', 700,
                      'mIoU=75'),
    'training': [
        f'{TIME} {having("bf16", DETECTORS + WITH_CP)} {having("tf32", DETECTORS[:3])} '
        '--mode train --shape 800 1344 --batch 2 --out {out}/2',
        f'{TIME} {having("bf16", DETECTORS + WITH_CP)} '
        '--mode train --shape 800 1344 --batch 8 --out {out}/8'],
    'batch1': [
        f'{TIME} {BACKBONES} {having("compile", FEW)} --runtimes pytorch cuda-graphs '
        '--dtype bf16 --baseline timm:resnet18:compile timm:resnet50:compile --out {out}'],
    'batch64': [f'{TIME} {BACKBONES} --batch 64 --dtype bf16 --baseline timm:resnet50 '
                '--out {out}'],
    'dense': [f'{TIME} {BACKBONES} --shape 800 1344 --dtype bf16 --baseline timm:resnet50 '
              '--out {out}'],
    'detectors': [f'{TIME} {having("bf16", DETECTORS)} {having("tf32", DETECTORS[:3])} '
                  '--shape 800 1344 --out {out}'],
    'precisions': [
        f'{TIME} {" ".join(having(dtype, FEW) for dtype in ("fp32", "tf32", "bf16", "fp16"))} '
        '--batch 64 --baseline timm:resnet50:tf32 --out {out}'],
    'profile': [
        f'tools/analysis_tools/latency_profile.py {" ".join(FEW)} --device cuda --dtype bf16 '
        f'--rounds 3 --batch {batch} --out {{out}}/{batch}' for batch in (64, 1)],
    'tensorrt': [
        f'{TIME} {" ".join(FEW)} --batch 64 --dtype fp16 --runtimes pytorch tensorrt '
        '--baseline timm:resnet50 --out {out}'],
}


def parse_args():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('parts', nargs='*', metavar='PART',
                        help=f'of {", ".join(PARTS)} (default: all)')
    parser.add_argument('--limit', type=float, default=600, metavar='SECONDS',
                        help='for each part (default: 600)')
    parser.add_argument('--out', type=Path, metavar='DIR',
                        help='default: gpu_checks/ and the time')
    return parser.parse_args()


def run(command: str, log: Path, limit: float) -> Dict[str, Any]:
    """Run a command of ``PARTS``; return its verdict, its seconds and its figures.

    Args:
        command: With the folder for its results in it.
        log: Receives its output.
        limit: Seconds after which it is killed, with all its processes.
    """
    words = shlex.split(command)
    words[:1] = ['-m', 'pytest'] if words[0] == 'pytest' else words[:1]
    start, started = time.monotonic(), time.time()
    with log.open('w') as file:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=file,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            verdict = 'failed' if process.wait(max(limit, 0.)) else 'passed'
        except subprocess.TimeoutExpired:
            verdict = 'timed out'
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return dict(command=command, verdict=verdict, seconds=round(time.monotonic() - start, 1),
                figures=read_figures(words, log, started))


def read_figures(words: List[str], log: Path, started: float) -> str:
    """Return what a command found since it ``started``, in Markdown."""
    for option, name, read in (('--junitxml', '', read_tests),
                               ('--out', 'results.md', Path.read_text)):
        if option in words:
            path = Path(words[words.index(option) + 1], name)
            # An earlier run in the same folder may have left one. Clocks of files are coarser.
            if path.is_file() and path.stat().st_mtime > started - 1:
                return read(path)
    lines = log.read_text(errors='replace').strip().splitlines()
    return '\n'.join(['```text', *lines[-6:], '```'])


def read_tests(path: Path) -> str:
    """Return the number of tests by outcome, each failure, and the largest errors by function."""
    counts: Dict[str, int] = {}
    errors: Dict[str, float] = {}
    failures = []
    for case in ElementTree.parse(path).iter('testcase'):
        outcome = next((tag for tag in ('failure', 'error', 'skipped')
                        if case.find(tag) is not None), 'passed')
        counts[outcome] = counts.get(outcome, 0) + 1
        if outcome in ('failure', 'error'):
            message = case.find(outcome).get('message', '').splitlines() or ['']
            failures.append(f'- {case.get("name")}: `{message[0][:200]}`')
        for found in case.iter('property'):
            # The function, and what bounds its error.
            name = case.get('name').replace('channels_last', '').partition('[')
            kind = ' '.join(word for word in ('bf16', 'fp16') if word in name[2])
            name = f'{name[0]} {kind}'.strip()
            errors[name] = max(errors.get(name, 0.), float(found.get('value')))
    text = [', '.join(f'{count} {outcome}' for outcome, count in sorted(counts.items())), '']
    text += [*failures, ''] if failures else []
    if errors:
        text += [markdown_table(('test', 'largest relative error'), [
            (name, f'{error:.1e}') for name, error in sorted(errors.items())]), '']
    return '\n'.join(text)


def main():
    args = parse_args()
    with exit_on_error():
        unknown = [part for part in args.parts if part not in PARTS]
        if unknown:
            raise ValueError(f'part {unknown[0]!r} is unknown; choose from {", ".join(PARTS)}')
        if not torch.cuda.is_available():
            raise ValueError('torch finds no GPU here')
        machine = header(Setting(device='cuda'), 0, 0)
        out = (args.out or Path('gpu_checks') / f'{datetime.now():%Y%m%d_%H%M%S}').resolve()
        out.mkdir(parents=True, exist_ok=True)
    results: Dict[str, List[Dict[str, Any]]] = {}
    for part in args.parts or PARTS:
        end, results[part] = time.monotonic() + args.limit, []
        for number, template in enumerate(PARTS[part]):
            folder = out / part
            folder.mkdir(exist_ok=True)
            command = template.format(out=shlex.quote(str(folder)))
            found = run(command, folder / f'{number}.log', end - time.monotonic())
            results[part].append(found)
            print(f'{part}: {found["verdict"]} after {found["seconds"]:.0f} s: {command}\n'
                  f'{found["figures"]}', flush=True)
            save(machine, results, out)
    rows = [(part, found['command'][:100], found['verdict'], f'{found["seconds"]:.0f} s')
            for part, each in results.items() for found in each]
    print_table(machine['gpu'], ('part', 'command', 'verdict', 'time'), rows)
    print(f'saved {out / "gpu_check.md"}, {out / "gpu_check.json"}')
    if any(row[2] != 'passed' for row in rows):
        raise SystemExit('gpu_check.py: not all passed')


def save(machine: Dict[str, Any], results: Dict[str, List[Dict[str, Any]]], out: Path) -> None:
    """Write the reports of what has run so far."""
    versions = ', '.join(f'{name} {number}' for name, number in machine['versions'].items()
                         if number)
    lines = [f'# {machine["gpu"]}', '', f'{machine["date"]}; {machine["cpu"]}, '
             f'{machine["cores"]} cores; CUDA {torch.version.cuda}; {versions}', '']
    for part, each in results.items():
        lines += [f'## {part}', '']
        for found in each:
            lines += [f'`{found["command"].replace(str(out), "OUT")}`', '',
                      f'{found["verdict"]}, {found["seconds"]:.0f} s', '', found['figures'], '']
    (out / 'gpu_check.md').write_text('\n'.join(lines))
    (out / 'gpu_check.json').write_text(json.dumps(dict(machine=machine, parts=results), indent=1))


if __name__ == '__main__':
    main()
