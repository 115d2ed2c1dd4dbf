"""Measure the memory of a backbone over many images of random sizes, in eval and in training:
python tools/dev/long_run.py l1 s0 --sizes 224 448"""
import ctypes
import gc
import json
import multiprocessing
import os
from argparse import ArgumentParser
from pathlib import Path
from random import Random
from typing import List, NamedTuple, Sequence, Tuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mmeffformer import EfficientFormer, EfficientFormerV2
from mmeffformer.apis.options import exit_on_error
from mmeffformer.models.attention import AttentionBias
from mmeffformer.utils.files import atomic_write
from mmeffformer.utils.plots import memory_curves

MODES = ('eval', 'training')
WARM_UP = .2  # share of the iterations in which libraries still compile for new sizes


class Watched(NamedTuple):
    """Resident memory of a process at some iterations, and the size of the backbone's cache."""

    iterations: List[int]
    rss_mb: List[float]  # MiB
    cached_grids: int  # the largest number that one bias has kept

    @property
    def growth_mb(self) -> float:
        """MiB between the end of the warm-up and the end."""
        warm = next(i for i, n in enumerate(self.iterations)
                    if n >= WARM_UP * self.iterations[-1])
        return self.rss_mb[-1] - self.rss_mb[warm]


def rss_mb() -> float:
    """Return the resident memory of this process in MiB, after freed memory was returned."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), 'malloc_trim'):  # glibc
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 2 ** 20


def watch(model: torch.nn.Module, mode: str, iterations: int, sizes: Tuple[int, int],
          batch: int = 1, label: str = '') -> Watched:
    """Run a backbone on images of random sizes and return its memory use.

    Args:
        mode: One of ``MODES``; training is forward, backward and a step of AdamW.
        sizes: The smallest and the largest height and width, px.
        batch: Images per iteration.
        label: Label of the progress bar.
    """
    random = Random(0)
    model.train(mode == 'training')
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    biases = [module for module in model.modules() if isinstance(module, AttentionBias)]
    watched, cached = [], 0
    gc.collect()
    gc.freeze()  # objects of imported libraries need not be collected
    for i in track(range(1, iterations + 1), label):
        x = torch.randn(batch, 3, random.randint(*sizes), random.randint(*sizes))
        if mode == 'training':
            optimizer.zero_grad()
            sum(out.square().mean() for out in model(x)).backward()
            optimizer.step()
        else:
            with torch.no_grad():
                model(x)
        cached = max([cached, *(len(bias._expanded) for bias in biases)])
        if i % max(1, iterations // 50) == 0:
            watched.append((i, rss_mb()))
    return Watched(*map(list, zip(*watched)), cached)


def watch_named(job: tuple) -> Watched:
    arch, mode, iterations, sizes, batch = job
    torch.manual_seed(0)
    kind = EfficientFormer if arch in EfficientFormer.archs else EfficientFormerV2
    return watch(kind(arch), mode, iterations, sizes, batch, f'{arch}, {mode}')


def report(found: dict, console: Console) -> None:
    table = Table('', 'px', 'iterations', 'warm', 'end', 'growth', 'largest', 'grids kept',
                  title='resident memory, MiB')
    for name, record in found.items():
        watched = Watched(**record['watched'])
        table.add_row(name, '{}-{}'.format(*record['sizes']),
                      str(watched.iterations[-1]),
                      *(f'{mb:.0f}' for mb in (watched.rss_mb[-1] - watched.growth_mb,
                                               watched.rss_mb[-1])),
                      f'{watched.growth_mb:+.1f}', f'{max(watched.rss_mb):.0f}',
                      str(watched.cached_grids))
    console.print(table)


def saved(path: Path) -> dict:
    """Return the figures of earlier runs.

    Raises:
        ValueError: The file was not written by this tool.
    """
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
        for record in found.values():
            Watched(**record['watched'])
        return found
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f'{path} was not written by long_run.py ({error!r}): name another '
                         '--out, or delete it') from error


def main(args: Sequence[str] = None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('arch', nargs='+',
                        choices=[*EfficientFormer.archs, *EfficientFormerV2.archs])
    parser.add_argument('--modes', nargs='+', choices=MODES, default=MODES)
    parser.add_argument('--iterations', type=int, default=1000)
    parser.add_argument('--sizes', nargs=2, type=int, default=(224, 448), metavar=('MIN', 'MAX'),
                        help='range of height and width, px, drawn in each iteration')
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/long_run.json'),
                        help='file to which the figures are added; the plot has the same name')
    args = parser.parse_args(args)
    with exit_on_error():
        if not 33 <= args.sizes[0] <= args.sizes[1]:  # with 32 px, a BatchNorm has one value
            raise ValueError(f'--sizes {args.sizes[0]} {args.sizes[1]}: expected the smallest, at '
                             'least 33 px, and the largest')
        for name in ('iterations', 'batch'):
            if getattr(args, name) < 1:
                raise ValueError(f'--{name} {getattr(args, name)}: expected 1 or more')
        found = saved(args.out)
    os.environ.setdefault('MALLOC_ARENA_MAX', '1')  # otherwise threads keep freed memory
    jobs = [(arch, mode, args.iterations, tuple(args.sizes), args.batch)
            for arch in args.arch for mode in args.modes]
    # Each job has its own process, so that its memory is measured separately.
    with multiprocessing.get_context('spawn').Pool(1, maxtasksperchild=1) as pool:
        for job, watched in zip(jobs, pool.imap(watch_named, jobs)):
            found[f'{job[0]} {job[1]}'] = dict(sizes=job[3], batch=job[4],
                                               watched=watched._asdict())
            with atomic_write(args.out) as path:
                path.write_text(json.dumps(found, indent=1) + '\n')
    report(found, Console())
    picture = args.out.with_suffix('.png')
    memory_curves({name: (record['watched']['iterations'], record['watched']['rss_mb'])
                   for name, record in found.items()}, picture)
    print(f'saved {args.out} and {picture}')


if __name__ == '__main__':
    main()
