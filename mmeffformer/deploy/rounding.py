"""Files of less than fp32, made from fp32 files of ONNX and OpenVINO."""
import json
from pathlib import Path
from typing import Any, Optional, Sequence, Tuple

from torch import Tensor

from .quantisation import quantise_onnx, quantise_openvino
from .runtimes import META, describe, openvino_core, require


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
        from onnxruntime.transformers.float16 import convert_float_to_float16
        model = convert_float_to_float16(model, keep_io_types=True)
    onnx.helper.set_model_props(model, describe(**dict(meta, precision=precision)))
    onnx.save(model, str(target))


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
