"""Export to ONNX, OpenVINO and Core ML. A file is compared with PyTorch before it is kept.

TorchScript's tracer makes the graph: it traces the modules of mmdet and mmseg unchanged, and keeps
sizes as operators of the graph, so that one file can serve any size.
"""
import platform
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple, Union

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from ..datasets.shapes import draw
from ..models.attention import AttentionBias
from ..models.backbone import STRIDES
from ..models.fuse import fuse
from ..utils.config import dataset_metainfo, find_scope
from ..utils.registry import MODELS
from ..weights.compatibility import load_compatible
from .comparison import Comparison, check_matches, compare
from .graphs import Traceable, TwoStageDetector, traceable
from .quantisation import TrainingImages, check_int8, quantise
from .runtimes import INPUT, SUFFIXES, ExportedFile, describe, require

Size = Tuple[int, int]

OPSET = 17  # of ONNX; RoIAlign as in mmdet needs 16
MIN_SIZE = STRIDES[-1]


def export_checkpoint(cfg: Config, checkpoint: str, path: str, to: str, what: str, shape: Size,
                      dynamic: bool = False, images: Sequence[str] = (),
                      int8: Optional[int] = None) -> List[Comparison]:
    """Export a trained detector or segmentor, see :func:`export`.

    The metadata of the file has the normalisation of its input, and the classes.

    Args:
        cfg: The model's config.
        checkpoint: The file with the model's weights.
        images: Image files to compare on besides random inputs; if none, two drawn images.
        int8: Number of training images to calibrate an int8 file on, which is compared on other
            training images and ``images``; None exports fp32 only.

    Raises:
        FileNotFoundError: The checkpoint, an image or the training set does not exist.
        ValueError: The checkpoint does not fit the config, an image cannot be read, or an error
            of :func:`export`.
    """
    if int8 is not None:
        check_int8(to)
    init_default_scope(find_scope(cfg))
    cfg = deepcopy(cfg)
    cfg.model.backbone.init_cfg = None  # the checkpoint has every weight
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    classes = dataset_metainfo(cfg, load_compatible(model, checkpoint))['classes']
    preprocessor = cfg.model.get('data_preprocessor') or {}
    meta = dict(config=Path(cfg.filename or '').name, checkpoint=Path(checkpoint).name,
                channels='RGB' if preprocessor.get('bgr_to_rgb', False) else 'BGR',
                mean=[float(value) for value in preprocessor.get('mean', [0] * 3)],
                std=[float(value) for value in preprocessor.get('std', [1] * 3)],
                classes=list(classes))
    pictures = ([_read(file) for file in images] or
                [draw(np.random.default_rng(seed), shape)[0] for seed in (1, 2)])
    inputs, calibration = [_normalise(picture, meta) for picture in pictures], None
    if int8 is not None:
        training = TrainingImages(cfg, model.data_preprocessor)
        calibration, others = training.split(int8)
        inputs = inputs[:len(images)] + [*others]
        meta['calibrated_on'] = f'{int8} images of {training.source}'
    return export(model, path, to, what, shape, dynamic, inputs, meta, calibration)


def _read(path: str) -> np.ndarray:
    if not Path(path).is_file():
        raise FileNotFoundError(f'image {path!r} does not exist')
    image = cv2.imread(str(path))
    if image is None:
        raise ValueError(f'{path} cannot be read as an image')
    return image


def _normalise(picture: np.ndarray, meta: Dict) -> Tensor:
    """Return (1, 3, H, W) from a BGR picture (H, W, 3)."""
    picture = picture[..., ::-1] if meta['channels'] == 'RGB' else picture
    values = (picture - np.float32(meta['mean'])) / np.float32(meta['std'])
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))[None]


def export(model: nn.Module, path: Union[str, Path], to: str, what: str, shape: Size,
           dynamic: bool = False, images: Sequence[Tensor] = (), meta: Optional[Dict] = None,
           calibration: Optional[Sequence[Tensor]] = None) -> List[Comparison]:
    """Fuse a copy of a model, export it, and keep the file if it computes the same.

    Args:
        model: A backbone, or a model of mmdet or mmseg, not fused.
        path: The file to write, with the format's suffix in ``SUFFIXES``.
        to: 'onnx', 'openvino' or 'coreml'.
        what: 'backbone', 'neck' or 'model', see :func:`traceable`.
        shape: H, W of the input in px.
        dynamic: Make a file for any H, W from 32 px. ``shape`` is one of the sizes compared at.
        images: Normalised float images (1, 3, H, W) to compare on besides random inputs. They
            are resized to the sizes compared at.
        meta: Further metadata of the file.
        calibration: Normalised float images (1, 3, H, W) to calibrate an int8 file on (OpenVINO).
            It is made if the fp32 file matches, and compared on ``images`` only.

    Returns:
        The comparison of each output; none where Core ML cannot run, which needs macOS.

    Raises:
        ValueError: The model or a combination of arguments cannot be exported, or a package is
            missing.
        MismatchError: The file does not match. It is not kept; an existing file stays.
    """
    path, shape = Path(path), tuple(shape)
    _check_arguments(model, path, to, what, shape, dynamic, calibration, images)
    model.eval()
    part = traceable(fuse(deepcopy(model)), what)
    meta = dict(meta or {}, what=what, shape=list(shape), dynamic=dynamic,
                outputs=list(part.output_names))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.export-', dir=path.parent) as folder:
        file, compared = Path(folder) / path.name, []
        WRITERS[to](part, file, shape, dynamic, meta)
        if to != 'coreml' or platform.system() == 'Darwin':
            inputs = _inputs(shape, dynamic, images, random=True)
            compared = compare(model, what, ExportedFile(file, to), inputs)
            check_matches(compared, path, to)
        if calibration is not None:
            fp32, file = file, Path(folder) / 'int8' / path.name
            file.parent.mkdir()
            quantise(fp32, file, calibration, None if dynamic else shape)
            inputs = _inputs(shape, dynamic, images)
            compared = compare(model, what, ExportedFile(file, to), inputs, int8=True)
            check_matches(compared, path, f'{to} in int8')
        _move(file.parent, path.parent)
    return compared


def _move(source: Path, folder: Path) -> None:
    """Move all files of a folder into another one, where they replace those of the same name."""
    for each in source.iterdir():
        target = folder / each.name
        if target.is_dir():  # a package of Core ML
            shutil.rmtree(target)
        shutil.move(each, target)


def _check_arguments(model: nn.Module, path: Path, to: str, what: str, shape: Size, dynamic: bool,
                     calibration: Optional[Sequence[Tensor]], images: Sequence[Tensor]) -> None:
    if to not in SUFFIXES:
        raise ValueError(f'to={to!r}: expected one of {", ".join(SUFFIXES)}')
    if path.suffix != SUFFIXES[to]:
        raise ValueError(f'{path}: expected a name that ends in {SUFFIXES[to]} for {to}')
    if min(shape) < MIN_SIZE:
        raise ValueError(f'shape {shape[0]} x {shape[1]} px: expected {MIN_SIZE} px or more')
    if to == 'coreml':
        if dynamic:
            raise ValueError('Core ML: --dynamic is for onnx and openvino; export one file for '
                             'each size that you need')
        if what == 'model' and hasattr(model, 'roi_head'):
            raise ValueError('Core ML: a detector cannot be exported whole, because coremltools '
                             'has no roi_align; export its backbone and neck with --what neck')
        if any(isinstance(module, AttentionBias) and module.mode == 'legacy'
               for module in model.modules()):
            raise ValueError("Core ML: bias_mode='legacy' cannot be exported, because coremltools "
                             'has no bicubic interpolation')
    if calibration is not None:
        check_int8(to)
        if not len(calibration) or not len(images):
            raise ValueError('int8: expected images to calibrate on, and others to compare on')
    if any(getattr(module, 'deployed', False) for module in model.modules()):
        raise ValueError('the model is fused: pass the model as trained, because the exported '
                         'file is compared with it')


def _inputs(shape: Size, dynamic: bool, images: Sequence[Tensor], random: bool = False
            ) -> List[Tensor]:
    """Return the images, and random inputs, at ``shape``; for a dynamic file at five sizes."""
    height, width = shape
    sizes = [shape]
    if dynamic:  # turned, odd and smallest sizes
        sizes += [(width, height + 1),
                  (max(height * 2 // 3, MIN_SIZE) | 1, max(width * 3 // 4, MIN_SIZE) | 1),
                  (MIN_SIZE + 1, 3 * MIN_SIZE - 1), (MIN_SIZE, MIN_SIZE)]
    generator, inputs = torch.Generator().manual_seed(0), []
    for size in sizes:
        if random:
            inputs.append(torch.randn(1, 3, *size, generator=generator))
        inputs += [F.interpolate(image, size=size, mode='bilinear', antialias=True)
                   for image in images]
    return inputs


def _trace_size(part: Traceable) -> Size:
    """Return a size at which every bias table is resampled.

    A trace records the branch that it took: a table that happens to fit would never be resampled.
    """
    tables = {tuple(module.table.shape[1:]) for module in part.modules()
              if isinstance(module, AttentionBias)}
    for rows, cols in ((3, 4), (5, 7), (9, 11)):  # tokens at stride 32
        if not tables & {(rows, cols), (2 * rows, 2 * cols)}:
            return rows * MIN_SIZE, cols * MIN_SIZE
    raise ValueError(f'bias tables of the sizes {sorted(tables)} cannot be traced for any size')


@contextmanager
def _no_tracer_warnings() -> Iterator[None]:
    """Suppress the tracer's warnings about checks of shapes and about its deprecation."""
    with warnings.catch_warnings():
        for category in (torch.jit.TracerWarning, DeprecationWarning, UserWarning):
            warnings.simplefilter('ignore', category)
        yield


def _write_onnx(part: Traceable, path: Path, shape: Size, dynamic: bool, meta: Dict) -> None:
    onnx = require('onnx', 'onnx')
    axes = {}
    if dynamic:
        shape = _trace_size(part)
        axes = {name: {2: f'{name}_height', 3: f'{name}_width'} for name in part.output_names}
        axes[INPUT] = {2: 'height', 3: 'width'}
    if isinstance(part, TwoStageDetector):
        axes.update({name: {0: 'detections'} for name in part.output_names})
    tracer = {} if torch.__version__ < '2.5' else dict(dynamo=False)
    with torch.no_grad(), _no_tracer_warnings():
        torch.onnx.export(part, (torch.zeros(1, 3, *shape), ), str(path), input_names=[INPUT],
                          output_names=[*part.output_names], dynamic_axes=axes or None,
                          opset_version=OPSET, **tracer)
    proto = onnx.load(str(path))
    onnx.helper.set_model_props(proto, describe(**meta))
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))


def _write_openvino(part: Traceable, path: Path, shape: Size, dynamic: bool, meta: Dict) -> None:
    openvino = require('openvino', 'openvino')
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / 'model.onnx'
        _write_onnx(part, graph, shape, dynamic, meta)
        model = openvino.convert_model(str(graph))
        for key, value in describe(**meta).items():
            model.set_rt_info(value, key)
        openvino.save_model(model, str(path), compress_to_fp16=False)


def _write_coreml(part: Traceable, path: Path, shape: Size, dynamic: bool, meta: Dict) -> None:
    coremltools = require('coremltools', 'coreml')
    image = torch.zeros(1, 3, *shape)
    with torch.no_grad(), _no_tracer_warnings():
        traced = torch.jit.trace(part, image, check_trace=False)
        model = coremltools.convert(
            traced, convert_to='mlprogram',
            inputs=[coremltools.TensorType(INPUT, tuple(image.shape))],
            outputs=[coremltools.TensorType(name) for name in part.output_names],
            compute_precision=coremltools.precision.FLOAT32,
            minimum_deployment_target=coremltools.target.iOS16)
    model.user_defined_metadata.update(describe(**meta))
    model.save(str(path))


WRITERS = {'onnx': _write_onnx, 'openvino': _write_openvino, 'coreml': _write_coreml}
