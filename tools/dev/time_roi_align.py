"""Time RoIAlign as torchvision computes it and as this project's weighted sums do:

  python tools/dev/time_roi_align.py --device cuda
"""
import itertools
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import contextmanager
from functools import partial
from typing import Callable, Dict, Iterator

import torch
from torch import Tensor, nn

from mmeffformer import ops
from mmeffformer.apis.options import exit_on_error
from mmeffformer.latency.timing import Timer, interleave, spread
from mmeffformer.utils.console import print_table

STRIDE = 4  # px per pixel of the map


def parse_args():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument('--shape', nargs=2, type=int, default=(800, 1344), metavar=('H', 'W'),
                        help='size of the image in px (default: 800 1344)')
    parser.add_argument('--rois', type=int, default=1000, help='RoIs (default: 1000)')
    parser.add_argument('--rounds', type=int, default=9, help='samples of each (default: 9)')
    return parser.parse_args()


def make_rois(count: int, height: int, width: int) -> Tensor:
    """Return RoIs (count, 5) of sides from 56 to 112 px, inside the image."""
    generator = torch.Generator().manual_seed(0)
    sides = 56 + 56 * torch.rand(count, 2, generator=generator)
    start = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - sides)
    return torch.cat([torch.zeros(count, 1), start, start + sides], 1)


@contextmanager
def by_weighted_sums() -> Iterator[None]:
    """Context manager: on a GPU, the weighted sums are for reproducible results."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def main():
    args = parse_args()
    from mmcv.ops import RoIAlign  # mmeffformer offers its operators
    with exit_on_error():
        if ops.diagnose()[0] == 'compiled':
            raise ValueError('mmcv has compiled operators, which replace both: there is nothing '
                             'to compare')
        if args.device == 'cuda' and not torch.cuda.is_available():
            raise ValueError('--device cuda: torch finds no GPU here')
    features = torch.randn(1, 256, *(side // STRIDE for side in args.shape)).to(
        args.device, memory_format=torch.channels_last)
    timers: Dict[str, Callable[[], float]] = {}
    rois = make_rois(args.rois, *args.shape).to(args.device)
    for size, backward in itertools.product((7, 14), (False, True)):
        pool = RoIAlign((size, size), 1 / STRIDE, 0, 'avg', True)

        def call(pool: nn.Module, backward: bool, way: Callable) -> None:
            with way():
                out = pool(features.requires_grad_(backward), rois)
                if backward:
                    out.sum().backward()

        for name, way in (('torchvision', ops.torchvision_only),
                          ('weighted sums', by_weighted_sums)):
            label = f'{args.rois} RoIs to {size} x {size}{", and backward" * backward}: {name}'
            timers[label] = Timer(partial(call, pool, backward, way), args.device)
    samples = [*interleave(timers, args.rounds)]
    rows = [(label, f'{spread([each[label] for each in samples]).median:.3g}') for label in timers]
    print_table(f'RoIAlign, map of 256 channels, {args.device}', ('', 'ms'), rows)


if __name__ == '__main__':
    main()
