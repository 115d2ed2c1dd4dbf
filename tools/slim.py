"""Search a trained supernet for a network of a given latency:

  python tools/train.py configs/search/semfpn_super_shapes.py
  python tools/latency_table.py --shape 192 192 --out benchmarks/shapes.json
  python tools/slim.py configs/search/semfpn_super_shapes.py CHECKPOINT \\
      --table benchmarks/shapes.json --target 50%

The work dir (default: work_dirs/CONFIG_slim) receives journal.json (all evaluations and steps),
slimmed.py (a config that trains the network found) with slimmed.pth (its initial weights), and
path.png. The same command resumes a search that was killed. --baselines adds uniform.py and
random.py, with their weights, for comparison.
"""
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from typing import Optional, Tuple, Union

from mmeffformer.apis.options import add_config_arguments, exit_on_error, load_config, require_file
from mmeffformer.datasets import check_dataset
from mmeffformer.models import ARCHS
from mmeffformer.search.baselines import baselines
from mmeffformer.search.result import finish
from mmeffformer.search.search import Search, Share


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint of the supernet, saved by tools/train.py')
    parser.add_argument('--table', required=True, help='file of tools/latency_table.py')
    parser.add_argument('--target', type=target, required=True, metavar='MS',
                        help="latency to reach, ms or a share of the supernet's: 6.5 or 50%%")
    parser.add_argument('--metric', help='metric of the evaluator that counts, such as mIoU '
                        '(default: the first known one)')
    parser.add_argument('--batches', type=int, default=8, help='number of training batches '
                        'for the ranking of channels and BatchNorm statistics (default: 8)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--rounds', type=int, default=9, help='samples of each network '
                        'measured; 0 measures none (default: 9)')
    parser.add_argument('--baselines', action='store_true', help='also narrow the supernet '
                        'uniformly, and search randomly with as many evaluations')
    parser.add_argument('--beside', nargs='*', default=['l1', 'l3'], metavar='NAME[=METRIC]',
                        help='networks to measure and plot for comparison (default: l1 l3)')
    args = parser.parse_args()
    if args.launcher != 'none':
        parser.error(f'--launcher {args.launcher}: expected none, a search runs in one process')

    try:
        run(args)
    except KeyboardInterrupt:
        raise SystemExit('slim.py: stopped; the same command resumes') from None


def run(args: Namespace):
    with exit_on_error():
        if args.rounds < 0:
            raise ValueError(f'--rounds {args.rounds}: expected 0 or more')
        references = dict(map(network, args.beside))
        cfg = load_config(args)
        if not args.work_dir:  # not that of the supernet's training
            cfg.work_dir += '_slim'
        require_file(args.checkpoint, 'checkpoint')
        check_dataset(cfg, splits=('train', 'val'))
        search = Search(cfg, args.checkpoint, args.table, args.target, args.metric, args.batches,
                        args.seed)
    steps = search.slim(args.rounds)
    others = baselines(search) if args.baselines else {}
    finish(search, steps, others, references, args.rounds)


def network(word: str) -> Tuple[str, Optional[float]]:
    """Return name and metric of a word of --beside."""
    name, _, metric = word.partition('=')
    try:
        if name in ARCHS:
            return name, float(metric) if metric else None
    except ValueError:
        pass
    raise ValueError(f'--beside {word!r}: expected one of {", ".join(ARCHS)}, such as l1 or '
                     'l1=38.9')


def target(text: str) -> Union[float, Share]:
    """Return --target as ms or a share."""
    return Share(float(text[:-1]) / 100) if text.endswith('%') else float(text)


if __name__ == '__main__':
    main()
