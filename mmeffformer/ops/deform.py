"""Deformable convolution and multi-scale deformable attention.

Differences from mmcv's compiled operators: attention also runs on the CPU. Deformable convolution
without modulation costs its backward pass twice if both the input and the weight need gradients:
torchvision computes all gradients in one call, mmcv asks in two.

In deformable convolution both libraries order offsets by group, kernel row, kernel column and
then (y, x). A point exactly one pixel above or left of the image, where the derivative jumps, has
the derivative 0 in mmcv and the one towards the image in torchvision and torch. With a padding of
1 and offsets of 0, as when training starts, all border points are there.
"""
from math import prod
from operator import itemgetter
from typing import Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import widen

_tv = torch.ops.torchvision

# mmcv's names of the sizes, passed by keyword, in the order in which torchvision takes them.
_sizes = itemgetter('dH', 'dW', 'padH', 'padW', 'dilationH', 'dilationW', 'group',
                    'deformable_group')
_modulated_sizes = itemgetter('stride_h', 'stride_w', 'pad_h', 'pad_w', 'dilation_h', 'dilation_w',
                              'group', 'deformable_group')


def _deform_args(input: Tensor, weight: Tensor, offset: Tensor, mask: Optional[Tensor],
                 bias: Optional[Tensor], sizes: Tuple[int, ...]) -> tuple:
    """Return the arguments of torchvision's kernels."""
    use_mask = mask is not None
    if mask is None:
        mask = input.new_zeros(input.size(0), 1)
    if bias is None:
        bias = weight.new_zeros(weight.size(0))
    return (*widen(input, weight, offset, mask, bias), *sizes, use_mask)


def _deform_grads(grad_output: Tensor, args: tuple) -> Tuple[Tensor, ...]:
    """Return the gradients by input, weight, offset, mask and bias."""
    grads = _tv._deform_conv2d_backward(grad_output.to(args[0].dtype), *args)
    grads[2].masked_fill_(_points(*args[1:3], *args[5:11]) == -1, 0)
    return grads


def _points(weight: Tensor, offset: Tensor, *sizes: int) -> Tensor:
    """Return y and x of the points in the input, px, in the shape of ``offset``.

    ``sizes`` are the strides, paddings and dilations, (y, x) each.
    """
    y, x = (torch.arange(kernel, device=offset.device)[:, None] * dilation
            + torch.arange(length, device=offset.device) * stride - padding
            for kernel, length, stride, padding, dilation in zip(
                weight.shape[2:], offset.shape[2:], sizes[:2], sizes[2:4], sizes[4:]))
    grid = torch.stack(torch.broadcast_tensors(y[:, None, :, None], x[:, None]), 2)
    return (offset.unflatten(1, (-1, *grid.shape[:3])) + grid).flatten(1, 4)


def _leading(tensor: Tensor, output: Tensor, channels: int) -> Tensor:
    """Return the first values of each image as (N, channels, H_out, W_out).

    This is how the compiled operator reads offsets and masks of another size. mmdet's DyHead uses
    those of one level for the next level too, which has half its size.

    Raises:
        ValueError: There are too few values.
    """
    shape = (channels, *output.shape[2:])
    if prod(tensor.shape[1:]) < prod(shape):
        raise ValueError(f'offsets or masks of shape {tuple(tensor.shape)} are too small; '
                         f'expected at least {shape} for each image')
    return tensor.flatten(1)[:, :prod(shape)].unflatten(1, shape)


def _write_leading(target: Tensor, grad: Tensor) -> None:
    """Write the gradient by the result of :func:`_leading`; other values have the gradient 0."""
    rest = prod(target.shape[1:]) - prod(grad.shape[1:])
    target.copy_(F.pad(grad.flatten(1), (0, rest)).view(target.shape))


def _modulated_args(input: Tensor, weight: Tensor, bias: Tensor, offset: Tensor, mask: Tensor,
                    output: Tensor, with_bias: bool, sizes: Dict[str, int]) -> tuple:
    points = sizes['deformable_group'] * sizes['kernel_h'] * sizes['kernel_w']
    return _deform_args(input, weight, _leading(offset, output, 2 * points),
                        _leading(mask, output, points), bias if with_bias else None,
                        _modulated_sizes(sizes))


def deform_conv_forward(input: Tensor, weight: Tensor, offset: Tensor, output: Tensor,
                        columns: Tensor, ones: Tensor, **sizes: int) -> None:
    """Write a convolution at shifted points into ``output``.

    Args:
        input: (N, C_in, H, W).
        weight: (C_out, C_in / group, kH, kW).
        offset: (N, deformable_group * kH * kW * 2, H_out, W_out), (y, x) in px.
        output: (N, C_out, H_out, W_out) for the result.
        columns, ones: Scratch of the compiled operator, not used.
        sizes: kW, kH, dW, dH, padW, padH, dilationW, dilationH (kernel, stride, padding and
            dilation in px), group (groups of channels in the convolution), deformable_group
            (groups of channels with separate offsets), im2col_step (not used).
    """
    output.copy_(_tv.deform_conv2d(*_deform_args(input, weight, offset, None, None,
                                                 _sizes(sizes))))


def deform_conv_backward_input(input: Tensor, offset: Tensor, gradOutput: Tensor,
                               gradInput: Tensor, gradOffset: Tensor, weight: Tensor,
                               columns: Tensor, **sizes: int) -> None:
    """Write the gradients of :func:`deform_conv_forward` by ``input`` and ``offset``."""
    grads = _deform_grads(gradOutput, _deform_args(input, weight, offset, None, None,
                                                   _sizes(sizes)))
    gradInput.copy_(grads[0])
    gradOffset.copy_(grads[2])


def deform_conv_backward_parameters(input: Tensor, offset: Tensor, gradOutput: Tensor,
                                    gradWeight: Tensor, columns: Tensor, ones: Tensor,
                                    scale: float, **sizes: int) -> None:
    """Write the gradient of :func:`deform_conv_forward` by ``weight``, times ``scale``."""
    grads = _deform_grads(gradOutput, _deform_args(input, gradWeight, offset, None, None,
                                                   _sizes(sizes)))
    gradWeight.copy_(scale * grads[1])


def modulated_deform_conv_forward(input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor,
                                  offset: Tensor, mask: Tensor, output: Tensor, columns: Tensor,
                                  with_bias: bool, **sizes: int) -> None:
    """Write a convolution at shifted and weighted points into ``output``.

    Args:
        input, weight, output: As in :func:`deform_conv_forward`.
        offset, mask: (N, 2 * points, H_out, W_out) and the weights of the points, (N, points,
            H_out, W_out), with deformable_group * kernel_h * kernel_w points; larger ones too
            (:func:`_leading`).
        bias: (C_out,), ignored unless ``with_bias``.
        ones, columns: Scratch of the compiled operator, not used.
        with_bias: Add ``bias``.
        sizes: kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
            group and deformable_group, as in :func:`deform_conv_forward`.
    """
    output.copy_(_tv.deform_conv2d(*_modulated_args(input, weight, bias, offset, mask, output,
                                                    with_bias, sizes)))


def modulated_deform_conv_backward(input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor,
                                   offset: Tensor, mask: Tensor, columns: Tensor,
                                   grad_input: Tensor, grad_weight: Tensor, grad_bias: Tensor,
                                   grad_offset: Tensor, grad_mask: Tensor, grad_output: Tensor,
                                   with_bias: bool, **sizes: int) -> None:
    """Write all gradients of :func:`modulated_deform_conv_forward`."""
    grads = _deform_grads(grad_output, _modulated_args(input, weight, bias, offset, mask,
                                                       grad_output, with_bias, sizes))
    for target, grad in zip((grad_input, grad_weight, grad_offset, grad_mask), grads):
        _write_leading(target, grad)
    if with_bias:
        grad_bias.copy_(grads[4])


def _attend(value: Tensor, spatial_shapes: Tensor, sampling_locations: Tensor,
            attention_weights: Tensor) -> Tensor:
    # mmcv has the operator in plain torch. While this module is imported mmcv.ops is incomplete.
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch
    return multi_scale_deformable_attn_pytorch(value, spatial_shapes.tolist(), sampling_locations,
                                               attention_weights)


def ms_deform_attn_forward(value: Tensor, value_spatial_shapes: Tensor,
                           value_level_start_index: Tensor, sampling_locations: Tensor,
                           attention_weights: Tensor, im2col_step: int) -> Tensor:
    """Return weighted sums of bilinear samples, (N, queries, heads * channels).

    Args:
        value: (N, sum of H * W, heads, channels).
        value_spatial_shapes: H and W of each level, (levels, 2).
        value_level_start_index: Not used, follows from the shapes.
        sampling_locations: (N, queries, heads, levels, points, 2), (x, y) in [0, 1].
        attention_weights: (N, queries, heads, levels, points).
        im2col_step: Images per step of the compiled operator, not used.
    """
    inputs = widen(value, sampling_locations, attention_weights)
    return _attend(inputs[0], value_spatial_shapes, *inputs[1:]).to(value.dtype)


def ms_deform_attn_backward(value: Tensor, value_spatial_shapes: Tensor,
                            value_level_start_index: Tensor, sampling_locations: Tensor,
                            attention_weights: Tensor, grad_output: Tensor, grad_value: Tensor,
                            grad_sampling_loc: Tensor, grad_attn_weight: Tensor,
                            im2col_step: int) -> None:
    """Write the gradients of :func:`ms_deform_attn_forward` by values, locations and weights."""
    inputs = [t.detach().requires_grad_()
              for t in widen(value, sampling_locations, attention_weights)]
    with torch.enable_grad():
        output = _attend(inputs[0], value_spatial_shapes, *inputs[1:])
    grads = torch.autograd.grad(output, inputs, grad_output.to(output.dtype))
    sizes = value_spatial_shapes.flip(1)[:, None]  # width and height
    grads[1].masked_fill_(inputs[1] * sizes - .5 == -1, 0)
    for target, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads):
        target.copy_(grad)
