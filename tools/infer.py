"""Draw predictions on images and videos: python tools/infer.py CONFIG CHECKPOINT photos/

By an exported file: python tools/infer.py CONFIG photos/ --backend onnx --model FILE.onnx
"""
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import List, Sequence, Tuple

import numpy as np

from mmeffformer.apis import inference
from mmeffformer.apis.options import (
    KeyValues,
    add_inference_arguments,
    check_inference_arguments,
    exit_on_error,
    read_config,
)
from mmeffformer.deploy.runtimes import ExportedFile
from mmeffformer.utils import plots
from mmeffformer.utils.console import RateColumn, progress_bar


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('inputs', nargs='+', metavar='file',
                        help='the checkpoint (not with --model), then images, folders or videos')
    add_inference_arguments(parser)
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
    args.checkpoint = None if args.model else args.inputs.pop(0)
    check_inference_arguments(parser, args)
    if not args.inputs:
        parser.error('give images, folders or videos after the checkpoint')
    if args.model and args.device != 'cpu':
        parser.error(f'--device {args.device} is for a checkpoint; an exported file runs on CPUs')
    return args


def draw_all(draw: inference.Draw, media: Sequence[Tuple[Path, Path]]
             ) -> Tuple[List[np.ndarray], List[str], float]:
    """Draw on all files, with a progress bar.

    Returns:
        The first drawn images, as many as fit on a page; the files that failed, with the reason;
        and how many images and frames were read, drawn and saved per second.
    """
    images, failed, done = [], [], 0
    total = sum(inference.count_frames(source) for source, _ in media)
    start = time.perf_counter()
    with progress_bar(RateColumn()) as progress:

        def draw_next(image: inference.Image) -> np.ndarray:
            nonlocal done
            drawn = draw(image)
            done += 1
            progress(source.name, done, total)
            return drawn

        for source, target in media:
            try:
                if source.suffix.lower() in inference.VIDEO_SUFFIXES:
                    inference.draw_video(draw_next, source, target)
                else:
                    drawn = inference.draw_image(draw_next, source, target)
                    if len(images) < plots.MAX_ON_A_PAGE:
                        images.append(drawn[..., ::-1])
            except inference.PictureError as error:
                failed.append(f'{source} {error}')
    return images, failed, done / (time.perf_counter() - start)


def main() -> None:
    args = parse_args()
    with exit_on_error():
        cfg = read_config(args.config, args.cfg_options)
        media = inference.find_media(args.inputs, args.out_dir,
                                     inference.reads_any_file(cfg))[:args.limit]
        checkpoint = ExportedFile(args.model, args.backend) if args.model else args.checkpoint
        draw = inference.load_drawer(cfg, checkpoint, args.device, args.score_thr, args.dtype)
        inference.make_folder(args.out_dir)
        images, failed, rate = draw_all(draw, media)
        if args.page and images:
            plots.page(images, args.page)
    print(f'{len(media) - len(failed)} drawn files are in {args.out_dir}' +
          (f', images together in {args.page}' if args.page and images else '') +
          f'; {rate:.3g} images or frames per second')
    if failed:
        sys.exit('\n'.join([*failed, f'infer.py: {len(failed)} of {len(media)} files failed']))


if __name__ == '__main__':
    main()
