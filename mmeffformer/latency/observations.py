"""The four observations of the EfficientFormer paper, timed on this machine.

Section 3 of https://arxiv.org/abs/2206.01191 made them on a phone. Weights are random.
"""
import tempfile
from copy import deepcopy
from functools import partial
from itertools import product
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Sequence, Tuple

import torch
from torch import nn
from torchvision.models.convnext import LayerNorm2d

from ..models import EfficientFormer
from ..models.attention import MB3D
from ..models.backbone import Stage
from ..models.fuse import fuse
from ..models.layers import MB4D, ConvNorm, Stem
from ..utils.complexity import complexity
from .candidates import Setting
from .exported import FILES, open_module
from .results import Results, TimerEntry, time_rounds
from .timing import Progress, Timer, no_progress, speed_up, spread

LEGEND = '×: time divided by that of the first of its group, the median over rounds.'


class Trial(NamedTuple):
    """A network, or part of one, that is compared with the first of its group."""

    observation: int  # 1 to 4, in section 3 of the paper
    group: str
    name: str
    module: nn.Module  # fused, except where fusing is the variant
    shape: Tuple[int, int, int]  # (C, H, W) of its input
    torch_only: bool = False  # exported files are always fused


def trials(shape: Tuple[int, int]) -> Iterator[Trial]:
    """Yield the trials of all observations for images of (H, W) px."""
    image, bn, relu = (3, *shape), dict(type='BN'), dict(type='ReLU')
    group = '384 channels at stride 16, as DeiT-S'
    widths = (3, 48, 96, 192, 384)
    yield Trial(1, group, 'four 3 x 3, stride 2', _fused(nn.Sequential(*(
        ConvNorm(a, b, 3, 2, norm_cfg=bn, act_cfg=relu) for a, b in zip(widths, widths[1:])))),
        image)
    yield Trial(1, group, 'one 16 x 16, stride 16', nn.Conv2d(3, 384, 16, 16).eval(), image)
    group = '64 channels at stride 4, as PoolFormer'
    yield Trial(1, group, 'two 3 x 3, stride 2', _fused(Stem(3, 64, bn, relu)), image)
    yield Trial(1, group, 'one 7 x 7, stride 4', nn.Conv2d(3, 64, 7, 4, 2).eval(), image)

    grid = shape[0] // 16, shape[1] // 16
    group = f'four blocks of 448 channels on {grid[0]} x {grid[1]}'
    cfg = dict(channels=448, hidden=1792, drop_path=0., layer_scale_init_value=1e-5,
               act_cfg=dict(type='GELU'))
    attention = [MB3D(bias_grid=grid, bias_mode='offset', **cfg) for _ in range(4)]
    features = (448, *grid)
    yield Trial(2, group, 'attention, to tokens once', _fused(Stage(None, attention)), features)
    yield Trial(2, group, 'attention, to tokens and back in each', _fused(nn.Sequential(*(
        Stage(None, [block]) for block in attention))), features)
    yield Trial(2, group, 'pooling, no tokens', _fused(Stage(None, [
        MB4D(norm_cfg=bn, **cfg) for _ in range(4)])), features)

    l1 = partial(EfficientFormer, 'l1', out_norm_cfg=None)
    yield Trial(3, 'norms of L1', 'BN, folded', _fused(l1()), image)
    yield Trial(3, 'norms of L1', 'BN, not folded', l1().eval(), image, torch_only=True)
    for name, cfg in (('GN of one group', dict(type='GN', num_groups=1)),
                      ('LN over channels', dict(type=LayerNorm2d))):
        yield Trial(3, 'norms of L1', name, _fused(l1(norm_cfg=cfg)), image)
    for name in ('none', 'ReLU', 'GELU', 'Hardswish', 'SiLU'):
        cfg = dict(type=nn.Identity if name == 'none' else getattr(nn, name))
        yield Trial(4, 'activations of L1', name, _fused(l1(act_cfg=cfg)), image)


def _fused(module: nn.Module) -> nn.Module:
    fuse(module)
    for each in reversed([*module.modules()]):  # parts of a backbone, inner modules first
        if hasattr(each, 'fuse') and not hasattr(module, 'switch_to_deploy'):
            each.fuse()
    return module


def observe(results: Results, setting: Setting, runtimes: Sequence[str], out: Path,
            progress: Progress = no_progress) -> None:
    """Time the trials in the rounds of ``results``, and save them. Ctrl-C ends early."""
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    timers: List[TimerEntry] = []
    with tempfile.TemporaryDirectory() as folder:
        for trial, runtime in product(trials(setting.shape), runtimes):
            if trial.torch_only and runtime in FILES:
                continue
            name = f'{trial.group}: {trial.name}, {runtime}'
            progress(f'building {name}', 0, 1)
            macs = (complexity(deepcopy(trial.module), setting.shape)[-1].macs
                    if trial.observation == 1 else None)
            call = open_module(trial.module, torch.randn(1, *trial.shape), runtime,
                               setting.threads, Path(folder) / f'{len(timers)}.onnx')
            entry = dict(observation=trial.observation, group=trial.group, name=trial.name,
                         runtime=runtime, macs=macs, samples_ms=[])
            results['observations'].append(entry)
            timers.append((name, Timer(call, min_ms=40), entry['samples_ms']))
        results['header']['rounds_done'] = 0
        time_rounds(results, timers, out, progress)
        timers.clear()  # before the exported files are deleted


def table(results: Results) -> Tuple[List[str], List[List[str]]]:
    """Return the columns, and one row of texts per trial."""
    entries = [entry for entry in results['observations'] if entry['samples_ms']]
    runtimes = list(dict.fromkeys(entry['runtime'] for entry in entries))
    columns = ['', 'compared', 'variant', 'MMACs', *(
        text for name in runtimes for text in (f'{name}, ms', 'quartiles', '×'))]
    first: Dict[Tuple[str, str], List[float]] = {}  # samples by group and runtime
    rows: Dict[Tuple[str, str], List[str]] = {}  # by group and name
    for entry in entries:
        samples, group = entry['samples_ms'], entry['group']
        baseline = first.setdefault((group, entry['runtime']), samples)
        macs = f'{entry["macs"] / 1e6:.0f}' if entry['macs'] else ''
        row = rows.setdefault((group, entry['name']), [
            str(entry['observation']), group, entry['name'], macs, *['–'] * 3 * len(runtimes)])
        column = 4 + 3 * runtimes.index(entry['runtime'])
        time = spread(samples)
        row[column:column + 3] = [f'{time.median:.2f}', f'{time.q1:.2f}–{time.q3:.2f}',
                                  f'{speed_up(baseline, samples):.2f}']
    return columns, [*rows.values()]
