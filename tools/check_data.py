"""Check that training and evaluation can use the data of a config:

  python tools/check_data.py CONFIG

This builds each data set as training does, and sends every sample through its own pipeline and
the ground truth through the evaluator. It prints what is wrong, what is left out, and how many
objects of each class remain. The exit status is 1 if there are errors.
"""
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from mmeffformer.apis.options import KeyValues, exit_on_error, load_config
from mmeffformer.datasets import check_data, check_dataset
from mmeffformer.utils.console import progress_bar


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file for mmdet or mmseg')
    parser.add_argument('--data-root', help='folder that replaces data_root throughout the config')
    parser.add_argument('--cfg-options', nargs='+', action=KeyValues, metavar='KEY=VALUE',
                        help='override config values')
    parser.add_argument('--splits', nargs='+', choices=['train', 'val', 'test'],
                        default=['train', 'val', 'test'], metavar='SPLIT',
                        help='some of train, val and test (default: all in the config)')
    parser.add_argument('--limit', type=int, metavar='N',
                        help='check N samples of each data set (default: all)')
    parser.add_argument('--workers', type=int, default=min(8, os.cpu_count() or 1),
                        help='processes that prepare samples (default: %(default)s)')
    # Other options that load_config reads.
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    args = parser.parse_args()
    if args.workers < 1 or (args.limit or 1) < 1:
        parser.error('--workers and --limit: expected 1 or more')

    with exit_on_error((ValueError, OSError, RuntimeError)):
        cfg = load_config(args)
        check_dataset(cfg, args.splits)
        with progress_bar() as progress:
            report = check_data(cfg, args.splits, args.limit, args.workers, progress)
    print(report)
    sys.exit(bool(report.errors))


if __name__ == '__main__':
    main()
