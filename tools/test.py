"""Evaluate a checkpoint: python tools/test.py CONFIG work_dirs/NAME/epoch_12.pth"""
from argparse import ArgumentParser
from pathlib import Path

from mmengine.evaluator import DumpResults
from mmengine.runner import Runner

from mmeffformer.cli import add_config_arguments, explained, load_config
from mmeffformer.datasets import check_dataset


def main():
    parser = ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='file saved by tools/train.py')
    parser.add_argument('--out', help='also save the predictions to this .pkl file')
    parser.add_argument('--show-dir', help='also save pictures of the predictions to this folder')
    args = parser.parse_args()
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out {args.out!r} must end in .pkl or .pickle')

    with explained():
        cfg = load_config(args)
        if not Path(args.checkpoint).is_file() and '://' not in args.checkpoint:
            raise FileNotFoundError(f'checkpoint {args.checkpoint!r} does not exist')
        check_dataset(cfg, splits=('test',))
    cfg.load_from = args.checkpoint
    # The checkpoint holds every weight, so what the backbone started from is not fetched.
    cfg.model.backbone.init_cfg = None
    if args.show_dir:
        if 'visualization' not in cfg.default_hooks:
            parser.error('--show-dir: the config has no default_hooks.visualization to draw with')
        cfg.default_hooks.visualization.draw = True
        cfg.visualizer.save_dir = args.show_dir
    runner = Runner.from_cfg(cfg)
    if args.out:
        runner.test_evaluator.metrics.append(DumpResults(args.out))
    runner.test()


if __name__ == '__main__':
    main()
