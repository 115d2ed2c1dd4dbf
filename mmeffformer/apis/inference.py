"""Drawing of the predictions of a detector or segmentor on images and videos."""
import tempfile
from contextlib import contextmanager
from copy import deepcopy
from inspect import signature
from itertools import count
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import cv2
import numpy as np
import torch
from mmcv import VideoReader
from mmcv.transforms import BaseTransform, Compose, LoadImageFromFile
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, TRANSFORMS, VISUALIZERS, init_default_scope

from ..deploy.evaluation import ExportedModel
from ..deploy.runtimes import ExportedFile
from ..models.fuse import fuse
from ..models.precision import half_precision
from ..utils.config import (
    dataset_metainfo,
    find_scope,
    iter_dicts,
    model_cfg,
    test_pipeline_cfg,
)
from ..weights.compatibility import load_compatible
from .options import require_file

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
VIDEO_SUFFIXES = ('.mp4', '.avi', '.mov', '.mkv', '.webm')
DRAWERS = count()  # numbers of visualizers


class PictureError(ValueError):
    """An image or video cannot be read, processed or drawn."""


Image = Union[Path, np.ndarray]  # a file, or a video's frame: uint8 (H, W, 3) in BGR order
Draw = Callable[[Image], np.ndarray]


class Predictor:
    """A trained detector or segmentor that predicts on images as tools/test.py does.

    It needs no data set. Images are read by the pipeline of testing, without annotations.

    Args:
        cfg: A config of mmdet or mmseg.
        checkpoint: The file with its weights, or a file exported from the whole model.
        device: Device of the model, for example 'cpu' or 'cuda:0'; 'cpu' for an exported file.
        dtype: 'fp32'; or 'bf16' or 'fp16' for a model that is fused and computes as
            :func:`half_precision` says.

    Attributes:
        metainfo: Classes and palette.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: The config is for neither library or has no pipeline, the checkpoint or the
            exported file does not fit its model, the device is missing, or it has no ``dtype``.
    """

    def __init__(self, cfg: Config, checkpoint: Union[str, ExportedFile], device: str = 'cpu',
                 dtype: str = 'fp32'):
        if isinstance(checkpoint, str):
            require_file(checkpoint, 'checkpoint')
        init_scope(cfg)
        self.steps = Compose(test_pipeline_cfg(cfg)).transforms
        self.frame_loader = find_frame_loader(self.steps[0])
        self.model = revert_sync_batchnorm(MODELS.build(model_cfg(cfg)))
        if isinstance(checkpoint, str):
            meta = load_compatible(self.model, checkpoint)
        else:
            meta = dict(dataset_meta=dict(classes=checkpoint.meta.get('classes')))
            self.model = ExportedModel(self.model, checkpoint)
        self.metainfo = dataset_metainfo(cfg, meta)
        try:
            self.model.to(device).eval()
        except (RuntimeError, AssertionError) as error:  # the latter: torch without CUDA
            raise ValueError(f'device {device!r} cannot be used: {error}') from error
        if dtype != 'fp32':
            half_precision(fuse(self.model), dtype)
        # SpeedHook's option, which changes how results are rounded
        if any(hook.get('channels_last') for hook in iter_dicts(cfg.get('default_hooks'))):
            self.model.to(memory_format=torch.channels_last)

    def __call__(self, source: Image) -> Tuple[Any, np.ndarray]:
        """Return the prediction for an image, as the library's data sample, and the image.

        The image is as the pipeline loads it: (H, W) or (H, W, C), of any dtype.

        Raises:
            PictureError: The image cannot be read or processed.
        """
        if not isinstance(source, np.ndarray):
            return self._predict(self.steps, img_path=str(source))
        if self.frame_loader is not None:
            return self._predict([self.frame_loader, *self.steps[1:]], img=source)
        with tempfile.TemporaryDirectory() as folder:  # for the loader of the pipeline
            file = Path(folder) / 'frame.png'
            cv2.imwrite(str(file), source, [cv2.IMWRITE_PNG_COMPRESSION, 1])
            return self(file)

    def _predict(self, steps: Sequence[BaseTransform], **given: Any) -> Tuple[Any, np.ndarray]:
        """Return the prediction and the image for what the first of ``steps`` takes."""
        data: dict = dict(given, img_id=0, seg_fields=[])
        image = None
        for step in steps:
            with naming_errors(f'cannot be read as an image by {type(step).__name__}'
                               if image is None else
                               f'cannot be processed by {type(step).__name__}'):
                data = step(data)
                if image is None and 'img' in data:
                    image = np.array(data['img'])
                    if getattr(step, 'imdecode_backend', '') == 'tifffile' and image.ndim == 3:
                        image[..., :3] = image[..., 2::-1]  # the only backend that returns RGB
        if image is None:
            raise PictureError('is not loaded: no step of the test pipeline returns img')
        with naming_errors('cannot be processed by the model'), torch.no_grad():
            sample, = self.model.test_step(pseudo_collate([data]))
        return sample, image


def find_frame_loader(loader: BaseTransform) -> Optional[BaseTransform]:
    """Return the library's transform that loads an array as ``loader`` loads a PNG file of it.

    It is known for mmcv's loader of files. For others the result is None.
    """
    if (type(loader) is not LoadImageFromFile or loader.imdecode_backend != 'cv2'
            or loader.color_type not in ('color', 'unchanged')):
        return None
    return TRANSFORMS.build(dict(type='LoadImageFromNDArray', to_float32=loader.to_float32))


def init_scope(cfg: Config) -> None:
    """Make the library of a config the default scope.

    Raises:
        ValueError: It is neither mmdet nor mmseg.
    """
    scope = find_scope(cfg)
    if scope not in ('mmdet', 'mmseg'):
        raise ValueError(f'config with default_scope {scope!r}: expected mmdet or mmseg')
    init_default_scope(scope)


@contextmanager
def naming_errors(what: str) -> Iterator[None]:
    """Context manager: raise any error as a :class:`PictureError` of one line."""
    try:
        yield
    except Exception as error:  # transforms and models of any library can fail in any way
        text = ' '.join(str(error).split())
        raise PictureError(f'{what}: {type(error).__name__}: {text}') from error


def load_drawer(cfg: Config, checkpoint: Union[str, ExportedFile], device: str = 'cpu',
                score_thr: float = 0.3, dtype: str = 'fp32') -> Draw:
    """Return a function that draws the predictions for an image on a copy of the image.

    The copy is uint8 (H, W, 3) in BGR order. The function raises a :class:`PictureError` if the
    image cannot be read, processed or drawn.

    Args:
        cfg, checkpoint, device, dtype: As for :class:`Predictor`.
        score_thr: Detections below this score are not drawn.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: As for :class:`Predictor`, or the config has no visualizer.
    """
    require_visualizer(cfg)
    predict = Predictor(cfg, checkpoint, device, dtype)
    draw_sample = load_sample_drawer(cfg, predict.metainfo, score_thr)

    def draw(source: Image) -> np.ndarray:
        sample, image = predict(source)
        with naming_errors('cannot be drawn'):
            return draw_sample(sample, image)

    return draw


def require_visualizer(cfg: Config) -> None:
    """Raise a ValueError if the config has no visualizer."""
    if not cfg.get('visualizer'):
        name = 'SegLocalVisualizer' if find_scope(cfg) == 'mmseg' else 'DetLocalVisualizer'
        raise ValueError('the config has no visualizer to draw with: expected '
                         f"visualizer=dict(type='{name}')")


def load_sample_drawer(cfg: Config, metainfo: dict, score_thr: float
                       ) -> Callable[[Any, np.ndarray], np.ndarray]:
    """Return a function that draws a prediction for an image on a copy of the image.

    Args:
        cfg: A config with a visualizer, whose scope is the default scope.
        metainfo: Classes and palette.
        score_thr: Detections below this score are not drawn.
    """
    options = deepcopy(cfg.visualizer)
    for key in ('vis_backends', 'save_dir'):  # nothing is saved by it
        options.pop(key, None)
    options.name = f'drawer {next(DRAWERS)}'  # mmengine keeps one visualizer of each name
    visualizer = VISUALIZERS.build(options)
    visualizer.dataset_meta = metainfo
    known = signature(visualizer.add_datasample).parameters
    settings = dict(draw_gt=False, pred_score_thr=score_thr, with_labels=False)
    settings = {key: value for key, value in settings.items() if key in known}

    def draw(sample: Any, image: np.ndarray) -> np.ndarray:
        visualizer.add_datasample('prediction', to_rgb(image), sample, **settings)
        return visualizer.get_image()[..., ::-1]

    return draw


def to_rgb(image: np.ndarray) -> np.ndarray:
    """Return an image to look at, uint8 (H, W, 3) in RGB order, for one of any dtype.

    Args:
        image: (H, W) or (H, W, C). The first three of its channels are blue, green and red; if
            there are fewer, the first one is grey. Values beyond 0 to 255 are scaled.
    """
    image = image if image.ndim == 3 else image[..., None]
    image = image[..., 2::-1] if image.shape[-1] > 2 else image[..., :1].repeat(3, -1)
    if image.dtype != np.uint8:
        image = np.nan_to_num(image.astype(np.float64))
        low, high = image.min(), image.max()
        if low < 0 or not 1 < high <= 255:
            image = (image - low) / (high - low or 1) * 255
    return np.ascontiguousarray(image.astype(np.uint8))


def reads_any_file(cfg: Config) -> bool:
    """Return whether the pipeline loads images by another class than mmcv's.

    Such a loader decides itself which files are images.
    """
    init_scope(cfg)
    kind = test_pipeline_cfg(cfg)[0]['type']
    return (TRANSFORMS.get(kind) if isinstance(kind, str) else kind) is not LoadImageFromFile


def find_media(inputs: Sequence[str], out_dir: Path,
               any_file: bool = False) -> List[Tuple[Path, Path]]:
    """Return (file, drawn file) for each image and video among ``inputs``.

    An input that is a folder is searched for them, by suffix unless ``any_file``. Its structure
    is kept below ``out_dir``, and files in ``out_dir`` are skipped.

    Raises:
        FileNotFoundError: An input does not exist, or a folder has no images or videos.
        ValueError: A drawn file would overwrite another one or its own input.
    """
    found: Dict[Path, Path] = {}  # drawn file: file
    for path, name in (pair for given in inputs
                       for pair in _expand(Path(given), out_dir, any_file)):
        target = out_dir / name
        if path.suffix.lower() in VIDEO_SUFFIXES:
            target = target.with_name(f'{name.name}.mp4')
        elif not cv2.haveImageWriter(str(target)):
            target = target.with_name(f'{name.name}.png')
        if target in found or target.resolve() == path.resolve():
            raise ValueError(
                f'{target} would be overwritten, for {path} and {found.get(target, path)}; choose '
                'another --out-dir, or pass the inputs one by one')
        found[target] = path
    return [(path, target) for target, path in found.items()]


def _expand(given: Path, out_dir: Path, any_file: bool) -> List[Tuple[Path, Path]]:
    """Return (file, file relative to ``out_dir``) for an input or each file in it."""
    known = IMAGE_SUFFIXES + VIDEO_SUFFIXES
    if given.is_dir():
        files = [path for path in sorted(given.rglob('*'))
                 if path.is_file() and (any_file or path.suffix.lower() in known)
                 and out_dir.resolve() not in path.resolve().parents]
        if not files:
            raise FileNotFoundError(f'folder {given} has no files' + (
                '' if any_file else f' with suffix {", ".join(known)}; pass others by name'))
        return [(path, path.relative_to(given)) for path in files]
    if not given.is_file():
        raise FileNotFoundError(f'input {given} does not exist')
    return [(given, Path(given.name))]


def make_folder(path: Path) -> None:
    """Create the folder for drawn files.

    Raises:
        OSError: It cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise OSError(f'{path} cannot be used as the folder for drawn files: {error.strerror}'
                      ) from error


def draw_image(draw: Draw, source: Path, target: Path) -> np.ndarray:
    """Draw on the image ``source``, save the result as ``target`` and return it.

    Raises:
        PictureError: ``source`` cannot be read, processed or drawn, or the result not be saved.
    """
    drawn = draw(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with naming_errors(f'cannot be saved as {target}'):
        if not cv2.imwrite(str(target), drawn):
            raise OSError('the file cannot be written')
    return drawn


def draw_video(draw: Draw, source: Path, target: Path) -> int:
    """Draw on every frame of the video ``source`` and save the result as ``target`` (.mp4).

    Returns:
        The number of frames.

    Raises:
        PictureError: ``source`` is not a video, or a frame cannot be read, processed or drawn.
    """
    reader = VideoReader(str(source))
    target.parent.mkdir(parents=True, exist_ok=True)
    writer, frames = None, 0
    try:
        for frame in reader:
            drawn = draw(frame)
            if writer is None:
                writer = cv2.VideoWriter(str(target), cv2.VideoWriter.fourcc(*'mp4v'),
                                         reader.fps or 25, drawn.shape[1::-1])
                if not writer.isOpened():
                    raise PictureError(f'cannot be saved as {target}')
            writer.write(np.ascontiguousarray(drawn))
            frames += 1
    finally:
        if writer is not None:
            writer.release()
    if not frames:
        raise PictureError('cannot be read as a video')
    return frames


def count_frames(path: Path) -> int:
    """Return the number of frames of a video, as its header has it, or 1 for an image."""
    return max(1, VideoReader(str(path)).frame_cnt) if path.suffix.lower() in VIDEO_SUFFIXES else 1
