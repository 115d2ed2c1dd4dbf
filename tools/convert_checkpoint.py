"""Convert checkpoints between layouts.

A detector or segmentor of the authors, for a config of this project:
  python tools/convert_checkpoint.py model.pth --config configs/detection/maskrcnn_effformer_l1.py
A backbone of any layout, to this project's or to another's:
  python tools/convert_checkpoint.py efficientformerv2_s0.pth --arch s0 --to timm
"""
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope

from mmeffformer.apis.options import exit_on_error, read_config
from mmeffformer.models import ARCHS, ARCHS_V2, backbone_named
from mmeffformer.utils.config import find_scope
from mmeffformer.utils.registry import MODELS
from mmeffformer.weights import LAYOUTS
from mmeffformer.weights.conversion import save_checkpoint, transfer_backbone, transfer_model


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help='path, URL or hf-hub:OWNER/NAME')
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument('--config', help='convert a whole detector or segmentor for this config')
    mode.add_argument('--arch', choices=[*ARCHS, *ARCHS_V2],
                      help='convert a backbone of this arch')
    parser.add_argument('--to', choices=[*LAYOUTS], default='mmeffformer', metavar='LAYOUT',
                        help=f'layout of a backbone: {", ".join(LAYOUTS)} (default: mmeffformer)')
    parser.add_argument('--prefix',
                        help='with --arch, the prefix of the keys of the backbone')
    parser.add_argument('--out', default='checkpoints', metavar='FOLDER',
                        help='folder of the new file (default: checkpoints/)')
    args = parser.parse_args()
    if args.config and (args.to != 'mmeffformer' or args.prefix):
        parser.error('--to and --prefix are options of --arch')

    with exit_on_error():
        if args.arch:
            kind = backbone_named(args.arch)
            checkpoint, report = transfer_backbone(args.checkpoint, kind.archs[args.arch],
                                                   args.to, args.prefix)
            path = save_checkpoint(checkpoint, args.out,
                                   f'{kind.__name__.lower()}_{args.arch}_{args.to}')
            print(f'{report}\nsaved as {path} (layout {args.to})')
            return
        cfg = read_config(args.config)
        if 'backbone' not in cfg.get('model', {}):
            raise ValueError(f'{args.config} has no model.backbone')
        cfg.model.backbone.init_cfg = None  # its weights would be replaced
        init_default_scope(find_scope(cfg))
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
        checkpoint = transfer_model(args.checkpoint, model)
        path = save_checkpoint(checkpoint, args.out, Path(args.config).stem)
        bias_mode = checkpoint['meta'].get('bias_mode')
        print(f'{len(checkpoint["state_dict"])} tensors saved as {path}. Evaluate them with\n'
              f'  python tools/test.py {args.config} {path}'
              + (f' --cfg-options model.backbone.bias_mode={bias_mode}' if bias_mode else ''))


if __name__ == '__main__':
    main()
