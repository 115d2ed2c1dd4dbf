"""Calls of modules and of exported files in the runtimes that are timed."""
import warnings
from pathlib import Path
from typing import Any, Optional, Tuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..deploy import coreml
from ..deploy.export import OPSET, WRITERS
from ..deploy.runtimes import INPUT, SUFFIXES, compile_openvino, openvino_core, require
from ..deploy.tracing import Traceable
from . import tensorrt
from .timing import Call

# The runtimes that run exported files
FILES = ('onnx', 'openvino', 'executorch', 'coreml', 'tensorrt')
PACKAGES = {'pytorch': (), 'onnx': ('onnx', 'onnxruntime'), 'openvino': ('onnx', 'openvino'),
            'executorch': ('executorch.runtime', 'executorch'), 'coreml': ('coremltools', ) * 2,
            'tensorrt': ('onnx', 'tensorrt')}
# Those with another precision than fp32; Core ML computes fp16 on the neural engine, fp32 on the
# CPU.
HALF = ('coreml', 'tensorrt')
LEAST_CALLS = {'coreml': 1000}  # in a sample, whose mean counts: the paper's protocol


def require_packages(runtime: str) -> None:
    """Raise a ValueError if a package, or the device, that the runtime needs is missing."""
    if runtime == 'coreml' and not coreml.RUNS:
        raise ValueError('coreml: Core ML runs on macOS only. Export the file here with '
                         'tools/export.py, and time it on a Mac or, in Xcode, on a phone')
    if runtime == 'tensorrt' and not torch.cuda.is_available():
        raise ValueError('tensorrt: TensorRT runs on GPUs of NVIDIA only, and torch finds none '
                         'here')
    for package in PACKAGES[runtime]:
        require(package, runtime)


def suffix(runtime: str) -> str:
    """Return the suffix of the files that a runtime runs."""
    return SUFFIXES.get(runtime, '.onnx')  # TensorRT reads ONNX


class AnyModule(Traceable):
    """A module whose tensors are named ``output0``, ..., for the writers of ``deploy``."""

    def __init__(self, module: nn.Module, image: Tensor):
        super().__init__()
        self.module = module
        # Captured, a module may have other outputs than run.
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            count = len(self.compute(mode.from_tensor(image)))
        self.output_names = tuple(f'output{i}' for i in range(count))
        self.eval()

    def compute(self, image: Tensor) -> Tuple[Tensor, ...]:
        outputs = self.module(image)
        return (outputs, ) if isinstance(outputs, Tensor) else tuple(outputs)


def write_module(module: nn.Module, image: Tensor, path: Path, runtime: str,
                 precision: str = 'fp32') -> None:
    """Export a module for a runtime and inputs like ``image``, without comparing outputs."""
    if runtime == 'tensorrt' and precision == 'fp16':  # the graph's types decide
        module, image = module.half(), image.half()
    if suffix(runtime) == '.onnx' or runtime == 'openvino':
        return write_graph(module, image, path)
    part = AnyModule(module, image)
    WRITERS[runtime](part, path, image, dict(
        shape=list(image.shape[2:]), dynamic=False, precision=precision,
        outputs=list(part.output_names)))


def write_graph(module: nn.Module, image: Tensor, path: Path) -> None:
    """Export a module unchanged as ONNX, for inputs like ``image``, without comparing outputs."""
    legacy = {} if torch.__version__ < '2.5' else dict(dynamo=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the tracer warns of fixed shapes and of its age
        torch.onnx.export(module, (image, ), str(path), input_names=[INPUT],
                          opset_version=OPSET, **legacy)


def onnx_session(path: Path, threads: int, profile: Optional[Path] = None) -> Any:
    """Return a session of ONNX Runtime.

    Args:
        profile: Prefix of the profile that the session writes when its profiling ends.
    """
    runtime = require('onnxruntime', 'onnx')
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    # Threads that spin after a call would disturb the timer that comes next.
    options.add_session_config_entry('session.force_spinning_stop', '1')
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return runtime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


def openvino_model(path: Path, threads: int, **properties: Any) -> Any:
    """Return a model that OpenVINO compiled for its file's precision, with more ``properties``."""
    return compile_openvino(openvino_core().read_model(str(path)), **{
        'INFERENCE_NUM_THREADS': threads, 'PERFORMANCE_HINT': 'LATENCY', **properties})


def executorch_call(path: Path, image: Tensor, threads: int) -> Call:
    """Return a call of ExecuTorch, and set the threads of all its calls in this process."""
    runtime = require('executorch.runtime', 'executorch').runtime.Runtime.get()
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    _unsafe_reset_threadpool(threads)
    program = runtime.load_program(path)
    method = program.load_method('forward')
    return lambda program=program: method.execute([image])


def open_file(runtime: str, path: Path, image: Tensor, threads: int, precision: str = 'fp32'
              ) -> Call:
    """Return a call that runs an exported file on ``image``, in the precision of its metadata.

    Args:
        runtime: One of ``FILES``.
        precision: For 'coreml' and 'tensorrt', 'fp32' or 'fp16'.
    """
    if runtime == 'executorch':
        return executorch_call(path, image, threads)
    if runtime == 'tensorrt':
        return tensorrt.engine(path, image.half() if precision == 'fp16' else image)
    array = image.numpy()
    if runtime == 'coreml':
        tools = require('coremltools', 'coreml')
        units = tools.ComputeUnit.CPU_AND_NE if precision == 'fp16' else tools.ComputeUnit.CPU_ONLY
        model = tools.models.MLModel(str(path), compute_units=units)
        return lambda: model.predict({INPUT: array})
    if runtime == 'onnx':
        session = onnx_session(path, threads)
        return lambda: session.run(None, {INPUT: array})
    request = openvino_model(path, threads).create_infer_request()
    return lambda: request.infer([array], share_inputs=True)


def open_module(module: nn.Module, image: Tensor, runtime: str, threads: int, path: Path,
                precision: str = 'fp32') -> Call:
    """Return a call that runs a module on ``image``.

    Args:
        runtime: 'pytorch' (channels_last), or one of ``FILES``, whose outputs are not compared.
        path: The exported file without a suffix.
    """
    if runtime in FILES:
        # OpenVINO reads ONNX as well.
        path = path.with_name(path.name + suffix(runtime).replace('.xml', '.onnx'))
        write_module(module, image, path, runtime, precision)
        return open_file(runtime, path, image, threads, precision)
    module = module.to(memory_format=torch.channels_last)
    image = image.to(memory_format=torch.channels_last)
    return torch.no_grad()(lambda: module(image))
