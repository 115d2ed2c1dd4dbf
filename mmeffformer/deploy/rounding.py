"""Files of less than fp32, made from fp32 files of ONNX and OpenVINO."""
import json
from pathlib import Path
from typing import Any, Optional, Sequence, Tuple

import numpy as np
from torch import Tensor

from .quantisation import quantise_onnx, quantise_openvino
from .runtimes import META, describe, openvino_core, require

WEIGHTED = {'Conv', 'ConvTranspose', 'Gemm', 'MatMul'}  # ONNX's operators with large weights


def write_rounded(source: Path, target: Path, to: str, precision: str,
                  calibration: Sequence[Tensor] = (), shape: Optional[Tuple[int, int]] = None
                  ) -> None:
    """Write a file that computes what an fp32 file does, in another precision.

    Args:
        source: A file of :func:`mmeffformer.deploy.export.export`.
        target: The file to write, not ``source``.
        to: 'onnx' or 'openvino'.
        precision: One of ``PRECISIONS[to]``, other than 'fp32'.
        calibration: For int8, see :func:`mmeffformer.deploy.quantisation.quantise_openvino`.
        shape: H, W in px that images are resized to; None keeps their sizes.

    Raises:
        ValueError: A package is not installed.
    """
    write = {'onnx': _write_onnx, 'openvino': _write_openvino}[to]
    write(source, target, precision, calibration, shape)


def _write_onnx(source: Path, target: Path, precision: str, *calibration: Any) -> None:
    onnx = require('onnx', 'onnx')
    model = onnx.load(str(source))
    meta = json.loads({each.key: each.value for each in model.metadata_props}[META])
    if precision == 'int8':
        model = quantise_onnx(model, *calibration)
    else:
        _halve_weights(model.graph)
    onnx.helper.set_model_props(model, describe(**dict(meta, precision=precision)))
    onnx.save(model, str(target))


def _halve_weights(graph: Any) -> None:
    """Store the weights of an ONNX graph in fp16, cast to fp32 by operators of the graph.

    All operators stay in fp32, and ONNX Runtime casts when it opens a file: ONNX Runtime's CPU
    has few operators in fp16, and boxes in px, nms and softmax would suffer from it.
    """
    from onnx import TensorProto, helper, numpy_helper
    weights = {name for node in graph.node if node.op_type in WEIGHTED for name in node.input}
    for each in graph.initializer:
        if each.name in weights and len(each.dims) > 1 and each.data_type == TensorProto.FLOAT:
            name, value = each.name, numpy_helper.to_array(each)
            if abs(value).max() <= np.finfo(np.float16).max:
                each.CopyFrom(numpy_helper.from_array(value.astype(np.float16), f'{name}_fp16'))
                graph.node.insert(0, helper.make_node('Cast', [each.name], [name],
                                                      to=TensorProto.FLOAT))


def _write_openvino(source: Path, target: Path, precision: str, *calibration: Any) -> None:
    model = openvino_core().read_model(str(source))
    meta = json.loads(model.get_rt_info(META).astype(str))
    if precision == 'int8':
        model = quantise_openvino(model, *calibration)
    for key, value in describe(**dict(meta, precision=precision)).items():
        model.set_rt_info(value, key)
    # bf16 weights are rounded when the model is compiled: files of OpenVINO cannot hold them.
    require('openvino', 'openvino').save_model(model, str(target),
                                               compress_to_fp16=precision == 'fp16')
