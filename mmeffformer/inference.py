"""Predictions of a trained detector or segmentor, drawn on images, folders and videos."""
from pathlib import Path
from typing import Callable, Iterator, List, Sequence

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.registry import VISUALIZERS, init_default_scope

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
VIDEO_SUFFIXES = ('.mp4', '.avi', '.mov', '.mkv', '.webm')

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
        ValueError: The config is for neither detection nor segmentation.
    """
    if not Path(checkpoint).is_file() and '://' not in checkpoint:
        raise FileNotFoundError(f'checkpoint {checkpoint!r} does not exist')
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
    model = load(cfg, checkpoint, device=device)
    init_default_scope(scope)
    visualizer = VISUALIZERS.build(cfg.visualizer)
    visualizer.dataset_meta = model.dataset_meta

    def draw(image: np.ndarray) -> np.ndarray:
        visualizer.add_datasample('prediction', image[..., ::-1], predict(model, image), **options)
        return visualizer.get_image()[..., ::-1]

    return draw


def find_media(inputs: Sequence[str]) -> List[Path]:
    """Return the image and video files among ``inputs`` and inside folders among them.

    Raises:
        FileNotFoundError: An input does not exist or a folder has nothing to draw on.
        ValueError: A file is neither an image nor a video, by its name.
    """
    known = IMAGE_SUFFIXES + VIDEO_SUFFIXES
    found = []
    for path in map(Path, inputs):
        if path.is_dir():
            inside = sorted(p for p in path.rglob('*') if p.suffix.lower() in known)
            if not inside:
                raise FileNotFoundError(f'folder {path} holds no file named {", ".join(known)}')
            found += inside
        elif not path.exists():
            raise FileNotFoundError(f'input {path} does not exist')
        elif path.suffix.lower() not in known:
            raise ValueError(f'input {path} is neither an image nor a video; '
                             f'known endings are {", ".join(known)}')
        else:
            found.append(path)
    return found


def draw_image(draw: Draw, source: Path, target: Path) -> np.ndarray:
    """Draw on the image ``source``, save it as ``target`` and return it."""
    image = cv2.imread(str(source))
    if image is None:
        raise ValueError(f'{source} cannot be read as an image')
    drawn = draw(image)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(target), drawn):
        raise OSError(f'{target} cannot be written')
    return drawn


def draw_video(draw: Draw, source: Path, target: Path) -> int:
    """Draw on every frame of the video ``source``, save it as ``target`` (.mp4).

    Returns:
        The number of frames.
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
        raise ValueError(f'{source} cannot be read as a video')
    return frames


def _frames(reader: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        good, frame = reader.read()
        if not good:
            return
        yield frame
