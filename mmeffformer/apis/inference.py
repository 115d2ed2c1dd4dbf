"""Predictions of a trained detector or segmentor, drawn on images, folders and videos."""
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Mapping, Sequence, Tuple

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, VISUALIZERS, init_default_scope

from ..weights.compatibility import dataset_meta, load_compatible
from .options import require_file

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
VIDEO_SUFFIXES = ('.mp4', '.avi', '.mov', '.mkv', '.webm')


class UnreadableError(ValueError):
    """A file is not the image or video that its name says."""


Draw = Callable[[np.ndarray], np.ndarray]


def load_drawer(cfg: Config, checkpoint: str, device: str = 'cpu', score_thr: float = 0.3) -> Draw:
    """Return a function from an image to the same image with the predictions on it.

    Images are uint8 (H, W, 3) in BGR order, as cv2 has them.

    Args:
        cfg: A config with ``default_scope`` 'mmdet' or 'mmseg'.
        checkpoint: The file with its weights.
        device: Where the model runs, 'cpu' or 'cuda:0' for example.
        score_thr: Detections below this score are not drawn.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The config is for neither detection nor segmentation, or the
            checkpoint is of another one.
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
    with warnings.catch_warnings(record=True):  # that it has no weights yet
        model = load(cfg, None, device=device)
    meta = load_compatible(model, checkpoint)
    init_default_scope(scope)
    model.dataset_meta = {**getattr(model, 'dataset_meta', {}), **_told(cfg, meta)}
    visualizer = VISUALIZERS.build(cfg.visualizer)
    visualizer.dataset_meta = model.dataset_meta

    def draw(image: np.ndarray) -> np.ndarray:
        visualizer.add_datasample('prediction', image[..., ::-1], predict(model, image), **options)
        return visualizer.get_image()[..., ::-1]

    return draw


def _told(cfg: Config, meta: Mapping) -> dict:
    """Return classes and palette as the checkpoint's ``meta`` has them, or else the test set."""
    dataset = DATASETS.build(dict(deepcopy(cfg.test_dataloader.dataset), lazy_init=True))
    told = {**dataset.metainfo, **dataset_meta(meta)}
    return {key: value for key, value in told.items() if value is not None}


def find_media(inputs: Sequence[str], out_dir: Path) -> List[Tuple[Path, Path]]:
    """Return (file, drawn file) of the images and videos among ``inputs`` and in folders there.

    What lies in a folder keeps its place below ``out_dir``, and what lies in
    ``out_dir`` itself is no input.

    Raises:
        FileNotFoundError: An input does not exist or a folder has nothing to draw on.
        ValueError: A file is neither an image nor a video, by its name, or two
            inputs would be drawn to one file, or onto themselves.
    """
    known = IMAGE_SUFFIXES + VIDEO_SUFFIXES
    found: Dict[Path, Path] = {}  # drawn file: file
    for given in map(Path, inputs):
        if given.is_dir():
            inside = [path for path in sorted(given.rglob('*')) if path.is_file()
                      and path.suffix.lower() in known
                      and out_dir.resolve() not in path.resolve().parents]
            if not inside:
                raise FileNotFoundError(f'folder {given} holds no file named {", ".join(known)}')
            pairs = [(path, path.relative_to(given)) for path in inside]
        elif not given.is_file():
            raise FileNotFoundError(f'input {given} does not exist')
        elif given.suffix.lower() not in known:
            raise ValueError(f'input {given} is neither an image nor a video; '
                             f'known endings are {", ".join(known)}')
        else:
            pairs = [(given, Path(given.name))]
        for path, name in pairs:
            target = out_dir / name
            if path.suffix.lower() in VIDEO_SUFFIXES:
                target = target.with_name(f'{name.name}.mp4')
            if target in found or target.resolve() == path.resolve():
                other = found.get(target, path)
                raise ValueError(f'{target} would be written over, for {path} and {other}; '
                                 'choose another --out-dir, or give the inputs one by one')
            found[target] = path
    return [(path, target) for target, path in found.items()]


def draw_image(draw: Draw, source: Path, target: Path) -> np.ndarray:
    """Draw on the image ``source``, save it as ``target`` and return it.

    Raises:
        UnreadableError: ``source`` is no image.
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
    """Draw on every frame of the video ``source``, save it as ``target`` (.mp4).

    Returns:
        The number of frames.

    Raises:
        UnreadableError: ``source`` is no video.
    """
    reader = cv2.VideoCapture(str(source))
    rate = reader.get(cv2.CAP_PROP_FPS) or 25
    target.parent.mkdir(parents=True, exist_ok=True)
    writer, frames = None, 0
    try:
        for frame in _frames(reader):
            if writer is None:
                size = frame.shape[1::-1]
                writer = cv2.VideoWriter(str(target), cv2.VideoWriter_fourcc(*'mp4v'), rate, size)
                if not writer.isOpened():
                    raise OSError(f'{target} cannot be written')
            writer.write(np.ascontiguousarray(draw(frame)))
            frames += 1
    finally:
        reader.release()
        if writer is not None:
            writer.release()
    if not frames:
        raise UnreadableError(f'{source} cannot be read as a video')
    return frames


def _frames(reader: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        good, frame = reader.read()
        if not good:
            return
        yield frame
