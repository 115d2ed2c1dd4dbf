"""Core ML files, which run on macOS only. Their program is checked everywhere."""
import platform
from pathlib import Path
from typing import Dict, Iterator, Mapping, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from .runtimes import INPUT, describe, require
from .tracing import Traceable

RUNS = platform.system() == 'Darwin'
# Names of types in Core ML's specification. The neural engine computes in fp16 only.
TYPES = {'fp16': 'FLOAT16', 'fp32': 'FLOAT32'}
# Casts separate the file's input and outputs, which are float32, from the program.
CAST = 'cast'


def write_coreml(part: Traceable, path: Path, image: Tensor, meta: Dict) -> None:
    """Write the file of a part for inputs of the shape of ``image``.

    Weights and operators have the type of ``meta['precision']``, input and outputs are float32.
    """
    coremltools = require('coremltools', 'coreml')
    traced = torch.jit.trace(part, image, check_trace=False)
    model = coremltools.convert(
        traced, convert_to='mlprogram',
        inputs=[coremltools.TensorType(INPUT, tuple(image.shape), np.float32)],
        outputs=[coremltools.TensorType(name, dtype=np.float32) for name in part.output_names],
        compute_precision=coremltools.precision[TYPES[meta['precision']]],
        minimum_deployment_target=coremltools.target.iOS16)
    model.user_defined_metadata.update(describe(**meta))
    model.save(str(path))


def check_program(path: Path, image: Tensor, outputs: Mapping[str, Tensor],
                  precision: str) -> None:
    """Check the program of a file: inputs, outputs, and types of operators and weights.

    Args:
        path: The file.
        image: An input.
        outputs: What PyTorch computes for it, by name.
        precision: 'fp16' or 'fp32'.

    Raises:
        ValueError: The file has another input or output, needs an operator that is not Core ML's
            own, or computes or stores weights in another type.
    """
    spec = require('coremltools', 'coreml').models.MLModel(
        str(path), skip_model_load=True).get_spec()
    expected = {name: ['FLOAT32', *value.shape]
                for name, value in dict(outputs, **{INPUT: image}).items()}
    found = {each.name: [*_multi_array(each.type.multiArrayType)]
             for each in [*spec.description.input, *spec.description.output]}
    if found != expected:
        raise ValueError(f'the file has the inputs and outputs {found}: expected {expected}')
    for operator, kind, shape in _values(spec.mlProgram):
        if operator.startswith('custom'):
            raise ValueError(f"operator {operator} is not one of Core ML's own")
        # Constants of one value are settings of operators.
        wrong = kind.startswith('FLOAT') and kind != TYPES[precision]
        if wrong and operator != CAST and not (operator == 'const' and np.prod(shape) <= 1):
            raise ValueError(f'an output of operator {operator} of shape {shape} has type {kind}: '
                             f'expected {TYPES[precision]}')


def _multi_array(kind) -> Iterator:
    yield kind.ArrayDataType.Name(kind.dataType)
    yield from kind.shape


def _values(program) -> Iterator[Tuple[str, str, Sequence[int]]]:
    """Yield operator, type and shape of each tensor of a program."""
    from coremltools.proto.MIL_pb2 import DataType
    for function in program.functions.values():
        for operation in function.block_specializations[function.opset].operations:
            for output in operation.outputs:
                kind = output.type.tensorType
                yield (operation.type, DataType.Name(kind.dataType),
                       [each.constant.size for each in kind.dimensions])
