"""Draw predictions on images and videos: python tools/infer.py CONFIG CHECKPOINT photos/"""
from argparse import ArgumentParser
from pathlib import Path

from mmengine.config import Config
from rich.progress import track

from mmeffformer import inference, plots
from mmeffformer.cli import explained


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('inputs', nargs='+', help='images, folders or videos')
    parser.add_argument('--out-dir', type=Path, default=Path('predictions'),
                        help='where the drawn files go (default: predictions/)')
    parser.add_argument('--score-thr', type=float, default=0.3,
                        help='draw detections from this score on (default: 0.3)')
    parser.add_argument('--device', default='cpu', help='cpu (default), cuda:0, ...')
    parser.add_argument('--limit', type=int, help='only so many of the files')
    parser.add_argument('--page', type=Path, metavar='FILE.png',
                        help='also save all drawn images on one page')
    args = parser.parse_args()

    with explained():
        media = inference.find_media(args.inputs)[:args.limit]
        draw = inference.load_drawer(Config.fromfile(args.config), args.checkpoint, args.device,
                                     args.score_thr)
    images = []
    for path in track(media, description='drawing'):
        if path.suffix.lower() in inference.VIDEO_SUFFIXES:
            inference.draw_video(draw, path, args.out_dir / f'{path.stem}.mp4')
        else:
            drawn = inference.draw_image(draw, path, args.out_dir / path.name)
            if args.page:
                images.append(drawn[..., ::-1])
    if images:
        plots.page(images, args.page)
    print(f'{len(media)} drawn files are in {args.out_dir}' +
          (f', all images together in {args.page}' if images else ''))


if __name__ == '__main__':
    main()
