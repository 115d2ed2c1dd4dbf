"""Write a config for your own images and annotations:

    python tools/new_config.py --task det --data photos/ --out my_config.py
    python tools/new_config.py --task seg --data scans/ --classes background cell

The folder may have any layout: COCO JSON, VOC XML, YOLO or LabelMe files for detection, label
maps for segmentation. docs/guides/your_own_data.md lists what is found, and what is written.
"""
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from mmeffformer.apis.new_config import ARCHS, new_config
from mmeffformer.apis.new_config.preview import check, draw_examples
from mmeffformer.apis.options import exit_on_error
from mmeffformer.datasets.own_data.files import Options
from mmeffformer.datasets.own_data.objects import FORMATS
from mmeffformer.utils import plots


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('--task', required=True, choices=['det', 'seg'],
                        help='detection (with masks if the objects have outlines) or semantic '
                        'segmentation')
    parser.add_argument('--data', required=True, type=Path, metavar='FOLDER')
    parser.add_argument('--arch', default='l1', choices=ARCHS, help='backbone (default: l1)')
    parser.add_argument('--out', type=Path, metavar='FILE.py',
                        help='config to write (default: FOLDER_TASK_ARCH.py)')
    parser.add_argument('--overwrite', action='store_true', help='replace an existing config')
    parser.add_argument('--weights', default='pretrained', choices=['pretrained', 'none'],
                        help='start from ImageNet weights if they can be fetched (default), or '
                        'from scratch')
    parser.add_argument('--preview', action='store_true',
                        help='draw a page of training images with their annotations')
    unclear = parser.add_argument_group('what the folder may leave open')
    unclear.add_argument('--annotations', nargs='+', type=Path, default=[], metavar='PATH',
                         help='files or folders of the annotations: one, or TRAIN VAL')
    unclear.add_argument('--images', nargs='+', type=Path, default=[], metavar='FOLDER',
                         help='folder of the images: one, or TRAIN VAL')
    unclear.add_argument('--format', choices=FORMATS, help='format of the objects to use')
    unclear.add_argument('--target', choices=['boxes', 'masks'],
                         help='what to train if only some objects have masks')
    unclear.add_argument('--label-suffix', metavar='TEXT',
                         help='end of the names of the label maps, such as _labelTrainIds.png')
    unclear.add_argument('--classes', nargs='+', default=[], metavar='NAME',
                         help='classes in the order of their ids or values; or a file with a name '
                         '(and R G B) per line; or a data set of mmseg, such as cityscapes')
    unclear.add_argument('--void', metavar='LABEL',
                         help='value or class that is ignored in label maps, or none')
    unclear.add_argument('--val-share', type=float, default=.2, metavar='SHARE',
                         help='share of the images to validate on, if there is no validation '
                         'split (default: 0.2)')
    unclear.add_argument('--seed', type=int, default=0, help='of that split (default: 0)')
    args = parser.parse_args()
    if not 0 < args.val_share < 1:
        parser.error(f'--val-share {args.val_share}: expected a number between 0 and 1')
    args.out = args.out or Path(f'{args.data.resolve().name}_{args.task}_{args.arch}.py')
    return args


def within(root: Path, paths: list, option: str) -> tuple:
    """Return the absolute paths, given relative to the current folder or to ``root``."""
    if len(paths) > 2:
        raise ValueError(f'{option}: expected one path, or two for TRAIN VAL, got {len(paths)}')
    found = [path.resolve() if path.exists() else (root / path).resolve() for path in paths]
    for path in found:
        if not path.exists() or not path.is_relative_to(root.resolve()):
            raise FileNotFoundError(f'{option} {path} does not exist in --data {root}')
    return tuple(found)


def main() -> None:
    args = parse_args()
    with exit_on_error():
        if not args.data.is_dir():
            raise FileNotFoundError(f'--data {args.data} is not a folder')
        if args.out.suffix != '.py':
            raise ValueError(f'--out {args.out} must end in .py')
        if args.out.exists() and not args.overwrite:
            raise ValueError(f'{args.out} exists; choose another --out, or add --overwrite')
        options = Options(
            within(args.data, args.annotations, '--annotations'),
            within(args.data, args.images, '--images'), args.format, args.target,
            args.label_suffix, tuple(args.classes), args.void, args.val_share, args.seed)
        written = new_config(args.task, args.data, args.out, args.arch,
                             args.weights == 'pretrained', options)
        folder = args.out.with_name(f'{args.out.stem}_data')
        if written.sizes is not None:
            plots.histogram(written.sizes, folder / 'object_sizes.png',
                            'side of the training objects, px, when images are resized to '
                            f'{written.scale[0]} x {written.scale[1]}')
        if args.preview:
            draw_examples(args.out, folder / 'preview.png')
        report = check(args.out)
    for kind, lines in (('note', written.log.notes), ('warning', written.log.warnings),
                        *report.items()):
        for line in lines:
            print(f'{kind}: {line}')
    print_commands(args, written)
    sys.exit(int(bool(report['error'])))


def print_commands(args: Namespace, written) -> None:
    work_dir = f'work_dirs/{args.out.stem}'
    checkpoint = f'{work_dir}/iter_{written.num_steps}.pth'
    height, width = sorted(written.scale)
    print(f'\n{args.out} is written. To train, evaluate with pictures, predict and export:\n'
          f'  python tools/train.py {args.out}\n'
          f'  python tools/test.py {args.out} {checkpoint} --show-dir {work_dir}/pictures\n'
          f'  python tools/infer.py {args.out} {checkpoint} {written.examples} --limit 16 '
          f'--page predictions.png\n'
          f'  python tools/export.py {args.out} {checkpoint} --to onnx --what model '
          f'--shape {height} {width}')


if __name__ == '__main__':
    main()
