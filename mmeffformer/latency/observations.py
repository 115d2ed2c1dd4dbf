"""What the EfficientFormer paper observed on a phone, tried here: pairs timed in turns.

Section 3 of https://arxiv.org/abs/2206.01191. Weights are random.
"""
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from ..deploy.runtimes import SUFFIXES
from ..models import EfficientFormer
from ..models.attention import MB3D
from ..models.backbone import Stage
from ..models.fuse import fuse
from ..models.layers import MB4D, ConvNorm, Stem
from ..utils.complexity import complexity
from . import benchmark
from .candidates import FILES, OPEN, Setting, write_graph
from .timing import Call, Timer, interleave, speed_up, spread

NOTE = '×: how many times as long as the first of its group, the median over rounds.'


class Trial(NamedTuple):
    """A network, or part of one, that is timed beside others of its group.

    Attributes:
        observation: 1 to 4, of section 3 of the paper.
        group: What is compared. The first of a group is what the others are compared with.
        name: What sets it apart.
        module: Fused, where fusing is not what sets it apart.
        shape: (C, H, W) of its input.
        torch_only: For PyTorch alone, as exported files are fused.
    """

    observation: int
    group: str
    name: str
    module: nn.Module
    shape: Tuple[int, int, int]
    torch_only: bool = False


def trials(shape: Tuple[int, int]) -> Iterator[Trial]:
    """Yield what the paper's observations are tried on, for images of (H, W) px."""
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

    yield Trial(3, 'norms of L1', 'BN, folded', _fused(_l1()), image)
    yield Trial(3, 'norms of L1', 'BN by itself', _l1().eval(), image, torch_only=True)
    for name, cfg in (('GN of one group', dict(type='GN', num_groups=1)),
                      ('LN over channels', dict(type=LayerNorm2d))):
        yield Trial(3, 'norms of L1', name, _fused(_l1(norm_cfg=cfg)), image)
    for name in ('none', 'ReLU', 'GELU', 'Hardswish', 'SiLU'):
        cfg = dict(type='Identity' if name == 'none' else name)
        yield Trial(4, 'activations of L1', name, _fused(_l1(act_cfg=cfg)), image)


def _l1(**options: Any) -> nn.Module:
    return EfficientFormer('l1', out_norm_cfg=None, **options)


def _fused(module: nn.Module) -> nn.Module:
    fuse(module)
    for each in reversed([*module.modules()]):  # parts of a backbone, inner ones first
        if hasattr(each, 'fuse') and not hasattr(module, 'switch_to_deploy'):
            each.fuse()
    return module


def observe(results: Dict[str, Any], setting: Setting, runtimes: Sequence[str], rounds: int,
            seed: int, out: Path, progress: benchmark.Report = lambda *_: None):
    """Time the trials in turns, into results, and save them. Ctrl-C ends the rounds early."""
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    timers, tried, entries = {}, [*trials(setting.shape)], {}
    with tempfile.TemporaryDirectory() as folder:
        for i, trial in enumerate(tried):
            image = torch.randn(1, *trial.shape)
            macs = (complexity(deepcopy(trial.module), setting.shape)[-1].macs
                    if trial.observation == 1 else None)
            for runtime in runtimes:
                if trial.torch_only and runtime in FILES:
                    continue
                progress(f'building {trial.name} for {runtime}', i, len(tried))
                key = f'{trial.group}: {trial.name}, {runtime}'
                entries[key] = dict(observation=trial.observation, group=trial.group,
                                    name=trial.name, runtime=runtime, macs=macs, samples_ms=[])
                timers[key] = Timer(_call(trial.module, image, runtime, setting.threads,
                                          Path(folder) / f'{len(timers)}'), min_ms=40)
        pending = {}
        try:
            for i, sample in enumerate(interleave(timers, rounds, seed)):
                progress(f'round {sample.round + 1}: {sample.name}', i, rounds * len(timers))
                pending[sample.name] = sample.ms
                if len(pending) == len(timers):  # whole rounds only, for comparing within them
                    for key, ms in pending.items():
                        entries[key]['samples_ms'].append(ms)
                    results['header']['rounds_done'] = sample.round + 1
                    results['observations'] = [*entries.values()]
                    benchmark.save(results, out)
                    pending.clear()
        except KeyboardInterrupt:
            results['header']['interrupted'] = True
        timers.clear()  # before the exported files are deleted


def _call(module: nn.Module, image: Tensor, runtime: str, threads: int, path: Path) -> Call:
    if runtime in FILES:
        path = path.with_suffix(SUFFIXES[runtime])
        write_graph(module, image, runtime, path)
        return OPEN[runtime](path, image, threads)
    module = module.to(memory_format=torch.channels_last)
    image = image.to(memory_format=torch.channels_last)
    return torch.no_grad()(lambda: module(image))


def table(results: Dict[str, Any]) -> Tuple[List[str], List[List[str]]]:
    """Return the columns, and a row of texts for each trial."""
    entries = results['observations']
    runtimes = list(dict.fromkeys(entry['runtime'] for entry in entries))
    columns = ['', 'compared', 'variant', 'MMACs', *(
        text for name in runtimes for text in (f'{name}, ms', 'quartiles', '×'))]
    rows = []
    for group, name in dict.fromkeys((entry['group'], entry['name']) for entry in entries):
        alike = {entry['runtime']: entry for entry in entries
                 if (entry['group'], entry['name']) == (group, name)}
        one = next(iter(alike.values()))
        row = [str(one['observation']), group, name,
               f'{one["macs"] / 1e6:.0f}' if one['macs'] else '']
        for runtime in runtimes:
            if runtime not in alike:
                row += ['–'] * 3
                continue
            first = next(entry for entry in entries
                         if (entry['group'], entry['runtime']) == (group, runtime))
            samples = alike[runtime]['samples_ms']
            time_ms = spread(samples)
            row += [f'{time_ms.median:.2f}', f'{time_ms.q1:.2f}–{time_ms.q3:.2f}',
                    f'{speed_up(first["samples_ms"], samples):.2f}']
        rows.append(row)
    return columns, rows
