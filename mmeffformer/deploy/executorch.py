"""ExecuTorch files, whose operators XNNPACK computes on the CPU of a phone, or here."""
import os
import warnings
from pathlib import Path
from typing import Dict, Optional, Sequence

import torch
from torch import Tensor, nn

from ..models.attention import AttentionBias
from .inputs import resized_inputs
from .runtimes import describe, require
from .tracing import Traceable


@torch.no_grad()
def write_executorch(part: Traceable, path: Path, image: Tensor, meta: Dict,
                     calibration: Optional[Sequence[Tensor]] = None) -> None:
    """Write the file of a part for inputs of the shape of ``image``.

    The metadata is the value of a constant method of the program.

    Args:
        calibration: Normalised float images (1, C, H, W) to calibrate an int8 file on; they are
            resized to the shape. None writes fp32.
    """
    package = require('executorch.data.bin', 'executorch')
    # The compiler of the file's format comes along, but may not be on the PATH.
    os.environ.setdefault('FLATC_EXECUTABLE',
                          str(Path(package.data.bin.__file__).with_name('flatc')))
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    keep_biases(part, image)
    part.forward = part.compute  # of one size, pooling needs no matrix products
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about functions of torch that will be removed
        program = torch.export.export(part, (image, ))
        if calibration is not None:
            program = torch.export.export(
                quantised(program.module(), image, calibration), (image, ))
        lowered = to_edge_transform_and_lower(
            program, partitioner=[XnnpackPartitioner()], constant_methods=describe(**meta))
        path.write_bytes(lowered.to_executorch().buffer)


def keep_biases(part: nn.Module, image: Tensor) -> None:
    """Replace the expansion of bias tables by its result for images like ``image``."""
    biases = [module for module in part.modules() if isinstance(module, AttentionBias)]
    hooks = [module.register_forward_hook(_keep_output) for module in biases]
    part(image)
    for hook in hooks:
        hook.remove()


def _keep_output(module: nn.Module, _, output: Tensor) -> None:
    module.register_buffer('expanded', output, persistent=False)
    module.forward = lambda *_: module.expanded


def quantised(program: nn.Module, image: Tensor, calibration: Sequence[Tensor]) -> nn.Module:
    """Return an exported program with convolutions and linear layers in int8.

    Weights are quantised per channel, and activations by the ranges that the images give.
    """
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    quantise = require('torchao.quantization.pt2e.quantize_pt2e',
                       'executorch').quantization.pt2e.quantize_pt2e
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(
        is_per_channel=True))
    prepared = quantise.prepare_pt2e(program, quantizer)
    channels, *size = image.shape[1:]
    for each in calibration:
        prepared(*resized_inputs(channels, (size[0], size[1]), False, [each]))
    return quantise.convert_pt2e(prepared)
