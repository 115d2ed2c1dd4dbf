"""Where the milliseconds of models go, by kind of operator:

  python tools/latency_profile.py l1 s0 timm:resnet50 --runtimes pytorch onnx openvino \\
      --shape 224 224 --out profiles/NAME

Models are as in tools/benchmark.py, l1:unfused for example. --observations times, besides or
instead, what the observations of the EfficientFormer paper (section 3) are about. The folder
--out receives results.json, results.md and a picture for each runtime.
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
from mmeffformer.latency import benchmark, observations, profile  # noqa: E402
from mmeffformer.latency.candidates import RUNTIMES, Setting, candidates  # noqa: E402
from mmeffformer.utils.plots import stacked_bars  # noqa: E402


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', metavar='MODEL',
                        help='l1, l3, l7, s0, s1, s2, l or timm:NAME, with options after a colon')
    parser.add_argument('--runtimes', nargs='+', choices=profile.RUNTIMES, default=['pytorch'],
                        metavar='NAME', help=f'{", ".join(profile.RUNTIMES)} (default: pytorch)')
    parser.add_argument('--observations', action='store_true',
                        help='time the pairs that the observations of the paper are about')
    parser.add_argument('--shape', nargs=2, type=int, default=(224, 224), metavar=('H', 'W'),
                        help='input size in px (default: 224 224)')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(),
                        help="of the CPU (default: torch's, %(default)s here)")
    parser.add_argument('--rounds', type=int, default=9,
                        help='samples of each model (default: 9)')
    parser.add_argument('--seed', type=int, default=0, help='of the order within rounds')
    parser.add_argument('--out', type=Path, metavar='DIR', help='default: profiles/ and the time')
    parser.add_argument('--render', action='store_true',
                        help='time nothing: make tables and pictures of the results.json in '
                        '--out')
    args = parser.parse_args()

    console = Console(stderr=True)
    with exit_on_error():
        if args.render:
            if not args.out or args.models or args.observations:
                raise ValueError('--render takes no models, and the folder of results in --out')
            return report(profile.load(args.out), args.out)
        if not args.models and not args.observations:
            raise ValueError('no model is given; for example: l1 s0 timm:resnet50')
        if args.rounds < 1:
            raise ValueError(f'rounds {args.rounds}: expected 1 or more')
        setting = Setting(tuple(args.shape), threads=args.threads)
        chosen = [candidate for spec in args.models
                  for candidate in candidates(spec, args.runtimes, setting=setting)]
        for candidate in chosen:
            profile.check(candidate)
        for runtime in args.runtimes:
            profile.require_packages(runtime)
    out = args.out or Path('profiles') / f'{datetime.now():%Y%m%d_%H%M%S}'
    with Progress(TextColumn('{task.description}'), BarColumn(), TimeElapsedColumn(),
                  console=console, transient=True) as progress, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        task = progress.add_task('')

        def tell(text: str, done: int, steps: int):
            progress.update(task, description=text, completed=done, total=steps)

        results = profile.run(chosen, setting, args.rounds, args.seed, out, tell)
        if args.observations:
            observations.observe(results, setting, args.runtimes, args.rounds, args.seed, out,
                                 tell)
    report(results, out)
    if chosen and not any(entry['whole_ms'] for entry in results['candidates']):
        raise SystemExit('latency_profile.py: nothing was profiled')


def report(results: dict, out: Path):
    """Print the tables, and save them and the pictures beside ``results.json``."""
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    about = '\n'.join(benchmark.about(results))
    for made, notes in ((profile.table, '\n'.join(profile.NOTES)),
                        (observations.table, observations.NOTE)):
        columns, rows = made(results)
        if rows:
            table = Table(title=benchmark.title(results), caption=f'{notes}\n{about}')
            for column in columns:
                table.add_column(column, overflow='fold')
            for row in rows:
                table.add_row(*row)
            console.print(table, markup=False)
    saved = [out / 'results.json', out / 'results.md']
    saved[1].write_text(profile.markdown(results))
    for runtime, bars in profile.bars(results).items():
        saved.append(out / f'{runtime}.png')
        stacked_bars(bars, 'ms, by kind of operator',
                     f'{RUNTIMES[runtime]}: {benchmark.title(results).lower()}', saved[-1],
                     'without profiler', f'{benchmark.machine(results)}; shares are of the sum')
    print(f'saved {", ".join(map(str, saved))}')


if __name__ == '__main__':
    main()
