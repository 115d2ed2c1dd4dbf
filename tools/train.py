"""Train: python tools/train.py configs/detection/maskrcnn_effformer_l1.py"""
from argparse import ArgumentParser, Namespace
from typing import Optional

import torch
from mmengine.config import Config

from mmeffformer.apis.options import (
    add_config_arguments,
    exit_on_error,
    load_config,
    require_file,
    require_keys,
)
from mmeffformer.datasets import check_dataset
from mmeffformer.engine.checkpoints import newest_checkpoint
from mmeffformer.engine.launch import exit_distributed
from mmeffformer.engine.runner import Runner
from mmeffformer.utils.errors import TrainingStopped
from mmeffformer.weights.compatibility import check_compatible
from mmeffformer.weights.fetch import locate


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='resume from this checkpoint; without a name, from the newest '
                        'complete one in the work dir, or start if the work dir has no checkpoint')
    parser.add_argument('--amp', nargs='?', const='float16', choices=['float16', 'bfloat16'],
                        help='train in mixed precision; float16 needs a GPU')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help="scale the learning rate from the recipe's batch size to the actual")
    parser.add_argument('--no-check', action='store_true',
                        help='do not check the data before training')
    args = parser.parse_args()
    if args.amp == 'float16' and not torch.cuda.is_available():
        parser.error('--amp float16 needs a GPU, and torch finds none here; use --amp bfloat16')
    return args


def prepare_config(cfg: Config, args: Namespace) -> Optional[str]:
    """Apply the options to the config, check the data and return the checkpoint to resume."""
    require_keys(cfg, 'train_dataloader', 'train_cfg', 'optim_wrapper')
    checkpoint = newest_checkpoint(cfg.work_dir) if args.resume == 'auto' else args.resume
    if checkpoint:
        cfg.resume, cfg.load_from = True, require_file(checkpoint, 'checkpoint')
        if 'backbone' in cfg.model:  # the checkpoint has all weights, so none are fetched
            cfg.model.backbone.init_cfg = None
    if args.amp == 'bfloat16':  # has the range of float32, so the loss needs no scale
        for name in ('dtype', 'loss_scale', 'use_fsdp'):
            cfg.optim_wrapper.pop(name, None)
        cfg.optim_wrapper.type = 'mmeffformer.Bf16OptimWrapper'
    elif args.amp:
        cfg.optim_wrapper.update(type='AmpOptimWrapper', loss_scale='dynamic', dtype=args.amp)
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise ValueError(f'--auto-scale-lr: {args.config} does not state the batch size of '
                             'its learning rate; add auto_scale_lr=dict(base_batch_size=)')
        cfg.auto_scale_lr.enable = True
    check_dataset(cfg, splits=('train', 'val'))
    return checkpoint


def fetch_weights(backbone: dict) -> None:
    """Fetch the weights that this project's backbone starts from, before the model is built."""
    init_cfg = backbone.get('init_cfg') or {}
    if str(backbone.get('type')).startswith('mmeffformer.') and 'checkpoint' in init_cfg:
        locate(init_cfg['checkpoint'])


def main():
    args = parse_args()
    with exit_on_error((ValueError, OSError, TrainingStopped)):
        cfg = load_config(args)
        checkpoint = prepare_config(cfg, args)
        fetch_weights(cfg.model.get('backbone') or {})
        runner = Runner.from_cfg(cfg)
        if checkpoint:
            check_compatible(runner.model, checkpoint)
        if not args.no_check:  # by every process: what it builds may wait for the others
            runner.check_data(('train', 'val'))
    with exit_on_error(TrainingStopped):
        runner.train()
    exit_distributed()


if __name__ == '__main__':
    main()
