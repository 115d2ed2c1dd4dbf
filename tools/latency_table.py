"""Measure what the parts of an EfficientFormer take, by width, as a table that a search reads:

  python tools/latency_table.py --runtime openvino --shape 224 224 --out benchmarks/NAME.json

What is measured is saved as it goes: stopped, the same command goes on. Then whole networks are
measured to check what the table predicts of them; a picture of that is saved beside the table.
Nothing else should run meanwhile.
"""
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mmeffformer.apis.options import exit_on_error
from mmeffformer.deploy.runtimes import require
from mmeffformer.latency import table as latency
from mmeffformer.models import ARCHS
from mmeffformer.utils.plots import agreement


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('--runtime', choices=latency.RUNTIMES, default='pytorch')
    parser.add_argument('--shape', nargs=2, type=int, default=(224, 224), metavar=('H', 'W'),
                        help='input size in px (default: 224 224)')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(),
                        help="of the CPU (default: torch's, %(default)s here)")
    parser.add_argument('--max-widths', nargs=4, type=int, default=ARCHS['l3'].widths,
                        metavar='C', help="the widest of each stage (default: L3's, "
                        f'{" ".join(map(str, ARCHS["l3"].widths))})')
    parser.add_argument('--step', type=int, default=16,
                        help='widths are multiples of it (default: 16)')
    parser.add_argument('--rounds', type=int, default=7,
                        help='samples of each part (default: 7)')
    parser.add_argument('--check', type=int, default=20, metavar='N',
                        help='random networks to check predictions on; 0 checks nothing '
                        '(default: 20)')
    parser.add_argument('--seed', type=int, default=0, help='of these networks')
    parser.add_argument('--out', type=Path, metavar='FILE.json',
                        help='default: benchmarks/latency_RUNTIME_HxW.json')
    args = parser.parse_args()

    with exit_on_error():
        if args.check < 0 or args.check == 1:
            raise ValueError(f'check {args.check}: expected 0, or 2 networks or more')
        header = latency.new_header(args.runtime, args.shape, args.threads, args.max_widths,
                                    args.step, args.rounds)
        for package in latency.PACKAGES[args.runtime]:
            require(package, args.runtime)
        height, width = args.shape
        out = args.out or Path('benchmarks') / f'latency_{args.runtime}_{height}x{width}.json'
        if out.suffix != '.json':
            raise ValueError(f'{out}: a latency table ends in .json')
        table = latency.resumed(out, header)
        table.save(out)  # where it cannot be, that is better known now
    with Progress(TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(),
                  TimeElapsedColumn(), console=Console(stderr=True),
                  transient=True) as progress, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        task = progress.add_task('')

        def report(text: str, done: int, steps: int):
            progress.update(task, description=text, completed=done, total=steps)

        try:
            latency.measure(table, out, report)
            same = table.check and (table.check['count'], table.check['seed']) == (
                args.check, args.seed)
            if args.check and not same:
                table.check = latency.check(table, args.check, args.seed, report)
                table.save(out)
        except KeyboardInterrupt:
            missing = f'{len(table.missing())} parts are' if table.missing() else 'the check is'
            raise SystemExit(f'latency_table.py: stopped; {missing} missing, the same command '
                             'goes on') from None
    saved = [out]
    if args.check:
        saved.append(out.with_suffix('.png'))
        show(table, saved[-1])
    print(f'saved {" and ".join(map(str, saved))}: {len(table.entries)} entries')


def show(table: latency.LatencyTable, picture: Path):
    """Print predicted and measured times, and plot them."""
    found, console = table.check, Console()
    console = console if console.is_terminal else Console(width=120)
    rows = Table(title=f'{latency.title(table.header)}: predicted and measured',
                 caption=summary(found))
    for column in ('network', 'widths', 'depths', 'MB3D', 'predicted, ms', 'measured, ms',
                   'quartiles', 'error'):
        rows.add_column(column, justify='left' if column == 'network' else 'right')
    for each in found['networks']:
        rows.add_row(each['name'], *(' '.join(map(str, each[name]))
                                     for name in ('widths', 'depths', 'attention_blocks')),
                     f'{each["predicted_ms"]:.4g}', f'{each["measured_ms"]:.4g}',
                     f'{each["q1"]:.4g}–{each["q3"]:.4g}',
                     f'{each["predicted_ms"] / each["measured_ms"] - 1:+.1%}')
    console.print(rows)
    agreement([(each['name'], each['predicted_ms'], each['measured_ms'])
               for each in found['networks']], picture, latency.title(table.header),
              summary(found))


def summary(found: dict) -> str:
    return (f'median absolute error {found["median_error"]:.1%}, Spearman '
            f'{found["spearman"]:.3f}, {len(found["networks"])} networks')


if __name__ == '__main__':
    main()
