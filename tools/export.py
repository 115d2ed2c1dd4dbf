"""Export a trained model, and check the file against PyTorch:

  python tools/export.py CONFIG CHECKPOINT --to onnx --what model --shape 800 1344 --dynamic
"""
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from mmeffformer.apis.options import KeyValues, exit_on_error, read_config, require_file
from mmeffformer.deploy.export import export_checkpoint
from mmeffformer.deploy.graphs import PARTS
from mmeffformer.deploy.runtimes import HINTS, SUFFIXES, cpu_computes_in


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoint', help='file saved by tools/train.py')
    parser.add_argument('--to', choices=[*SUFFIXES], required=True)
    parser.add_argument('--what', choices=PARTS, default='model',
                        help='the backbone, the backbone and the neck, or all (default: model)')
    parser.add_argument('--shape', nargs=2, type=int, required=True, metavar=('H', 'W'),
                        help='input size in px; with --dynamic one of many')
    parser.add_argument('--dynamic', action='store_true',
                        help='take images of any size from 32 px (onnx and openvino)')
    parser.add_argument('--out', metavar='FILE',
                        help='what to write (default: in exported/, named after the config)')
    parser.add_argument('--precision', choices=['fp32', 'fp16', 'bf16'],
                        help='of weights and operators: onnx fp32 (default) or fp16, openvino '
                        'fp32 (default), fp16 or bf16, coreml fp16 (default) or fp32, executorch '
                        'fp32')
    parser.add_argument('--images', nargs='+', default=[], metavar='FILE',
                        help='compare on these, read by the test pipeline, besides random inputs '
                        '(default: two drawn ones)')
    parser.add_argument('--int8', action='store_true',
                        help='compute in int8 (onnx, openvino and executorch), calibrated on '
                        "images of the config's training set")
    parser.add_argument('--int8-images', type=int, default=100, metavar='N',
                        help='how many of these (default: 100)')
    parser.add_argument('--cfg-options', nargs='+', action=KeyValues, metavar='KEY=VALUE',
                        help='override config values, as model.test_cfg.rcnn.score_thr=0.3')
    args = parser.parse_args()

    with exit_on_error():
        cfg = read_config(args.config, args.cfg_options)
        if 'backbone' not in cfg.get('model', {}):
            raise ValueError(f'{args.config} has no model.backbone')
        out = args.out or (f'exported/{Path(args.config).stem}_{args.what}'
                           f'{SUFFIXES[args.to]}')
        compared = export_checkpoint(cfg, require_file(args.checkpoint, 'checkpoint'), out,
                                     args.to, args.what, args.shape, args.dynamic, args.images,
                                     args.int8_images if args.int8 else None, args.precision)
    print('\n'.join(map(str, compared)) or
          'checked: inputs, outputs, operators and types of the program. Its values are compared '
          'with PyTorch on macOS only, where Core ML runs')
    if args.to == 'openvino' and args.precision in HINTS and not cpu_computes_in(args.precision):
        print(f'This CPU computes the file in fp32: compare it again where a CPU has '
              f'{args.precision}')
    print(f'saved as {out}')


if __name__ == '__main__':
    main()
