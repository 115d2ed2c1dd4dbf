"""Put an EfficientFormer into a config of mmdet or mmseg.

    python tools/swap_backbone.py mmdet::retinanet/retinanet_r50_fpn_1x_coco.py --arch l3 \
        --out work_dirs/retinanet_effformer_l3.py

The written config has no base; pass it to tools/train.py. docs/guides/swap.md lists what changes
and which configs are known to work.
"""
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from mmengine.fileio import load

from mmeffformer import swap_backbone
from mmeffformer.apis.options import KeyValues, exit_on_error, read_config, require_file


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file, or LIBRARY::PATH of one that comes with '
                        'mmdet or mmseg')
    parser.add_argument('--arch', required=True, help='l1, l3, l7, s0, s1, s2, l, or a JSON file '
                        'with the keys of a dict arch (and "type": "EfficientFormerV2" for a V2)')
    parser.add_argument('--out', type=Path, required=True, help='config file to write')
    parser.add_argument('--options', nargs='+', action=KeyValues, default={}, metavar='KEY=VALUE',
                        help='further arguments of the backbone, as drop_path_rate=0.1')
    args = parser.parse_args()

    with exit_on_error():
        if args.out.suffix != '.py':
            raise ValueError(f'--out {args.out} must end in .py')
        cfg = read_config(args.config)
        arch, options = args.arch, dict(args.options)
        if arch.endswith('.json'):
            arch = load(require_file(arch, 'arch'))
            if not isinstance(arch, dict):
                raise ValueError(f'{args.arch}: expected a dict of widths, depths, ...')
            options.update({'type': arch.pop('type')} if 'type' in arch else {})
        cfg = swap_backbone(cfg, arch, **options)
        args.out.parent.mkdir(parents=True, exist_ok=True)
    cfg.dump(args.out)
    print(f'{args.out} is written; to train it: python tools/train.py {args.out}')


if __name__ == '__main__':
    main()
