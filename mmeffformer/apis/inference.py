"""Drawing of the predictions of a detector or segmentor on images and videos."""
import warnings
from pathlib import Path
from typing import Callable, Dict, List, Sequence, Tuple

import cv2
import numpy as np
from mmcv import VideoReader
from mmengine.config import Config
from mmengine.registry import VISUALIZERS, init_default_scope

from ..utils.config import dataset_metainfo
from ..weights.compatibility import load_compatible
from .options import require_file

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
VIDEO_SUFFIXES = ('.mp4', '.avi', '.mov', '.mkv', '.webm')


class UnreadableError(ValueError):
    """A file is not the image or video that its suffix promises."""


Draw = Callable[[np.ndarray], np.ndarray]


def load_drawer(cfg: Config, checkpoint: str, device: str = 'cpu', score_thr: float = 0.3) -> Draw:
    """Return a function that draws the predictions for an image on a copy of it.

    Images are uint8 (H, W, 3) in BGR order, as cv2 reads them.

    Args:
        cfg: A config with ``default_scope`` 'mmdet' or 'mmseg'.
        checkpoint: The file with its weights.
        device: Device of the model, for example 'cpu' or 'cuda:0'.
        score_thr: Detections below this score are not drawn.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: The config is for neither detection nor segmentation, or the checkpoint does
            not fit its model.
    """
    scope = cfg.get('default_scope')
    if scope == 'mmdet':
        from mmdet.apis import inference_detector as predict
        from mmdet.apis import init_detector as load
        options = dict(draw_gt=False, pred_score_thr=score_thr)
    elif scope == 'mmseg':
        from mmseg.apis import inference_model as predict
        from mmseg.apis import init_model as load
        options = dict(draw_gt=False, with_labels=False)
    else:
        raise ValueError(f'config with default_scope {scope!r}: expected mmdet or mmseg')
    require_file(checkpoint, 'checkpoint')
    with warnings.catch_warnings(record=True):  # of mmdet, that no checkpoint is loaded
        model = load(cfg, None, device=device)
    meta = load_compatible(model, checkpoint)
    init_default_scope(scope)
    model.dataset_meta = dataset_metainfo(cfg, meta)
    visualizer = VISUALIZERS.build(cfg.visualizer)
    visualizer.dataset_meta = model.dataset_meta

    def draw(image: np.ndarray) -> np.ndarray:
        visualizer.add_datasample('prediction', image[..., ::-1], predict(model, image), **options)
        return visualizer.get_image()[..., ::-1]

    return draw


def find_media(inputs: Sequence[str], out_dir: Path) -> List[Tuple[Path, Path]]:
    """Return (file, drawn file) for each image and video among ``inputs``.

    An input that is a folder is searched for them. Its structure is kept below ``out_dir``, and
    files in ``out_dir`` are skipped.

    Raises:
        FileNotFoundError: An input does not exist, or a folder has no images or videos.
        ValueError: The suffix of a file is neither of an image nor of a video, or a drawn file
            would overwrite another one or its own input.
    """
    found: Dict[Path, Path] = {}  # drawn file: file
    for path, name in (pair for given in inputs for pair in _expand(Path(given), out_dir)):
        target = out_dir / name
        if path.suffix.lower() in VIDEO_SUFFIXES:
            target = target.with_name(f'{name.name}.mp4')
        if target in found or target.resolve() == path.resolve():
            raise ValueError(
                f'{target} would be overwritten, for {path} and {found.get(target, path)}; choose '
                'another --out-dir, or pass the inputs one by one')
        found[target] = path
    return [(path, target) for target, path in found.items()]


def _expand(given: Path, out_dir: Path) -> List[Tuple[Path, Path]]:
    """Return (file, file relative to ``out_dir``) for an input or each file in it."""
    known = IMAGE_SUFFIXES + VIDEO_SUFFIXES
    if given.is_dir():
        files = [path for path in sorted(given.rglob('*'))
                 if path.is_file() and path.suffix.lower() in known
                 and out_dir.resolve() not in path.resolve().parents]
        if not files:
            raise FileNotFoundError(f'folder {given} has no files with suffix {", ".join(known)}')
        return [(path, path.relative_to(given)) for path in files]
    if not given.is_file():
        raise FileNotFoundError(f'input {given} does not exist')
    if given.suffix.lower() not in known:
        raise ValueError(f'input {given} is neither an image nor a video; known suffixes are '
                         f'{", ".join(known)}')
    return [(given, Path(given.name))]


def draw_image(draw: Draw, source: Path, target: Path) -> np.ndarray:
    """Draw on the image ``source``, save the result as ``target`` and return it.

    Raises:
        UnreadableError: ``source`` is not an image.
    """
    image = cv2.imread(str(source))
    if image is None:
        raise UnreadableError(f'{source} cannot be read as an image')
    drawn = draw(image)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(target), drawn):
        raise OSError(f'{target} cannot be written')
    return drawn


def draw_video(draw: Draw, source: Path, target: Path) -> int:
    """Draw on every frame of the video ``source`` and save the result as ``target`` (.mp4).

    Returns:
        The number of frames.

    Raises:
        UnreadableError: ``source`` is not a video.
    """
    reader = VideoReader(str(source))
    target.parent.mkdir(parents=True, exist_ok=True)
    writer, frames = None, 0
    try:
        for frame in reader:
            if writer is None:
                writer = cv2.VideoWriter(str(target), cv2.VideoWriter.fourcc(*'mp4v'),
                                         reader.fps or 25, frame.shape[1::-1])
                if not writer.isOpened():
                    raise OSError(f'{target} cannot be written')
            writer.write(np.ascontiguousarray(draw(frame)))
            frames += 1
    finally:
        if writer is not None:
            writer.release()
    if not frames:
        raise UnreadableError(f'{source} cannot be read as a video')
    return frames
