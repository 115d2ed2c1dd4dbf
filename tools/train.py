"""Train: python tools/train.py configs/detection/maskrcnn_effformer_l1.py"""
from argparse import ArgumentParser

import torch
from mmengine.runner import Runner

from mmeffformer.cli import add_config_arguments, explained, load_config
from mmeffformer.datasets import check_dataset


def main():
    parser = ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='go on from this checkpoint, or from the newest in the work dir')
    parser.add_argument('--amp', nargs='?', const='float16', choices=['float16', 'bfloat16'],
                        help='train in mixed precision (on a GPU)')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help="scale the learning rate from the recipe's batch size to the actual")
    args = parser.parse_args()
    if args.amp and not torch.cuda.is_available():
        parser.error('--amp needs a GPU, and torch finds none here; leave it out')

    with explained():
        cfg = load_config(args)
        check_dataset(cfg, splits=('train', 'val'))
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if args.amp:
        cfg.optim_wrapper.update(type='AmpOptimWrapper', loss_scale='dynamic', dtype=args.amp)
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            parser.error(f'--auto-scale-lr: {args.config} does not say for which batch size its '
                         'learning rate is meant; add auto_scale_lr=dict(base_batch_size=...)')
        cfg.auto_scale_lr.enable = True
    Runner.from_cfg(cfg).train()


if __name__ == '__main__':
    main()
