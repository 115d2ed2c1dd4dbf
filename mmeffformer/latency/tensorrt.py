"""Calls of TensorRT on a GPU. Written after the documentation of versions 10 and 11; not run."""
from pathlib import Path

import torch
from torch import Tensor

from ..deploy.runtimes import INPUT, require
from .timing import Call


def engine(path: Path, image: Tensor) -> Call:
    """Return a call that runs an ONNX file on ``image`` and waits for the outputs.

    Layers compute in the type of the file's tensors, which is that of ``image``, fp32 ones in
    TF32 where the GPU can.

    Raises:
        ValueError: TensorRT is not installed, or cannot read the file or build its engine.
    """
    package = require('tensorrt', 'tensorrt')
    logger = package.Logger(package.Logger.ERROR)
    builder = package.Builder(logger)
    typed = package.NetworkDefinitionCreationFlag.STRONGLY_TYPED  # always so in version 11
    network = builder.create_network(1 << int(typed))
    parser = package.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise ValueError(f'TensorRT cannot read {path}: {parser.get_error(0).desc()}')
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        raise ValueError(f'TensorRT cannot build an engine of {path}')
    built = package.Runtime(logger).deserialize_cuda_engine(plan)
    context, tensors = built.create_execution_context(), {}
    for i in range(built.num_io_tensors):
        name = built.get_tensor_name(i)
        tensors[name] = image.cuda() if name == INPUT else torch.empty(
            tuple(built.get_tensor_shape(name)), dtype=image.dtype, device='cuda')
        context.set_tensor_address(name, tensors[name].data_ptr())
    stream = torch.cuda.Stream()

    def call():
        context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        return [value for name, value in tensors.items() if name != INPUT]

    torch.cuda.synchronize()  # the input has arrived
    return call
