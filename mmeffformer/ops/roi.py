"""RoIAlign by average.

Difference from mmcv's compiled operator: RoIs of negative size are accepted on the CPU too, with
the result of the compiled CUDA operator.
"""
import torch
from torch import Tensor

from .common import missing_operator, widen

_tv = torch.ops.torchvision


def _clip_sizes(rois: Tensor, sampling_ratio: int) -> Tensor:
    """Make negative sizes 0 where the size sets the number of samples.

    torchvision's CPU kernel cannot allocate a negative number of samples.
    """
    if sampling_ratio > 0:
        return rois
    return torch.cat([rois[:, :3], torch.maximum(rois[:, 3:], rois[:, 1:3])], 1)


def roi_align_forward(input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor,
                      argmax_x: Tensor, aligned_height: int, aligned_width: int,
                      spatial_scale: float, sampling_ratio: int, pool_mode: int,
                      aligned: bool) -> None:
    """Write the mean of bilinear samples of each bin into ``output``.

    Args:
        input: (N, C, H, W).
        rois: (R, 5), image index and x1, y1, x2, y2 in px of the original image.
        output: (R, C, h, w) for the result.
        argmax_y, argmax_x: Scratch of the compiled operator, not used.
        aligned_height: h.
        aligned_width: w.
        spatial_scale: Feature pixels per image pixel.
        sampling_ratio: Samples per bin and axis; 0: one per feature pixel, rounded up.
        pool_mode: 1, the average.
        aligned: Pixel centres are at 0.5 rather than 0.

    Raises:
        NotImplementedError: ``pool_mode`` is 0, the maximum.
    """
    if pool_mode != 1:
        raise missing_operator("roi_align_forward with pool_mode='max'")
    features, rois = widen(input, rois)
    output.copy_(_tv.roi_align(features, _clip_sizes(rois, sampling_ratio), spatial_scale,
                               aligned_height, aligned_width, sampling_ratio, aligned))


def roi_align_backward(grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor,
                       grad_input: Tensor, aligned_height: int, aligned_width: int,
                       spatial_scale: float, sampling_ratio: int, pool_mode: int,
                       aligned: bool) -> None:
    """Write the gradient of :func:`roi_align_forward` into ``grad_input`` (N, C, H, W)."""
    grad, rois = widen(grad_output, rois)
    grad_input.copy_(_tv._roi_align_backward(
        grad, _clip_sizes(rois, sampling_ratio), spatial_scale, aligned_height, aligned_width,
        *grad_input.shape, sampling_ratio, aligned))
