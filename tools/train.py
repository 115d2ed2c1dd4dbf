"""Train: python tools/train.py configs/detection/maskrcnn_effformer_l1.py"""
from argparse import ArgumentParser

import torch

from mmeffformer.apis.options import (
    add_config_arguments,
    exit_on_error,
    finish_distributed,
    is_local_main_process,
    load_config,
    require_file,
)
from mmeffformer.datasets import check_annotations, check_dataset
from mmeffformer.engine.checkpoints import newest_checkpoint
from mmeffformer.engine.runner import Runner
from mmeffformer.utils.errors import TrainingStopped
from mmeffformer.weights.compatibility import check_compatible
from mmeffformer.weights.fetch import locate


def main():
    parser = ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='go on from this checkpoint, or from the newest whole one in the '
                        'work dir, or from the start where there is none')
    parser.add_argument('--amp', nargs='?', const='float16', choices=['float16', 'bfloat16'],
                        help='train in mixed precision; float16 on a GPU only')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help="scale the learning rate from the recipe's batch size to the actual")
    args = parser.parse_args()
    if args.amp == 'float16' and not torch.cuda.is_available():
        parser.error('--amp float16 needs a GPU, and torch finds none here; use --amp bfloat16')

    with exit_on_error((ValueError, OSError, TrainingStopped)):
        cfg = load_config(args)
        checkpoint = args.resume
        if args.resume == 'auto':
            checkpoint = newest_checkpoint(cfg.work_dir)
        if checkpoint:
            cfg.resume, cfg.load_from = True, require_file(checkpoint, 'checkpoint')
            if 'backbone' in cfg.model:  # what it started from is not needed, so not fetched
                cfg.model.backbone.init_cfg = None
        check_dataset(cfg, splits=('train', 'val'))
        if is_local_main_process(args):
            check_annotations(cfg, splits=('train', 'val'))
        fetch_weights(cfg.model.get('backbone') or {})
        if args.amp == 'bfloat16':  # has the range of float32, so losses need no scale
            for name in ('dtype', 'loss_scale', 'use_fsdp'):
                cfg.optim_wrapper.pop(name, None)
            cfg.optim_wrapper.type = 'mmeffformer.Bf16OptimWrapper'
        elif args.amp:
            cfg.optim_wrapper.update(type='AmpOptimWrapper', loss_scale='dynamic',
                                     dtype=args.amp)
        if args.auto_scale_lr:
            if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
                raise ValueError(f'--auto-scale-lr: {args.config} does not say for which batch '
                                 'its learning rate is; add auto_scale_lr=dict(base_batch_size=)')
            cfg.auto_scale_lr.enable = True
        runner = Runner.from_cfg(cfg)
        if checkpoint:
            check_compatible(runner.model, checkpoint)
    with exit_on_error(TrainingStopped):
        runner.train()
    finish_distributed()


def fetch_weights(backbone: dict):
    """Fetch what one of our backbones starts from while an error can still be told briefly."""
    init_cfg = backbone.get('init_cfg') or {}
    if str(backbone.get('type')).startswith('mmeffformer.') and 'checkpoint' in init_cfg:
        locate(init_cfg['checkpoint'])


if __name__ == '__main__':
    main()
