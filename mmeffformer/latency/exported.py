"""Calls of modules and of exported files in the runtimes that are timed."""
import warnings
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..deploy.export import OPSET
from ..deploy.runtimes import INPUT, compile_openvino, openvino_core, require
from .timing import Call

FILES = ('onnx', 'openvino')  # the runtimes that run exported files
PACKAGES = {'pytorch': (), 'onnx': ('onnx', 'onnxruntime'), 'openvino': ('onnx', 'openvino')}


def require_packages(runtime: str) -> None:
    """Raise a ValueError if a package that the runtime needs is missing."""
    for package in PACKAGES[runtime]:
        require(package, runtime)


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


def open_file(runtime: str, path: Path, image: Tensor, threads: int) -> Call:
    """Return a call that runs an exported file on ``image``, in the precision of its metadata.

    Args:
        runtime: One of ``FILES``.
    """
    array = image.numpy()
    if runtime == 'onnx':
        session = onnx_session(path, threads)
        return lambda: session.run(None, {INPUT: array})
    request = openvino_model(path, threads).create_infer_request()
    return lambda: request.infer([array], share_inputs=True)


def open_module(module: nn.Module, image: Tensor, runtime: str, threads: int, path: Path) -> Call:
    """Return a call that runs a module on ``image``.

    Args:
        runtime: 'pytorch' (channels_last), or one of ``FILES``, whose outputs are not compared.
        path: The exported file, ending in .onnx: OpenVINO reads it as well.
    """
    if runtime in FILES:
        write_graph(module, image, path)
        return open_file(runtime, path, image, threads)
    module = module.to(memory_format=torch.channels_last)
    image = image.to(memory_format=torch.channels_last)
    return torch.no_grad()(lambda: module(image))
