"""Find broken images, annotations and label maps before training does:

  python tools/check_data.py CONFIG

reads everything that the data sets of a config of mmdet or mmseg read, lists what is wrong by
kind, and tells what training does about it and what you can do. It ends with status 1 where
training would stop or be silently wrong, and with 0 where it handles what was found.
"""
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmeffformer.apis.options import KeyValues, exit_on_error, load_config
from mmeffformer.datasets import check_dataset, inspect
from mmeffformer.datasets.faults import KINDS
from mmeffformer.datasets.inspection import save_report


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file of mmdet or mmseg form')
    parser.add_argument('--data-root', help='use this folder wherever the config names its '
                        'data_root')
    parser.add_argument('--cfg-options', nargs='+', action=KeyValues, metavar='KEY=VALUE',
                        help='override config values')
    parser.add_argument('--splits', nargs='+', choices=['train', 'val', 'test'],
                        default=['train', 'val', 'test'], metavar='SPLIT',
                        help='of train, val and test (default: all that the config has)')
    parser.add_argument('--workers', type=int, default=min(8, os.cpu_count() or 1),
                        help='processes that read images (default: %(default)s here)')
    parser.add_argument('--show', type=int, default=20, metavar='N',
                        help='list at most so many of a kind (default: 20; --out has all)')
    parser.add_argument('--out', type=Path, metavar='FILE.json', help='save the whole list')
    # What load_config takes besides.
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    args = parser.parse_args()
    if args.workers < 1 or args.show < 1:
        parser.error('--workers and --show take numbers from 1 on')

    with exit_on_error((ValueError, OSError, RuntimeError)), Progress(
            TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(),
            TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        cfg = load_config(args)
        check_dataset(cfg, args.splits)
        task = progress.add_task('')

        def tell(text: str, done: int, images: int):
            progress.update(task, description=text, completed=done, total=images or None)

        report = inspect(cfg, args.splits, args.workers, tell)
        if args.out:
            save_report(report, args.out)
    for name, images in report.looked_at.items():
        print(f'{name}: {images:,} images')
    tell_faults(report.faults, args.show)
    sys.exit(int(any(fault.error for _, fault in report.faults)))


def tell_faults(faults: list, show: int):
    """Print all kinds of faults, errors first, and ``show`` of each."""
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
