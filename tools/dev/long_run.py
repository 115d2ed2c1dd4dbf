"""Measure the memory of a backbone over many images of random sizes, in eval and in training:
python tools/dev/long_run.py l1 s0 --sizes 224 448"""
import ctypes
import gc
import multiprocessing
import os
from argparse import ArgumentParser
from pathlib import Path
from random import Random
from typing import List, NamedTuple, Tuple

import torch
from rich.progress import track

from mmeffformer.models import ARCHS, ARCHS_V2, backbone_named
from mmeffformer.models.attention import AttentionBias
from mmeffformer.utils.console import print_table

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
    return watch(backbone_named(arch)(arch), mode, iterations, sizes, batch, f'{arch}, {mode}')


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('arch', nargs='+', choices=[*ARCHS, *ARCHS_V2])
    parser.add_argument('--modes', nargs='+', choices=MODES, default=MODES)
    parser.add_argument('--iterations', type=int, default=1000)
    parser.add_argument('--sizes', nargs=2, type=int, default=(224, 448), metavar=('MIN', 'MAX'),
                        help='range of height and width, px, drawn in each iteration')
    parser.add_argument('--batch', type=int, default=1)
    args = parser.parse_args()
    if not 33 <= args.sizes[0] <= args.sizes[1]:  # with 32 px, a BatchNorm has one value
        parser.error(f'--sizes {args.sizes[0]} {args.sizes[1]}: expected the smallest, at least '
                     '33 px, and the largest')
    if min(args.iterations, args.batch) < 1:
        parser.error('--iterations and --batch: expected 1 or more')
    os.environ.setdefault('MALLOC_ARENA_MAX', '1')  # otherwise threads keep freed memory
    jobs = [(arch, mode, args.iterations, args.sizes, args.batch)
            for arch in args.arch for mode in args.modes]
    rows = []
    # Each job has its own process, so that its memory is measured separately.
    with multiprocessing.get_context('spawn').Pool(1, maxtasksperchild=1) as pool:
        for job, watched in zip(jobs, pool.imap(watch_named, jobs)):
            end = watched.rss_mb[-1]
            rows.append([' '.join(job[:2]), str(watched.iterations[-1]),
                         f'{end - watched.growth_mb:.0f}', f'{end:.0f}',
                         f'{watched.growth_mb:+.1f}', f'{max(watched.rss_mb):.0f}',
                         str(watched.cached_grids)])
    print_table('resident memory, MiB', ['', 'iterations', 'warm', 'end', 'growth', 'largest',
                                         'grids kept'], rows)


if __name__ == '__main__':
    main()
