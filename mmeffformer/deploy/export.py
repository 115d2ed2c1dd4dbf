"""Export to ONNX, OpenVINO, Core ML and ExecuTorch. A file that does not match is not kept.

TorchScript's tracer makes the graph: it traces the modules of mmdet and mmseg unchanged, and keeps
sizes as operators of the graph, so that one file can serve any size. torch.export makes
ExecuTorch's.
"""
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Union

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from ..models.attention import AttentionBias
from ..models.fuse import fuse
from ..utils.config import dataset_metainfo, find_scope, model_cfg
from ..utils.registry import MODELS
from ..weights.compatibility import load_compatible
from .comparison import (
    Comparison,
    MismatchError,
    check_matches,
    compare,
    expected_outputs,
    size_divisor,
)
from .coreml import RUNS, check_program, write_coreml
from .executorch import write_executorch
from .graphs import PARTS, describe_part, input_channels, traceable
from .inputs import (
    MIN_SIZE,
    Size,
    describe_input,
    draw_pictures,
    read_pictures,
    resized_inputs,
)
from .quantisation import TrainingImages
from .rounding import write_rounded
from .runtimes import (
    INPUT,
    SUFFIXES,
    ExportedFile,
    choose_precision,
    describe,
    require,
)
from .tracing import Traceable

# Formats of one size: name, and why detectors are not exported whole.
FIXED = {'coreml': ('Core ML', 'detections vary in number, and coremltools has no roi_align'),
         'executorch': ('ExecuTorch', 'it has neither nms nor roi_align')}
OPSET = 17  # of ONNX; RoIAlign as in mmdet needs 16


def export_checkpoint(cfg: Config, checkpoint: str, path: str, to: str, what: str, shape: Size,
                      dynamic: bool = False, images: Sequence[str] = (),
                      int8: Optional[int] = None, precision: Optional[str] = None
                      ) -> List[Comparison]:
    """Export a trained detector or segmentor, see :func:`export`.

    The metadata of the file has the normalisation of its input, the classes, and the windows of
    a segmentor that slides.

    Args:
        cfg: The model's config.
        checkpoint: The file with the model's weights.
        images: Image files to compare on besides random inputs, read by the test pipeline; if
            none, two drawn images.
        int8: Number of training images to calibrate an int8 file on, which is compared on other
            training images and ``images``; None exports fp32 only.

    Raises:
        FileNotFoundError: The checkpoint or the training set does not exist.
        ValueError: The checkpoint does not fit the config, an image cannot be read, or an error
            of :func:`export`.
    """
    choose_precision(to, precision, int8 is not None)
    init_default_scope(find_scope(cfg))
    network = model_cfg(cfg)
    network.backbone.init_cfg = None  # the checkpoint has every weight
    model = revert_sync_batchnorm(MODELS.build(network))
    classes = dataset_metainfo(cfg, load_compatible(model, checkpoint))['classes']
    channels = input_channels(model)
    meta = dict(config=Path(cfg.filename or '').name, checkpoint=Path(checkpoint).name,
                classes=list(classes), **describe_input(cfg, channels))
    if what == 'model' and (windows := _windows(model)):
        meta['windows'] = windows
    preprocessor, calibration = model.data_preprocessor, None
    inputs = read_pictures(cfg, preprocessor, images)
    if int8 is not None:
        training = TrainingImages(cfg, preprocessor)
        calibration, others = training.split(int8)
        inputs += [*others]
        meta['calibrated_on'] = f'{int8} images of {training.source}'
    return export(model, path, to, what, shape, dynamic,
                  inputs or draw_pictures(preprocessor, channels, shape), meta, calibration,
                  precision)


def _windows(model: nn.Module) -> Optional[Dict[str, List[int]]]:
    """Return H, W of size and stride of a segmentor's windows in px; None if it does not slide."""
    cfg = getattr(model, 'test_cfg', None) or {}
    return {key: [*cfg[key]] for key in ('crop_size', 'stride')} if (
        cfg.get('mode') == 'slide') else None


def export(model: nn.Module, path: Union[str, Path], to: str, what: str, shape: Size,
           dynamic: bool = False, images: Sequence[Tensor] = (), meta: Optional[Dict] = None,
           calibration: Optional[Sequence[Tensor]] = None, precision: Optional[str] = None
           ) -> List[Comparison]:
    """Fuse a copy of a model, export it, and keep the file if it computes the same.

    Args:
        model: A backbone, or a model of mmdet or mmseg, not fused.
        path: The file to write, with the format's suffix in ``SUFFIXES``.
        to: 'onnx', 'openvino', 'coreml' or 'executorch'.
        what: 'backbone', 'neck' or 'model', see :func:`traceable`.
        shape: H, W of the input in px.
        dynamic: Make a file for any H, W from 32 px. ``shape`` is one of the sizes compared at.
        images: Normalised float images (1, C, H, W), compared on besides random inputs, resized.
        meta: Further metadata of the file.
        calibration: Normalised float images (1, C, H, W) to calibrate an int8 file on.
        precision: One of ``PRECISIONS[to]``; by default int8 with ``calibration``, else the first.
            Files in another precision than fp32 are made after an fp32 file that matches (except
            Core ML's), and compared on ``images`` only, if there are any.

    Returns:
        The comparison of each output; none where Core ML cannot run, which needs macOS. There
        its program is checked, see :func:`check_program`.

    Raises:
        ValueError: The model or a combination of arguments cannot be exported, or a package is
            missing. Where a part of the model cannot be exported, the message names it.
        MismatchError: The file does not match. It is not kept; an existing file stays.
    """
    path, shape = Path(path), (shape[0], shape[1])
    precision = choose_precision(to, precision, calibration is not None)
    _check_arguments(model, path, to, what, shape, dynamic, calibration, images)
    model.eval()
    first = precision if to == 'coreml' else 'fp32'
    divisor = size_divisor(model, what) if dynamic else 1
    inputs = partial(resized_inputs, input_channels(model), shape, dynamic, images, divisor)
    meta = dict(meta or {}, shape=list(shape), dynamic=dynamic, size_divisor=divisor,
                precision=first)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.export-', dir=path.parent) as folder:
        file = Path(folder) / path.name
        compared = _write_checked(model, what, file, to, inputs(noise=True), meta)
        if precision != first:
            fp32, file = file, Path(folder) / precision / path.name
            found = inputs(noise=not images)
            _write_rounded(model, what, fp32, file, to, precision, found[0], meta, calibration)
            compared = compare(model, what, ExportedFile(file, to), found, precision)
            check_matches(compared, f'{path} was not written: {to} in {precision}')
        _move(file.parent, path.parent)
    return compared


def _write_rounded(model: nn.Module, what: str, fp32: Path, file: Path, to: str, precision: str,
                   image: Tensor, meta: Dict, calibration: Optional[Sequence[Tensor]]) -> None:
    """Write a file in another precision: of the fp32 file, or for ExecuTorch of the model."""
    file.parent.mkdir()
    try:
        if to != 'executorch':
            write_rounded(fp32, file, to, precision, calibration or (),
                          None if meta['dynamic'] else meta['shape'])
            return
        part = traceable(fuse(deepcopy(model)), what)
        meta = dict(meta, what=what, outputs=list(part.output_names), precision=precision)
        write_executorch(part, file, image, meta, calibration)
    except OSError:  # of the file system
        raise
    except Exception as error:  # converters share no exception class
        raise ValueError(f'{file.name} was not written: {to} in {precision}: {_reason(error)}'
                         ) from error


def write_unchecked(model: nn.Module, path: Path, to: str, what: str, shape: Size,
                    dynamic: bool = False, precision: str = 'fp32',
                    calibration: Sequence[Tensor] = ()) -> None:
    """Fuse a model in place and export it without a comparison, in order to time the file.

    Args:
        model, path, to, what, shape, dynamic, precision, calibration: As for :func:`export`;
            ``to`` is 'onnx' or 'openvino'.

    Raises:
        ValueError: The model cannot be exported, or a package is missing.
    """
    for package in PACKAGES[to]:
        require(package, to)
    part = traceable(fuse(model), what)
    meta = dict(what=what, outputs=list(part.output_names), shape=[*shape], dynamic=dynamic,
                precision='fp32')
    file = path if precision == 'fp32' else path.with_name(f'fp32-{path.name}')
    WRITERS[to](part, file, torch.zeros(1, input_channels(model), *shape), meta)
    if precision != 'fp32':
        write_rounded(file, path, to, precision, calibration, None if dynamic else shape)


def window_size(model: nn.Module) -> Optional[Size]:
    """Return H, W in px of the windows that a segmentor slides, None if it slides none."""
    windows = _windows(model)
    return (windows['crop_size'][0], windows['crop_size'][1]) if windows else None


def _write_checked(model: nn.Module, what: str, file: Path, to: str, inputs: Sequence[Tensor],
                   meta: Dict) -> List[Comparison]:
    """Write the file of a part and check it.

    Raises:
        MismatchError, ValueError: As :func:`export`.
    """
    part = traceable(fuse(deepcopy(model)), what)
    meta = dict(meta, what=what, outputs=list(part.output_names))
    written = False
    try:
        WRITERS[to](part, file, inputs[0], meta)
        written = True
        if to == 'coreml' and not RUNS:
            expected = expected_outputs(model, what, inputs[0])
            check_program(file, inputs[0], expected, meta['precision'])
            return []
        compared = compare(model, what, ExportedFile(file, to), inputs, meta['precision'])
        check_matches(compared, to)
        return compared
    except OSError:  # of the file system
        raise
    except Exception as error:  # exporters and runtimes share no exception class
        # If a smaller part fails too, it is the one that is named.
        for smaller in PARTS[:PARTS.index(what)]:
            if smaller == 'backbone' or getattr(model, smaller, None) is not None:
                _write_checked(model, smaller, file, to, inputs, meta)
        mismatch = isinstance(error, MismatchError)
        reason = _reason(error)
        if mismatch and not _repeatable(model, what, inputs[0]):
            reason = 'PyTorch computes other values at each run'
        elif written and meta['dynamic']:
            reason += '\nWithout --dynamic it may be possible'
        raise (MismatchError if mismatch else ValueError)(
            f'{file.name} was not written: {describe_part(model, what)} cannot be exported to '
            f'{to}: {reason}') from error


def _reason(error: Exception) -> str:
    """Return the message of an error, of other libraries only the start of it."""
    if isinstance(error, MismatchError):
        return str(error)
    # ExportedFile names a file that the user never sees, and the runtime's error is its cause.
    return ' '.join(str(error.__cause__ or error).split())[:300] or type(error).__name__


def _repeatable(model: nn.Module, what: str, image: Tensor) -> bool:
    first, second = (expected_outputs(model, what, image) for _ in range(2))
    return all(torch.equal(first[name], second[name]) for name in first)


def _move(source: Path, folder: Path) -> None:
    """Move all files of a folder into another one, where they replace those of the same name."""
    for each in source.iterdir():
        target = folder / each.name
        if target.is_dir():  # a package of Core ML
            shutil.rmtree(target)
        shutil.move(each, target)


def _check_arguments(model: nn.Module, path: Path, to: str, what: str, shape: Size, dynamic: bool,
                     calibration: Optional[Sequence[Tensor]], images: Sequence[Tensor]) -> None:
    for package in PACKAGES[to]:
        require(package, to)
    if path.suffix != SUFFIXES[to]:
        raise ValueError(f'{path}: expected a name that ends in {SUFFIXES[to]} for {to}')
    if min(shape) < MIN_SIZE:
        raise ValueError(f'shape {shape[0]} x {shape[1]} px: expected {MIN_SIZE} px or more')
    windows = _windows(model) if what == 'model' and not dynamic else None
    if windows and windows['crop_size'] != [*shape]:
        height, width = windows['crop_size']
        raise ValueError(f'shape {shape[0]} x {shape[1]} px: the model slides windows of {height} '
                         f'x {width} px; export it with that --shape, for any size with '
                         '--dynamic, or without windows with --cfg-options '
                         'model.test_cfg.mode=whole')
    if to in FIXED:
        name, detector = FIXED[to]
        if dynamic:
            raise ValueError(f'{name}: --dynamic is for onnx and openvino; export one file for '
                             'each size that you need')
        if what == 'model' and not hasattr(model, 'encode_decode'):
            raise ValueError(f'{name}: a detector cannot be exported whole, because {detector}; '
                             'export its backbone and neck with --what neck')
    if to == 'coreml' and any(isinstance(module, AttentionBias) and module.mode == 'legacy'
                              for module in model.modules()):
        raise ValueError("Core ML: bias_mode='legacy' cannot be exported, because coremltools has "
                         'no bicubic interpolation')
    if calibration is not None and not (len(calibration) and len(images)):
        raise ValueError('int8: expected images to calibrate on, and others to compare on')
    if any(getattr(module, 'deployed', False) for module in model.modules()):
        raise ValueError('the model is fused: pass the model as trained, because the exported '
                         'file is compared with it')


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


def _write_onnx(part: Traceable, path: Path, image: Tensor, meta: Dict) -> None:
    onnx = require('onnx', 'onnx')
    axes = part.dynamic_axes(meta['dynamic'])
    if meta['dynamic']:
        image = image.new_zeros(*image.shape[:2], *_trace_size(part))
        axes[INPUT] = {2: 'height', 3: 'width'}
    tracer = {} if torch.__version__ < '2.5' else dict(dynamo=False)
    with torch.no_grad(), _no_tracer_warnings():
        torch.onnx.export(part, (torch.zeros_like(image), ), str(path), input_names=[INPUT],
                          output_names=[*part.output_names], dynamic_axes=axes or None,
                          opset_version=OPSET, **tracer)
    proto = onnx.load(str(path))
    onnx.helper.set_model_props(proto, describe(**meta))
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))


def _write_openvino(part: Traceable, path: Path, image: Tensor, meta: Dict) -> None:
    openvino = require('openvino', 'openvino')
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / 'model.onnx'
        _write_onnx(part, graph, image, meta)
        model = openvino.convert_model(str(graph))
        for key, value in describe(**meta).items():
            model.set_rt_info(value, key)
        openvino.save_model(model, str(path), compress_to_fp16=False)


def _write_coreml(part: Traceable, path: Path, image: Tensor, meta: Dict) -> None:
    with torch.no_grad(), _no_tracer_warnings():
        write_coreml(part, path, torch.zeros_like(image), meta)


WRITERS = {'onnx': _write_onnx, 'openvino': _write_openvino, 'coreml': _write_coreml,
           'executorch': write_executorch}
PACKAGES = {'onnx': ('onnx', 'onnxruntime'), 'openvino': ('onnx', 'openvino'),
            'coreml': ('coremltools', ), 'executorch': ('executorch.runtime', 'torchao')}
