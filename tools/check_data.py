"""Find broken images, annotations and label maps before training:

  python tools/check_data.py CONFIG

This reads all files of the data sets in an mmdet or mmseg config. It lists the faults by kind,
with their effect on training and the remedy. The exit status is 1 if training would stop or be
silently wrong, and 0 if training handles all faults.
"""
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from mmeffformer.apis.options import KeyValues, exit_on_error, load_config
from mmeffformer.datasets import check_dataset, inspect
from mmeffformer.datasets.faults import KINDS
from mmeffformer.datasets.inspection import save_report
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
    parser.add_argument('--workers', type=int, default=min(8, os.cpu_count() or 1),
                        help='processes that read images (default: %(default)s)')
    parser.add_argument('--show', type=int, default=20, metavar='N',
                        help='list at most N faults of a kind (default: 20; --out has all)')
    parser.add_argument('--out', type=Path, metavar='FILE.json', help='save the full list')
    # Other options that load_config reads.
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    args = parser.parse_args()
    if args.workers < 1 or args.show < 1:
        parser.error('--workers and --show: expected 1 or more')

    with exit_on_error((ValueError, OSError, RuntimeError)), progress_bar() as progress:
        cfg = load_config(args)
        check_dataset(cfg, args.splits)
        report = inspect(cfg, args.splits, args.workers, progress)
        if args.out:
            save_report(report, args.out)
    for name, images in report.looked_at.items():
        print(f'{name}: {images:,} images')
    print_faults(report.faults, args.show)
    sys.exit(int(any(fault.error for _, fault in report.faults)))


def print_faults(faults: list, show: int) -> None:
    """Print the faults by kind, errors first, at most ``show`` of each kind."""
    for kind, about in sorted(KINDS.items(), key=lambda item: not item[1].error):
        found = [(splits, fault) for splits, fault in faults if fault.kind == kind]
        if not found:
            continue
        print(f'\n{"error" if about.error else "note"}: {kind} ({len(found):,})\n'
              f'  training: {about.effect}\n  to do: {about.remedy}')
        for splits, fault in found[:show]:
            print(f'    {splits}: {fault}')
        if len(found) > show:
            print(f'    and {len(found) - show:,} more')
    errors = sum(fault.error for _, fault in faults)
    print(f'\nerrors: {errors:,}, notes: {len(faults) - errors:,}' if faults
          else '\nnothing is wrong')


if __name__ == '__main__':
    main()
