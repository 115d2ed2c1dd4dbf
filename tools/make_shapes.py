#!/usr/bin/env python
"""Draw a data set of shapes, to try a detector or a segmentor without downloads."""
import argparse
import sys

from mmeffformer.datasets import write_ade20k, write_coco


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', help='folder to create')
    parser.add_argument('--layout', choices=('coco', 'coco2017', 'ade20k'), default='coco',
                        help="coco: six categories; coco2017: COCO's own names and categories")
    parser.add_argument('--train', type=int, default=200, help='number of training images')
    parser.add_argument('--val', type=int, default=50, help='number of validation images')
    parser.add_argument('--size', type=int, nargs=2, metavar=('H', 'W'),
                        help='px (default: 320 320; with coco2017 the usual sizes in COCO)')
    parser.add_argument('--seed', type=int, default=0)
    return parser.parse_args()


def main():
    args = parse_args()
    options = dict(train=args.train, val=args.val, seed=args.seed)
    if args.size:
        options['size'] = tuple(args.size)
    try:
        if args.layout == 'ade20k':
            root = write_ade20k(args.out, **options)
        else:
            root = write_coco(args.out, coco2017=args.layout == 'coco2017', **options)
    except ValueError as error:
        sys.exit(f'make_shapes.py: {error}')
    print(f'{args.train} + {args.val} images in {root}')


if __name__ == '__main__':
    main()
