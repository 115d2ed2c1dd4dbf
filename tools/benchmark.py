"""Time models of this project and of timm side by side, in turns:

  python tools/benchmark.py l1 l3:legacy,unfused,nchw timm:resnet50 --runtimes pytorch openvino \\
      --shape 800 1344 --out benchmarks/NAME

A model is NAME or NAME:OPTION,OPTION. Options are variants (legacy, unfused, nchw; with --mode
train with_cp), runtimes and precisions; --runtimes and --dtype are for models that name none.
The folder --out receives results.json, results.md and accuracy.png.
"""
import os
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from datetime import datetime
from pathlib import Path

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler tells of every start and stop

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from rich.table import Table  # noqa: E402

from mmeffformer.apis.options import exit_on_error  # noqa: E402
from mmeffformer.latency import benchmark  # noqa: E402
from mmeffformer.latency.candidates import DTYPES, RUNTIMES, Setting, candidates  # noqa: E402
from mmeffformer.utils.plots import tradeoff  # noqa: E402


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', metavar='MODEL',
                        help='l1, l3, l7, s0, s1, s2, l or timm:NAME, with options after a colon')
    parser.add_argument('--runtimes', nargs='+', choices=RUNTIMES, default=['pytorch'],
                        metavar='NAME', help=f'{", ".join(RUNTIMES)} (default: pytorch)')
    parser.add_argument('--baseline', nargs='+', metavar='MODEL',
                        help='compare all with these, which are timed too (default: the first)')
    parser.add_argument('--shape', nargs=2, type=int, default=(224, 224), metavar=('H', 'W'),
                        help='input size in px (default: 224 224)')
    parser.add_argument('--batch', type=int, default=1, help='images at once (default: 1)')
    parser.add_argument('--mode', choices=['inference', 'train'], default='inference',
                        help='train: forward and backward of a training step')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument('--dtype', choices=DTYPES, default='fp32',
                        help='bf16 and fp16 through autocast (default: fp32)')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(),
                        help="of the CPU (default: torch's, %(default)s here)")
    parser.add_argument('--rounds', type=int, default=15,
                        help='samples of each model (default: 15)')
    parser.add_argument('--seed', type=int, default=0, help='of the order within rounds')
    parser.add_argument('--accuracy', choices=benchmark.ACCURACIES, default='top1',
                        help='published figure that times are plotted against (default: top1)')
    parser.add_argument('--out', type=Path, metavar='DIR',
                        help='default: benchmarks/ and the time')
    parser.add_argument('--render', action='store_true',
                        help='time nothing: make tables and plot of the results.json in --out')
    args = parser.parse_args()

    console = Console(stderr=True)
    with exit_on_error():
        if args.render:
            if not args.out or args.models:
                raise ValueError('--render takes no models, and the folder of results in --out')
            results = benchmark.load(args.out)
            return report(results, args.out, args.accuracy)
        if not args.models:
            raise ValueError('no model is given; for example: l1 l3 timm:resnet50')
        if args.rounds < 1:
            raise ValueError(f'rounds {args.rounds}: expected 1 or more')
        setting = Setting(tuple(args.shape), args.batch, args.threads, args.device,
                          args.mode == 'train')
        chosen = [candidate for spec in args.models
                  for candidate in candidates(spec, args.runtimes, args.dtype, setting)]
        baselines = [candidates(spec, args.runtimes, args.dtype, setting)[0]
                     for spec in args.baseline or []] or chosen[:1]
    out = args.out or Path('benchmarks') / f'{datetime.now():%Y%m%d_%H%M%S}'
    torch.backends.cudnn.benchmark = True  # all sizes are fixed
    with Progress(TextColumn('{task.description}'), BarColumn(), TimeElapsedColumn(),
                  console=console, transient=True) as progress, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        task = progress.add_task('')
        results = benchmark.run(
            chosen, baselines, setting, args.rounds, args.seed, out,
            lambda text, done, steps: progress.update(task, description=text, completed=done,
                                                      total=steps))
    report(results, out, args.accuracy)
    if not any(entry['samples_ms'] for entry in results['candidates']):
        raise SystemExit('benchmark.py: nothing was timed')


def report(results: dict, out: Path, accuracy: str):
    """Print the table, and save it and the plot beside ``results.json``."""
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    columns, rows = benchmark.table(results)
    table = Table(title=benchmark.title(results), caption='\n'.join(benchmark.about(results)))
    for i, column in enumerate(columns):
        table.add_column(column, justify='right' if 0 < i and column != 'remark' else 'left',
                         overflow='fold')
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False)
    saved = [out / 'results.json', out / 'results.md']
    saved[1].write_text(benchmark.markdown(results))
    panels = benchmark.marks(results, accuracy)
    if panels and results['header']['mode'] == 'inference':
        saved.append(out / 'accuracy.png')
        tradeoff(panels, 'time, ms', saved[-1], front=True, caption=benchmark.caption(results))
    print(f'saved {", ".join(map(str, saved))}')


if __name__ == '__main__':
    main()
