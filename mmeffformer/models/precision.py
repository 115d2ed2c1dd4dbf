"""Inference in half precision.

Errors in bfloat16 on a CPU, relative to the norm of the exact values, with random weights:
features of L1 0.003 to 0.006, of V2-S0 0.004 to 0.016; box outputs of RetinaNet 0.005 to 0.013,
of RTMDet 0.007 to 0.011. Rounding the weights alone makes errors of 0.002 to 0.006 (L1) and 0.002
to 0.011 (V2-S0). Norms, residual sums, or attention's scores and softmax in float32 do not lower
the errors, so they stay as autocast has them. Coordinates do not: bfloat16 has multiples of 4 px
only beyond 512 px. mmdet's pooling casts regions to the type of the features, and heads add
offsets to coordinates in the type of the offsets, so both are float32.
"""
import logging
import platform
from functools import partial
from typing import Any, Callable, List

import torch
from mmengine.logging import print_log
from mmengine.model import BaseDataPreprocessor
from torch import Tensor, nn
from torch.utils._pytree import tree_map

DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}
# Autocast casts their weights at each call. Subclasses may compute with weights otherwise.
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def half_precision(model: nn.Module, dtype: str = 'bf16') -> nn.Module:
    """Let a detector, a segmentor or a backbone compute in half precision, in place.

    Backbone, neck and heads each run under autocast and return float32. Everything between and
    after them is computed in float32: coordinates of regions and what is pooled from them,
    scores, the decoding of boxes, nms, the pasting of masks, the resizing of logits. Weights of
    convolutions and linear layers are stored in half precision, with the same results as under
    autocast, which casts them at each call. Fuse the model before, so that the fused weights are
    rounded once. A second call changes nothing.

    Args:
        model: A model with its weights, on its device.
        dtype: 'bf16', or 'fp16' on a GPU.

    Returns:
        The model in eval mode, for inference only.

    Raises:
        ValueError: ``dtype`` is another one, or fp16 and the model is on a CPU.
    """
    on_cpu = next(model.parameters(), torch.empty(0)).device.type == 'cpu'
    if dtype not in DTYPES or on_cpu and dtype == 'fp16':
        raise ValueError(f'dtype {dtype!r}: expected bf16, or fp16 for a model on a GPU')
    if on_cpu and not has_bf16():
        print_log('this CPU has no bfloat16 instructions: bf16 is slower here than fp32',
                  logger='current', level=logging.WARNING)
    for part in find_parts(model.eval()):
        if isinstance(part.forward, partial):
            continue
        part.forward = partial(compute_in, DTYPES[dtype], part, part.forward)
        for layer in part.modules():
            if type(layer) in LAYERS and layer.weight.dtype != DTYPES[dtype]:
                layer.to(DTYPES[dtype])
        if hasattr(part, 'predict_by_feat'):
            widen_outputs(part)
    return model


def find_parts(model: nn.Module) -> List[nn.Module]:
    """Return the modules of a model that compute tensors from tensors.

    These are its heads and its children that contain none, or itself if it has no backbone.
    """
    parts = [model]
    if hasattr(model, 'backbone'):
        parts = [module for module in model.modules() if hasattr(module, 'predict_by_feat')]
        heads = {*parts}
        parts += [child for child in model.children() if not heads & {*child.modules()}
                  and not isinstance(child, BaseDataPreprocessor)]
    return [part for part in parts if [*part.parameters()]]


def widen_outputs(head: nn.Module) -> None:
    """Let the layers of a head return float32, except those followed by a norm or an activation.

    Heads add coordinates to what the layers return, or exponentiate it. Some models also call
    the layers themselves, outside of autocast.
    """
    from mmcv.cnn import ConvModule  # slow to import
    hidden = {module.conv for module in head.modules() if isinstance(module, ConvModule)}
    for layer in head.modules():
        if isinstance(layer, LAYERS):
            layer.register_forward_pre_hook(cast_inputs)
            if layer not in hidden:
                layer.register_forward_hook(cast_output)


def compute_in(dtype: torch.dtype, part: nn.Module, forward: Callable, *args: Any,
               **kwargs: Any) -> Any:
    """Return what ``forward`` of ``part`` returns under autocast, in float32."""
    with torch.autocast(next(part.parameters()).device.type, dtype):
        return tree_map(to_float32, forward(*args, **kwargs))


def to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def cast_inputs(layer: nn.Module, inputs: Any) -> Any:
    return tuple(x.to(layer.weight.dtype) for x in inputs)


def cast_output(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.float()


def has_bf16() -> bool:
    """Return whether this CPU has instructions for bfloat16, so far as torch uses them."""
    is_supported = getattr(torch.cpu, '_is_avx512_bf16_supported', None)  # not in torch 2.1
    if is_supported and platform.machine().lower() in ('x86_64', 'amd64'):
        return is_supported()
    # On x86, this is about AVX-512 alone.
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
