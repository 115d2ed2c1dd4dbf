"""Exported files as functions, run by ONNX Runtime, OpenVINO, Core ML or ExecuTorch."""
import json
import threading
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, Mapping, Optional, Tuple, Union

import numpy as np
import torch
from torch import Tensor

SUFFIXES = {'onnx': '.onnx', 'openvino': '.xml', 'coreml': '.mlpackage', 'executorch': '.pte'}
# Precisions of each format's files, the default first.
PRECISIONS: Dict[str, Tuple[str, ...]] = {
    'onnx': ('fp32', 'fp16', 'int8'), 'openvino': ('fp32', 'fp16', 'bf16', 'int8'),
    'coreml': ('fp16', 'fp32'), 'executorch': ('fp32', 'int8')}
INT8_PACKAGES = {'openvino': ('nncf', 'int8'), 'executorch': ('torchao', 'executorch')}
HINTS = {'fp16': 'f16', 'bf16': 'bf16'}  # for OpenVINO, f32 for other precisions
META = 'mmeffformer'  # key of the description in a file's metadata
INPUT = 'image'


class SizeError(ValueError):
    """An image has another size than the file takes."""


# Metadata, and a function from the input to the outputs by name.
Opened = Tuple[Mapping[str, str], Callable[[np.ndarray], Mapping[str, np.ndarray]]]


def describe(**meta: Any) -> Dict[str, str]:
    """Return metadata for a file, from values that JSON can hold."""
    return {META: json.dumps(meta)}


def require(module: str, to: str) -> ModuleType:
    """Import and return a package of the extra 'export', or of 'executorch'.

    Raises:
        ValueError: The package is not installed.
    """
    try:
        return __import__(module)
    except ImportError as error:
        extra = to if to == 'executorch' else 'export'
        raise ValueError(f'{to} needs the package {module} ({error}); install the packages for '
                         f"export with pip install -e '.[{extra}]'") from error


def choose_precision(to: str, precision: Optional[str] = None, int8: bool = False) -> str:
    """Return ``precision``, or if it is None the default: int8 if wanted, else the format's first.

    Raises:
        ValueError: The format is unknown, has no such precision, or int8 excludes it; or int8
            needs a package that is not installed.
    """
    if to not in PRECISIONS:
        raise ValueError(f'to={to!r}: expected one of {", ".join(PRECISIONS)}')
    if int8 and precision not in (None, 'int8'):
        raise ValueError(f'int8 with precision {precision}: a file has one of them')
    precision = precision or ('int8' if int8 else PRECISIONS[to][0])
    if precision not in PRECISIONS[to]:
        raise ValueError(f'precision {precision!r} for {to}: expected one of '
                         f'{", ".join(PRECISIONS[to])}')
    if precision == 'int8':
        if not int8:
            raise ValueError('precision int8: expected images to calibrate on')
        if to in INT8_PACKAGES:
            require(*INT8_PACKAGES[to])
    return precision


@cache
def openvino_core():
    """Return the one ``openvino.Core`` of this process.

    The first compilation of a core sets a stack for signal handlers, and the end of the core
    restores the previous one. If the first of two cores ends first, the second restores a stack
    that is freed, and the next handled signal, such as the end of a dataloader's worker, is a
    segmentation fault (seen with 2026.4).

    Raises:
        ValueError: OpenVINO is not installed.
    """
    return require('openvino', 'openvino').Core()


def compile_openvino(model: Any, **properties: Any) -> Any:
    """Compile a model that OpenVINO read, for CPUs and the precision of the file's metadata.

    It is compiled for fp32 if the file has no metadata. Where :func:`cpu_computes_in` is False,
    OpenVINO computes in fp32.
    """
    precision = json.loads(model.get_rt_info(META).astype(str))['precision'] if (
        model.has_rt_info(META)) else 'fp32'
    # OpenVINO's default is bfloat16, with its rounding, on CPUs that can compute in it.
    return openvino_core().compile_model(model, 'CPU', {
        'INFERENCE_PRECISION_HINT': HINTS.get(precision, 'f32'), **properties})


def cpu_computes_in(precision: str) -> bool:
    """Return whether OpenVINO computes files of a 16-bit precision in it here, else in fp32."""
    return precision.upper() in openvino_core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES')


def _open_onnx(path: str, threads: Optional[int], streams: int) -> Opened:
    runtime = require('onnxruntime', 'onnx')
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # without warnings of outputs with zero detections
    if threads:
        options.intra_op_num_threads = max(1, threads // streams)
        # Threads that spin after a call would disturb what is timed next.
        options.add_session_config_entry('session.force_spinning_stop', '1')
    session = runtime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]
    return (session.get_modelmeta().custom_metadata_map,
            lambda image: dict(zip(names, session.run(names, {INPUT: image}))))


def _open_openvino(path: str, threads: Optional[int], streams: int) -> Opened:
    model = openvino_core().read_model(path)
    properties: Dict[str, Any] = {'INFERENCE_NUM_THREADS': threads} if threads else {}
    if streams > 1:
        properties.update({'PERFORMANCE_HINT': 'THROUGHPUT', 'NUM_STREAMS': streams})
    compiled = compile_openvino(model, **properties)
    own = threading.local()  # a request runs one image at a time

    def run(image: np.ndarray) -> Mapping[str, np.ndarray]:
        if not hasattr(own, 'request'):
            own.request = compiled.create_infer_request()
        values = own.request.infer([image])
        return {name: values[output] for output in compiled.outputs
                for name in output.get_names()}

    return {META: model.get_rt_info(META).astype(str)} if model.has_rt_info(META) else {}, run


def _open_coreml(path: str, threads: Optional[int], streams: int) -> Opened:
    model = require('coremltools', 'coreml').models.MLModel(path)  # runs on macOS only
    return model.user_defined_metadata, lambda image: model.predict({INPUT: image})


def _open_executorch(path: str, threads: Optional[int], streams: int) -> Opened:
    runtime = require('executorch.runtime', 'executorch').runtime.Runtime.get()
    program = runtime.load_program(path)
    if META not in program.method_names:
        return {}, lambda _: {}
    meta, = program.load_method(META).execute([])
    method, names = program.load_method('forward'), json.loads(meta)['outputs']

    def run(image: np.ndarray) -> Mapping[str, np.ndarray]:
        return dict(zip(names, map(Tensor.numpy, method.execute([torch.from_numpy(image)]))))

    return {META: meta}, run


OPENERS = {'onnx': _open_onnx, 'openvino': _open_openvino, 'coreml': _open_coreml,
           'executorch': _open_executorch}


class ExportedFile:
    """A file of :func:`mmeffformer.deploy.export.export`, as a function of an image.

    Several threads may call it at once.

    Args:
        path: The file.
        to: Its format, one of ``SUFFIXES``.
        threads: Number of CPU threads of ONNX Runtime or OpenVINO, which otherwise choose it.
        streams: Number of calls at once that the CPU threads are divided among.

    Attributes:
        to: The format.
        meta: Metadata of the file: the part exported, input size, mean, std and more.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is broken, of another format or not written by this project, or the
            package of its runtime is missing.
    """

    def __init__(self, path: Union[str, Path], to: str, threads: Optional[int] = None,
                 streams: int = 1):
        self.path, self.to = Path(path), to
        if not self.path.exists():
            raise FileNotFoundError(f'exported file {str(path)!r} does not exist')
        if self.path.suffix != SUFFIXES[to]:
            raise ValueError(f'{path}: expected a file that ends in {SUFFIXES[to]} for {to}')
        try:
            meta, self._run = OPENERS[to](str(path), threads, streams)
        except ValueError:  # a missing package
            raise
        except Exception as error:  # the runtimes share no exception class
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ValueError(f'{path} is broken or of another format than {to}: {first}. Export '
                             'the file again') from error
        if META not in meta:
            raise ValueError(f'{path} was not written by tools/export.py: its metadata does not '
                             'describe its input and outputs')
        self.meta = json.loads(meta[META])

    def __call__(self, image: Tensor) -> Dict[str, Tensor]:
        """Return the outputs by name, for a normalised float image (1, 3, H, W).

        Raises:
            SizeError: The file takes images of another size.
        """
        size = tuple(image.shape[2:])
        if not self.meta['dynamic'] and size != tuple(self.meta['shape']):
            height, width = self.meta['shape']
            raise SizeError(f'{self.path} takes images of {height} x {width} px (height x '
                            f'width), the image has {size[0]} x {size[1]}: export the file with '
                            'that --shape, or for any size with --dynamic')
        divisor = self.meta.get('size_divisor', 1)
        if any(side % divisor for side in size):
            raise SizeError(f'{self.path} takes images whose sides are multiples of {divisor} px, '
                            f'the image has {size[0]} x {size[1]}: pad it in the test pipeline')
        values = self._run(np.ascontiguousarray(image.cpu().numpy(), dtype=np.float32))
        return {name: torch.from_numpy(np.array(values[name])) for name in self.meta['outputs']}
