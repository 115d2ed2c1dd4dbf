"""Export to ONNX, OpenVINO and Core ML, each file checked against PyTorch before it is kept.

TorchScript's tracer makes the graph: mmdet's and mmseg's modules go through it unchanged,
and sizes stay operators of the graph, so that one file can serve any size.
"""
import math
import platform
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from torch import Tensor, nn
from torchvision.ops import box_iou

from ..datasets.shapes import draw
from ..models.attention import AttentionBias
from ..models.backbone import STRIDES
from ..models.fuse import fuse
from ..utils.registry import MODELS
from ..weights.compatibility import dataset_meta, load_compatible
from .quantise import TrainingImages, check_int8, quantise
from .runtimes import INPUT, SUFFIXES, describe, open_exported, require
from .traceable import Traceable, TwoStageDetector, traceable

Size = Tuple[int, int]

OPSET = 17  # of ONNX; RoIAlign as mmdet does it came with 16
# Largest error, relative to the largest value of an output. fp32 gives 1e-6 to 1e-4; a graph
# that computes something else is far beyond.
TOLERANCE = 1e-3
# Rounding decides whether a box is among the best 1000, or overlaps by just the threshold of
# nms, and then one box stands for another. Trained detectors have few detections so uncertain.
STRAYS, STRAY_TOLERANCE = 'detections without counterpart', 0.02
# Of int8, all errors of an output relative to all its values (Euclidean norms). Rounding to 255
# steps gives 0.01 to 0.05; ranges that are not those of the images soon give 1.
INT8_TOLERANCE = 0.1
# Detections weigh as much as they score, as those near the threshold come and go. Where int8
# moves a box, its mask moves along.
INT8_DETECTIONS, INT8_DETECTION_TOLERANCE, INT8_IOU = 'scores of detections', 0.2, 0.5
MIN_SIZE = STRIDES[-1]


class MismatchError(ValueError):
    """An exported file does not compute what PyTorch does."""


class Comparison(NamedTuple):
    """One output of PyTorch and of the file, over all inputs.

    That of ``STRAYS`` counts: detections of either that the other has not, of all.
    Of an int8 file, ``error`` and ``largest`` are Euclidean norms over all values, and that of
    ``INT8_DETECTIONS`` sums up: differences in score, a detection that the other has not
    scoring 0 there, of all scores of both.
    """

    output: str
    error: float  # the largest
    largest: float  # value of PyTorch's output
    inputs: int
    int8: bool = False

    @property
    def good(self) -> bool:
        if self.int8:
            detector = self.output in (INT8_DETECTIONS, 'boxes', 'masks')
            tolerance = INT8_DETECTION_TOLERANCE if detector else INT8_TOLERANCE
        else:
            tolerance = STRAY_TOLERANCE if self.output == STRAYS else TOLERANCE
        return math.isfinite(self.error) and self.error <= tolerance * max(self.largest, 1e-6)

    def __str__(self) -> str:
        if self.int8:
            return (f'int8 {self.output}: error {100 * self.error / max(self.largest, 1e-6):.2g} '
                    f'%, over {self.inputs} inputs')
        if self.output == STRAYS:
            return (f'{STRAYS}: {self.error:.0f} of {self.largest:.0f}, over {self.inputs} '
                    'inputs')
        return (f'{self.output}: largest error {self.error:.2g}, of values up to '
                f'{self.largest:.3g}, over {self.inputs} inputs')


def export_checkpoint(cfg: Config, checkpoint: str, path: str, to: str, what: str, shape: Size,
                      dynamic: bool = False, images: Sequence[str] = (),
                      int8: Optional[int] = None) -> List[Comparison]:
    """Export a trained detector or segmentor, see :func:`export`.

    The file says how its input is to be normalised and which classes it knows.

    Args:
        cfg: Its config.
        checkpoint: The file with its weights.
        images: Files to compare on besides random inputs; two drawn pictures if none.
        int8: Make an int8 file, calibrated on so many images of the config's training
            set; it is compared on some others of these, and on ``images``.

    Raises:
        FileNotFoundError: The checkpoint, an image or the training set does not exist.
        ValueError: The checkpoint is not of this config, an image cannot be read, or
            what :func:`export` raises.
    """
    if int8 is not None:
        check_int8(to)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    cfg = deepcopy(cfg)
    cfg.model.backbone.init_cfg = None  # the checkpoint has every weight
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    classes = dataset_meta(load_compatible(model, checkpoint)).get('classes', ())
    how = cfg.model.get('data_preprocessor') or {}
    mean, std = (list(map(float, how.get(key, [value] * 3)))
                 for key, value in (('mean', 0), ('std', 1)))
    bgr = not how.get('bgr_to_rgb', False)
    pictures = ([_read(file) for file in images] or
                [draw(np.random.default_rng(seed), shape)[0] for seed in (1, 2)])
    inputs = []
    for picture in pictures:
        picture = torch.from_numpy(np.ascontiguousarray(picture[..., ::1 if bgr else -1]))
        inputs.append(((picture - torch.tensor(mean)) / torch.tensor(std))
                      .permute(2, 0, 1)[None])
    said = dict(config=Path(cfg.filename or '').name, checkpoint=Path(checkpoint).name,
                channels='BGR' if bgr else 'RGB', mean=mean, std=std,
                classes=list(classes))
    calibration = None
    if int8 is not None:
        training = TrainingImages(cfg, model.data_preprocessor)
        calibration, others = training.split(int8)
        inputs = inputs[:len(images)] + [*others]
        said['calibrated_on'] = f'{int8} images of {training.source}'
    return export(model, path, to, what, shape, dynamic, inputs, said, calibration)


def _read(path: str) -> np.ndarray:
    if not Path(path).is_file():
        raise FileNotFoundError(f'image {path!r} does not exist')
    image = cv2.imread(str(path))
    if image is None:
        raise ValueError(f'{path} cannot be read as an image')
    return image


def export(model: nn.Module, path: str, to: str, what: str, shape: Size, dynamic: bool = False,
           images: Sequence[Tensor] = (), meta: Optional[Dict] = None,
           calibration: Optional[Sequence[Tensor]] = None) -> List[Comparison]:
    """Fuse a copy of a model, export it, compare the file with the model, and keep it.

    Args:
        model: A backbone, or an mmdet or mmseg model, not fused.
        path: The file to write; it ends in the format's ``SUFFIXES``.
        to: 'onnx', 'openvino' or 'coreml'.
        what: 'backbone', 'neck' or 'model', see :func:`traceable`.
        shape: H, W of the input in px.
        dynamic: Make a file for any H, W from 32 px. ``shape`` is then one to compare at.
        images: Normalised float images (1, 3, H, W) of any size, to compare on
            besides random ones. They are resized to the sizes compared at.
        meta: What else the file shall say of itself.
        calibration: Normalised float images (1, 3, H, W) with which to make an int8 file
            (OpenVINO), once the fp32 one matches. That is compared on ``images`` alone.

    Returns:
        The comparison of each output; none where the file cannot be run, which is
        Core ML elsewhere than on macOS.

    Raises:
        ValueError: The model or a combination of arguments cannot be exported, or a
            package is missing.
        MismatchError: The file does not match. It is not kept, and a file that was
            there before stays.
    """
    path, shape = Path(path), tuple(shape)
    _check(model, path, to, what, shape, dynamic, calibration, images)
    model.eval()
    part = traceable(fuse(deepcopy(model)), what)
    meta = dict(meta or {}, what=what, shape=list(shape), dynamic=dynamic,
                outputs=list(part.output_names))
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = _sizes(shape) if dynamic else [shape]
    with tempfile.TemporaryDirectory(prefix='.export-', dir=path.parent) as folder:
        made = Path(folder) / path.name
        WRITERS[to](part, made, shape, dynamic, meta)
        compared = []
        if to != 'coreml' or platform.system() == 'Darwin':
            compared = compare(model, what, open_exported(made, to), _inputs(sizes, images, True))
            _accept(compared, path, to)
        if calibration is not None:
            fp32, made = made, Path(folder) / 'int8' / path.name
            made.parent.mkdir()
            quantise(fp32, made, calibration, None if dynamic else shape)
            compared = compare(model, what, open_exported(made, to), _inputs(sizes, images), True)
            _accept(compared, path, f'{to} in int8')
        for each in made.parent.iterdir():
            target = path.with_name(each.name)
            if target.is_dir():
                shutil.rmtree(target)
            shutil.move(each, target)
    return compared


def _accept(compared: Sequence[Comparison], path: Path, to: str):
    bad = [str(each) for each in compared if not each.good]
    if bad:
        raise MismatchError(f'{path} was not written: {to} does not compute what PyTorch '
                            'does.\n' + '\n'.join(bad))


def _check(model: nn.Module, path: Path, to: str, what: str, shape: Size, dynamic: bool,
           calibration: Optional[Sequence[Tensor]], images: Sequence[Tensor]):
    if to not in SUFFIXES:
        raise ValueError(f'to={to!r}: expected one of {", ".join(SUFFIXES)}')
    if path.suffix != SUFFIXES[to]:
        raise ValueError(f'{path}: a file for {to} ends in {SUFFIXES[to]}')
    if min(shape) < MIN_SIZE:
        raise ValueError(f'shape of {shape[0]} x {shape[1]} px: both must be at least {MIN_SIZE}')
    if dynamic and to == 'coreml':
        raise ValueError('Core ML: --dynamic is for onnx and openvino; export a file for each '
                         'size that you need')
    if to == 'coreml' and what == 'model' and hasattr(model, 'roi_head'):
        raise ValueError('Core ML: a detector cannot be exported whole, as coremltools has no '
                         'roi_align; export its backbone and neck with --what neck')
    if to == 'coreml' and any(isinstance(module, AttentionBias) and module.mode == 'legacy'
                              for module in model.modules()):
        raise ValueError("Core ML: bias_mode='legacy' cannot be exported, as coremltools has no "
                         'bicubic interpolation')
    if calibration is not None:
        check_int8(to)
        if not len(calibration) or not len(images):
            raise ValueError('int8: images to calibrate on, and some others to compare on, are '
                             'needed')
    if any(getattr(module, 'deployed', False) for module in model.modules()):
        raise ValueError('the model is fused already; give it as it was trained, so that the '
                         'fused one can be compared with it')


def compare(model: nn.Module, what: str, run, inputs: Sequence[Tensor], int8: bool = False
            ) -> List[Comparison]:
    """Compare what mmdet or mmseg compute with ``run``, a function from an image to outputs.

    Detections may come in any order; each is compared with its counterpart, which has the
    same label and, within tolerance, the same box and score. Of int8, a counterpart's
    box overlaps (IoU 0.5), its score may be any.

    Raises:
        MismatchError: An output has another shape.
    """
    errors: Dict[str, List[Tuple[float, float]]] = {}
    strays = total = 0
    for image in inputs:
        expected, actual = expected_outputs(model, what, image), run(image)
        if 'boxes' in expected:
            both = [expected['scores'], actual['scores']] if int8 else [
                torch.ones_like(found['scores']) for found in (expected, actual)]
            rows, others = _pair(expected, actual, max(image.shape[2:]), int8)
            paired = torch.minimum(both[0][rows], both[1][others]).sum().item()
            both = sum(each.sum().item() for each in both)
            strays, total = strays + both - 2 * paired, total + both
            expected = {name: value[rows] for name, value in expected.items()
                        if not int8 or name in ('boxes', 'masks')}
            actual = {name: value[others] for name, value in actual.items()}
        for name, value in expected.items():
            if value.shape != actual[name].shape:
                raise MismatchError(
                    f'{name} for an image of {image.shape[2]} x {image.shape[3]} px has shape '
                    f'{tuple(actual[name].shape)} instead of {tuple(value.shape)}')
            found = errors.setdefault(name, [(0., 0.)])
            if value.numel():
                # nan would lose every comparison, and so pass for no error at all.
                error = (actual[name].double() - value.double()).nan_to_num(nan=math.inf)
                found.append(tuple((each.norm() if int8 else each.abs().max()).item()
                                   for each in (error, value.double())))
    # The largest value, or the norm of all inputs' norms.
    compared = [Comparison(name, *(math.hypot(*each) if int8 else max(each)
                                   for each in zip(*found)), len(inputs), int8)
                for name, found in errors.items()]
    if 'boxes' in errors:
        compared.insert(0, Comparison(INT8_DETECTIONS if int8 else STRAYS, strays, total,
                                      len(inputs), int8))
    return compared


def _pair(expected: Dict[str, Tensor], actual: Dict[str, Tensor], side: int, int8: bool
          ) -> Tuple[Tensor, Tensor]:
    """Return the indices of the detections expected that have a counterpart, and of those."""
    from scipy.optimize import linear_sum_assignment
    if int8:
        far, limit = 1 - box_iou(expected['boxes'], actual['boxes']), 1 - INT8_IOU
    else:
        far = (expected['boxes'][:, None] - actual['boxes']).abs().amax(2) / side
        far = torch.maximum(far, (expected['scores'][:, None] - actual['scores']).abs())
        limit = TOLERANCE
    far = far + (expected['labels'][:, None] != actual['labels']) / TOLERANCE
    # nan, as any distance beyond, is no counterpart.
    far = far.double().nan_to_num(1 / TOLERANCE).clamp(max=1 / TOLERANCE)
    rows, others = map(torch.as_tensor, linear_sum_assignment(far.numpy()))
    near = far[rows, others] <= limit
    return rows[near], others[near]


@torch.no_grad()
def expected_outputs(model: nn.Module, what: str, image: Tensor) -> Dict[str, Tensor]:
    """Return what a model's own library computes, under the names of the exported outputs."""
    if what != 'model':
        features = getattr(model, 'backbone', model)(image)
        features = model.neck(features) if what == 'neck' else features
        return {f'feature{i}': feature for i, feature in enumerate(features)}
    if hasattr(model, 'decode_head'):
        return dict(logits=model.predict(image)[0].seg_logits.data[None])
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import bbox2roi
    size = tuple(image.shape[2:])
    sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size,
                                         batch_input_shape=size, scale_factor=(1., 1.)))
    features = model.extract_feat(image)
    proposals = model.rpn_head.predict(features, [sample], rescale=False)
    found, = model.roi_head.predict_bbox(features, [sample.metainfo], proposals,
                                         model.roi_head.test_cfg, rescale=False)
    outputs = dict(boxes=found.bboxes, scores=found.scores, labels=found.labels)
    if model.roi_head.with_mask:
        head = model.roi_head.mask_head
        if len(found):
            masks = model.roi_head._mask_forward(features, bbox2roi([found.bboxes]))['mask_preds']
            classes = torch.zeros_like(found.labels) if head.class_agnostic else found.labels
            masks = masks[range(len(found)), classes].sigmoid()
        else:
            side = model.roi_head.mask_roi_extractor.roi_layers[0].output_size[0] * 2
            masks = image.new_zeros(0, side, side)
        outputs['masks'] = masks
    return outputs


def _sizes(shape: Size) -> List[Size]:
    """Return five sizes to compare a dynamic file at: odd, smallest and turned ones too."""
    height, width = shape
    odd = (max(height * 2 // 3, MIN_SIZE) | 1, max(width * 3 // 4, MIN_SIZE) | 1)
    return [shape, (width, height + 1), odd, (MIN_SIZE + 1, 3 * MIN_SIZE - 1),
            (MIN_SIZE, MIN_SIZE)]


def _inputs(sizes: Sequence[Size], images: Sequence[Tensor], random: bool = False
            ) -> List[Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for size in sizes:
        if random:
            inputs.append(torch.randn(1, 3, *size, generator=generator))
        inputs += [F.interpolate(image, size=size, mode='bilinear', antialias=True)
                   for image in images]
    return inputs


def _trace_size(part: Traceable) -> Size:
    """Return a size at which no bias table needs resampling less than elsewhere.

    A trace keeps the way it went: a table that happens to fit would not be resampled.
    """
    tables = {tuple(module.table.shape[1:]) for module in part.modules()
              if isinstance(module, AttentionBias)}
    for rows, cols in ((3, 4), (5, 7), (9, 11)):  # tokens at stride 32
        if not tables & {(rows, cols), (2 * rows, 2 * cols)}:
            return rows * MIN_SIZE, cols * MIN_SIZE
    raise ValueError(f'bias tables of the sizes {sorted(tables)} cannot be traced for any size')


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the tracer says of each check of a shape, and of its own age."""
    with warnings.catch_warnings():
        for category in (torch.jit.TracerWarning, DeprecationWarning, UserWarning):
            warnings.simplefilter('ignore', category)
        yield


def _write_onnx(part: Traceable, path: Path, shape: Size, dynamic: bool, meta: Dict):
    onnx = require('onnx', 'onnx')
    axes = None
    if dynamic:
        shape = _trace_size(part)
        axes = {INPUT: {2: 'height', 3: 'width'}}
    if isinstance(part, TwoStageDetector):
        axes = dict(axes or {}, **{name: {0: 'detections'} for name in part.output_names})
    elif dynamic:
        axes.update({name: {2: f'{name}_height', 3: f'{name}_width'}
                     for name in part.output_names})
    new = {} if torch.__version__ < '2.5' else dict(dynamo=False)
    with torch.no_grad(), _quiet():
        torch.onnx.export(part, (torch.zeros(1, 3, *shape), ), str(path), input_names=[INPUT],
                          output_names=[*part.output_names], dynamic_axes=axes,
                          opset_version=OPSET, **new)
    proto = onnx.load(str(path))
    onnx.helper.set_model_props(proto, describe(**meta))
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))


def _write_openvino(part: Traceable, path: Path, shape: Size, dynamic: bool, meta: Dict):
    openvino = require('openvino', 'openvino')
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / 'model.onnx'
        _write_onnx(part, graph, shape, dynamic, meta)
        model = openvino.convert_model(str(graph))
        for key, value in describe(**meta).items():
            model.set_rt_info(value, key)
        openvino.save_model(model, str(path), compress_to_fp16=False)


def _write_coreml(part: Traceable, path: Path, shape: Size, dynamic: bool, meta: Dict):
    coremltools = require('coremltools', 'coreml')
    image = torch.zeros(1, 3, *shape)
    with torch.no_grad(), _quiet():
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
