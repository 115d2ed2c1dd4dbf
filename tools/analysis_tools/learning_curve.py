"""Plot the losses and metrics of a run:
python tools/analysis_tools/learning_curve.py WORK_DIR"""
from argparse import ArgumentParser
from pathlib import Path

from mmeffformer.apis.options import exit_on_error
from mmeffformer.utils.plots import learning_curve


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('work_dir', type=Path, help='work dir of tools/train.py')
    parser.add_argument('--out', type=Path, help='default: WORK_DIR/learning_curve.png')
    args = parser.parse_args()
    out = args.out or args.work_dir / 'learning_curve.png'
    with exit_on_error():
        learning_curve(args.work_dir, out)
    print(f'saved {out}')


if __name__ == '__main__':
    main()
