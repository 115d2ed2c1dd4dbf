"""Draw predictions on images and videos: python tools/infer.py CONFIG CHECKPOINT photos/"""
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.progress import track

from mmeffformer.apis import inference
from mmeffformer.apis.options import KeyValues, exit_on_error, read_config
from mmeffformer.utils import plots


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('inputs', nargs='+', help='images, folders or videos')
    parser.add_argument('--out-dir', type=Path, default=Path('predictions'),
                        help='folder for the drawn files (default: predictions/)')
    parser.add_argument('--score-thr', type=float, default=0.3,
                        help='draw detections with at least this score (default: 0.3)')
    parser.add_argument('--device', default='cpu', help='cpu (default), cuda:0, ...')
    parser.add_argument('--limit', type=int, help='draw on the first LIMIT files only')
    parser.add_argument('--page', type=Path, metavar='FILE.png',
                        help=f'also save the first {plots.MAX_ON_A_PAGE} images on one page')
    parser.add_argument('--cfg-options', nargs='+', action=KeyValues, metavar='KEY=VALUE',
                        help='override config values')
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        parser.error(f'--limit {args.limit}: expected 1 or more')
    return args


def main() -> None:
    args = parse_args()
    with exit_on_error():
        cfg = read_config(args.config, args.cfg_options)
        media = inference.find_media(args.inputs, args.out_dir,
                                     inference.reads_any_file(cfg))[:args.limit]
        draw = inference.load_drawer(cfg, args.checkpoint, args.device, args.score_thr)
        inference.make_folder(args.out_dir)
        images, failed = [], []
        for source, target in track(media, description='drawing'):
            try:
                if source.suffix.lower() in inference.VIDEO_SUFFIXES:
                    inference.draw_video(draw, source, target)
                else:
                    drawn = inference.draw_image(draw, source, target)
                    if args.page and len(images) < plots.MAX_ON_A_PAGE:
                        images.append(drawn[..., ::-1])
            except inference.PictureError as error:
                failed.append(f'{source} {error}')
        if images:
            plots.page(images, args.page)
    print(f'{len(media) - len(failed)} drawn files are in {args.out_dir}' +
          (f', images together in {args.page}' if images else ''))
    if failed:
        sys.exit('\n'.join([*failed, f'infer.py: {len(failed)} of {len(media)} files failed']))


if __name__ == '__main__':
    main()
