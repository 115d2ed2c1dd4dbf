"""Exported files, run by ONNX Runtime, OpenVINO or Core ML."""
import json
from functools import cache
from pathlib import Path
from typing import Any, Dict, Mapping

import numpy as np
import torch
from torch import Tensor

SUFFIXES = {'onnx': '.onnx', 'openvino': '.xml', 'coreml': '.mlpackage'}
META = 'mmeffformer'  # the key of our description in a file's metadata
INPUT = 'image'


def describe(**meta: Any) -> Dict[str, str]:
    """Return metadata for a file, from values that JSON can hold."""
    return {META: json.dumps(meta)}


def require(module: str, to: str):
    """Import and return a package of the extra 'export'.

    Raises:
        ValueError: It is not installed.
    """
    try:
        return __import__(module)
    except ImportError as error:
        raise ValueError(f'{to} needs the package {module} ({error}); install what exporting '
                         "needs with pip install -e '.[export]'") from error


@cache
def openvino_core():
    """Return the one ``openvino.Core`` of this process.

    Compiling with a core sets a stack for signal handlers, and the end of the core sets the one
    there was before. Where of two the first ends first, the second sets a stack that is freed,
    and the next handled signal, as of a dataloader's worker, is a segmentation fault (2026.4).

    Raises:
        ValueError: OpenVINO is not installed.
    """
    return require('openvino', 'openvino').Core()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class ExportedFile:
    """A file of :func:`export`, as a function from an image to named outputs.

    Attributes:
        meta: What the file says of itself: what it holds, its input size, mean and std.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is broken or of another format, or does not come from here.
    """

    def __init__(self, path: str, to: str):
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f'exported file {str(path)!r} does not exist')
        if self.path.suffix != SUFFIXES[to]:
            raise ValueError(f'{path} is no file for {to}: expected one that ends in '
                             f'{SUFFIXES[to]}')
        try:
            meta = self._open()
        except ValueError:  # of a missing package
            raise
        except Exception as error:  # the runtimes have no class in common for it
            raise ValueError(f'{path} is broken or no file for {to}: {_first_line(error)}. Export '
                             'it again') from error
        if META not in meta:
            raise ValueError(f'{path} was not written by tools/export.py: it does not say what '
                             'its input and outputs are')
        self.meta = json.loads(meta[META])

    def __call__(self, image: Tensor) -> Dict[str, Tensor]:
        """Return the outputs by name, for a normalised float image (1, 3, H, W).

        Raises:
            ValueError: The file is for images of another size.
        """
        size = tuple(image.shape[2:])
        if not self.meta['dynamic'] and size != tuple(self.meta['shape']):
            height, width = self.meta['shape']
            raise ValueError(f'{self.path} takes images of {height} x {width} px (height x '
                             f'width), this one has {size[0]} x {size[1]}: export it with that '
                             '--shape, or for any size with --dynamic')
        values = self._run(np.ascontiguousarray(image.cpu().numpy(), dtype=np.float32))
        return {name: torch.from_numpy(np.array(values[name])) for name in self.meta['outputs']}

    def _open(self) -> Mapping[str, str]:
        """Load the file and return its metadata."""
        raise NotImplementedError

    def _run(self, image: np.ndarray) -> Mapping[str, np.ndarray]:
        raise NotImplementedError


class OnnxFile(ExportedFile):

    def _open(self) -> Mapping[str, str]:
        runtime = require('onnxruntime', 'onnx')
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # an output of no detections is none to warn of
        self.session = runtime.InferenceSession(str(self.path), options,
                                                providers=['CPUExecutionProvider'])
        return self.session.get_modelmeta().custom_metadata_map

    def _run(self, image: np.ndarray) -> Mapping[str, np.ndarray]:
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, {INPUT: image})))


class OpenVinoFile(ExportedFile):

    def _open(self) -> Mapping[str, str]:
        model = openvino_core().read_model(str(self.path))
        # Else a CPU that can compute in bfloat16 does, with its rounding.
        self.compiled = openvino_core().compile_model(
            model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
        return {META: model.get_rt_info(META).astype(str)} if model.has_rt_info(META) else {}

    def _run(self, image: np.ndarray) -> Mapping[str, np.ndarray]:
        values = self.compiled(image)
        return {name: values[output] for output in self.compiled.outputs
                for name in output.get_names()}


class CoreMLFile(ExportedFile):
    """Runs on macOS only, as Core ML does."""

    def _open(self) -> Mapping[str, str]:
        self.model = require('coremltools', 'coreml').models.MLModel(str(self.path))
        return self.model.user_defined_metadata

    def _run(self, image: np.ndarray) -> Mapping[str, np.ndarray]:
        return self.model.predict({INPUT: image})


FILES = {'onnx': OnnxFile, 'openvino': OpenVinoFile, 'coreml': CoreMLFile}


def open_exported(path: str, to: str) -> ExportedFile:
    """Open a file of the format ``to``, 'onnx', 'openvino' or 'coreml'.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is of another format, was not written here, or its package is missing.
    """
    return FILES[to](path, to)
