"""Measure the time of models by kind of operator:

  python tools/analysis_tools/latency_profile.py l1 s0 timm:resnet50 \\
      --runtimes pytorch onnx openvino --shape 224 224 --out profiles/NAME

Models are written as for tools/benchmark.py, for example l1:unfused. --observations times the
comparisons of the four observations in the EfficientFormer paper (section 3), also without
models. The folder --out receives results.json, results.md and a picture for each runtime.
"""
import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from datetime import datetime
from pathlib import Path

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler logs every start and stop

from mmeffformer.apis.options import add_timing_arguments, exit_on_error  # noqa: E402
from mmeffformer.latency import observations, operators  # noqa: E402
from mmeffformer.latency.candidates import (  # noqa: E402
    DTYPES,
    RUNTIMES,
    Setting,
    candidates,
)
from mmeffformer.latency.exported import require_packages  # noqa: E402
from mmeffformer.latency.results import machine, markdown, notes, title  # noqa: E402
from mmeffformer.utils.console import print_table, progress_bar  # noqa: E402
from mmeffformer.utils.plots import stacked_bars  # noqa: E402


def parse_args():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', metavar='MODEL',
                        help='l1, l3, l7, s0, s1, s2, l or timm:NAME, with options after a colon')
    parser.add_argument('--runtimes', nargs='+', choices=operators.RUNTIMES, default=['pytorch'],
                        metavar='NAME', help=f'{", ".join(operators.RUNTIMES)} (default: pytorch)')
    parser.add_argument('--observations', action='store_true',
                        help="time the comparisons of the paper's observations")
    add_timing_arguments(parser, rounds=9)
    parser.add_argument('--batch', type=int, default=1, help='images at once (default: 1)')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument('--dtype', choices=DTYPES, default='fp32',
                        help='precision of models that name none (default: fp32)')
    parser.add_argument('--seed', type=int, default=0, help='of the order within rounds')
    parser.add_argument('--out', type=Path, metavar='DIR', help='default: profiles/ and the time')
    return parser.parse_args()


def main():
    args = parse_args()
    with exit_on_error():
        if not args.models and not args.observations:
            raise ValueError('no model is given; for example: l1 s0 timm:resnet50')
        if args.rounds < 1:
            raise ValueError(f'rounds {args.rounds}: expected 1 or more')
        if args.observations and args.device != 'cpu':
            raise ValueError('--observations is for --device cpu')
        setting = Setting(tuple(args.shape), args.batch, args.threads, args.device)
        chosen = [candidate for spec in args.models
                  for candidate in candidates(spec, args.runtimes, args.dtype, setting)]
        for each in chosen:
            if each.is_whole:
                raise ValueError(f'{each.model}: expected backbones; tools/benchmark.py times the '
                                 'parts of whole models')
        for runtime in dict.fromkeys([*args.runtimes, *(each.runtime for each in chosen)]):
            if runtime not in operators.RUNTIMES:
                raise ValueError(f'{runtime} does not report the time of each operator; choose '
                                 f'from {", ".join(operators.RUNTIMES)}')
            require_packages(runtime)
    out = args.out or Path('profiles') / f'{datetime.now():%Y%m%d_%H%M%S}'
    with progress_bar() as progress:
        results = operators.run(chosen, setting, args.rounds, args.seed, out, progress)
        if args.observations:
            observations.observe(results, setting, args.runtimes, out, progress)
    report(results, out)
    if chosen and not any(entry['samples_ms'] for entry in results['candidates']):
        raise SystemExit('latency_profile.py: nothing was profiled')


def report(results: dict, out: Path):
    """Print the tables, and save them and the pictures in the folder of ``results.json``."""
    tables = []
    for module in (operators, observations):
        columns, rows = module.table(results)
        if rows:
            print_table(title(results), columns, rows,
                        '\n'.join([module.LEGEND, *notes(results)]))
            tables.append((columns, rows, module.LEGEND))
    saved = [out / 'results.json', out / 'results.md']
    saved[1].write_text(markdown(results, *tables))
    for runtime in operators.RUNTIMES:
        if bars := operators.bars(results, runtime):
            saved.append(out / f'{runtime}.png')
            stacked_bars(bars, 'ms, by kind of operator',
                         f'{RUNTIMES[runtime]}: {title(results).lower()}', saved[-1],
                         'without profiler', f'{machine(results)}; shares are of the sum')
    print(f'saved {", ".join(map(str, saved))}')


if __name__ == '__main__':
    main()
