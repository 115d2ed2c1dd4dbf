"""RoIAlign by average.

A bin of RoIAlign is a weighted sum of pixels. On CPUs ``embedding_bag`` computes such sums of rows
of channels with all threads, in a fraction of the time of torchvision's operator, with smaller
errors against float64. A bin's weights are products of weights along y and along x.

Difference from mmcv's compiled operator: RoIs of negative size are accepted on the CPU too, with
the result of the compiled CUDA operator.

Shapes: N images, R RoIs, P bins along an axis, K pixels of a bin along an axis.
"""
from typing import Iterator, NamedTuple, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import common
from .common import missing_operator, widen

_tv = torch.ops.torchvision

MIN_CHANNELS = 8  # torchvision's operator is faster for maps of fewer channels
MAX_PIXELS = 2 ** 22  # of the bins that are computed together, about 40 bytes each


class _Bins(NamedTuple):
    """The pixels of the bins of some RoIs, bin after bin."""

    rois: slice
    bins: Tensor  # of each pixel, int32
    pixels: Tensor  # index of each among the pixels of all images, int32
    weights: Tensor  # of each pixel
    starts: Tensor  # index of each bin's first pixel, int32


class _Axis(NamedTuple):
    """The pixels of bins along one axis."""

    counts: Tensor  # (R, P), int32
    pixels: Tensor  # ascending (R, P, K), int32
    weights: Tensor  # of the pixels (R, P, K), float64


def roi_align_forward(input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor,
                      argmax_x: Tensor, aligned_height: int, aligned_width: int,
                      spatial_scale: float, sampling_ratio: int, pool_mode: int,
                      aligned: bool) -> None:
    """Write the mean of bilinear samples of each bin into ``output``.

    Args:
        input: (N, C, H, W), fastest in channels_last.
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
    size = aligned_height, aligned_width
    if not _by_weighted_sums(features):
        output.copy_(_tv.roi_align(features, _clip_sizes(rois, sampling_ratio), spatial_scale,
                                   *size, sampling_ratio, aligned))
        return
    rows = features.permute(0, 2, 3, 1).flatten(0, 2)
    for part in _bins(rois, input.shape, size, spatial_scale, sampling_ratio, aligned):
        sums = _weighted_sums(part.pixels, rows, part.starts, part.weights)
        output[part.rois] = sums.view(-1, *size, rows.shape[1]).permute(0, 3, 1, 2)


def roi_align_backward(grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor,
                       grad_input: Tensor, aligned_height: int, aligned_width: int,
                       spatial_scale: float, sampling_ratio: int, pool_mode: int,
                       aligned: bool) -> None:
    """Write the gradient of :func:`roi_align_forward` into ``grad_input`` (N, C, H, W)."""
    grad, rois = widen(grad_output, rois)
    size = aligned_height, aligned_width
    if not _by_weighted_sums(grad):
        grad_input.copy_(_tv._roi_align_backward(
            grad, _clip_sizes(rois, sampling_ratio), spatial_scale, *size, *grad_input.shape,
            sampling_ratio, aligned))
        return
    images, channels, height, width = grad_input.shape
    total = grad.new_zeros(images * height * width, channels)
    # A pixel's gradient is the weighted sum of the gradients of the bins that it is in.
    for part in _bins(rois, grad_input.shape, size, spatial_scale, sampling_ratio, aligned):
        rows = grad[part.rois].permute(0, 2, 3, 1).reshape(-1, channels)
        order, counts = part.pixels.argsort(), part.pixels.bincount(minlength=len(total))
        total += _weighted_sums(part.bins[order], rows, (counts.cumsum(0) - counts).int(),
                                part.weights[order])
    grad_input.copy_(total.view(images, height, width, channels).permute(0, 3, 1, 2))


def _by_weighted_sums(features: Tensor) -> bool:
    """Return whether the sums are the better way: on a GPU where results must be reproducible.

    torchvision's CUDA kernel adds up gradients in any order.
    """
    if features.device.type == 'cuda':
        return torch.are_deterministic_algorithms_enabled()
    return common.FASTER and features.shape[1] >= MIN_CHANNELS


def _weighted_sums(indices: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sums of rows of all bins (bins, C)."""
    return F.embedding_bag(indices, rows, starts, mode='sum', per_sample_weights=weights)


def _clip_sizes(rois: Tensor, sampling_ratio: int) -> Tensor:
    """Make negative sizes 0 where the size sets the number of samples.

    torchvision's CPU kernel cannot allocate a negative number of samples.
    """
    if sampling_ratio > 0:
        return rois
    return torch.cat([rois[:, :3], torch.maximum(rois[:, 3:], rois[:, 1:3])], 1)


def _bins(rois: Tensor, shape: torch.Size, size: Tuple[int, int], scale: float, ratio: int,
          aligned: bool) -> Iterator[_Bins]:
    """Yield the bins of all RoIs, some RoIs at a time.

    Args:
        rois, scale, ratio, aligned: As in :func:`roi_align_forward`.
        shape: (N, C, H, W) of the map.
        size: Bins along y and along x.
    """
    if not len(rois):
        return
    start, end = (rois[:, i:i + 2] * scale - (.5 if aligned else 0) for i in (1, 3))
    extent = end - start if aligned else (end - start).clamp(min=1)
    y, x = (_axis(start[:, i], extent[:, i], size[1 - i], shape[3 - i], ratio) for i in (1, 0))
    counts = y.counts[:, :, None] * x.counts[:, None]
    chunks = counts.flatten(1).sum(1).cumsum(0) // MAX_PIXELS
    end_of_part, device = 0, rois.device
    for length in chunks.unique_consecutive(return_counts=True)[1].tolist():
        part = slice(end_of_part, end_of_part + length)
        end_of_part = part.stop
        number = counts[part].flatten()
        starts = number.cumsum(0, dtype=torch.int32) - number
        bins = torch.repeat_interleave(number)
        position = torch.arange(len(bins), dtype=torch.int32, device=device)
        position -= starts.index_select(0, bins)
        columns = x.counts[part, None].expand_as(counts[part]).flatten().index_select(0, bins)
        row = position // columns
        ys, by_row = _of_pixels(y, part, 2, counts[part], bins, row)
        xs, by_column = _of_pixels(x, part, 1, counts[part], bins, position - row * columns)
        image = rois[part, 0].int().repeat_interleave(size[0] * size[1]).index_select(0, bins)
        yield _Bins(part, bins, (image * shape[2] + ys) * shape[3] + xs,
                    (by_row * by_column).to(rois.dtype), starts)


def _of_pixels(axis: _Axis, part: slice, other: int, counts: Tensor, bins: Tensor,
               index: Tensor) -> Tuple[Tensor, Tensor]:
    """Return position and weight along one axis of each pixel of some RoIs' bins.

    Args:
        other: Dimension of the other axis in ``counts``.
        counts: Pixels of each bin (R, h, w).
        bins, index: Bin of each pixel, and its index among the bin's on the axis.
    """
    shape = axis.pixels[part].shape
    first = torch.arange(0, shape.numel(), shape[2], dtype=torch.int32, device=counts.device)
    start = first.view(shape[:2])
    start = start.unsqueeze(other).expand_as(counts).flatten().index_select(0, bins) + index
    return (axis.pixels[part].flatten().index_select(0, start),
            axis.weights[part].flatten().index_select(0, start))


def _axis(start: Tensor, size: Tensor, bins: int, length: int, ratio: int) -> _Axis:
    """Return the bins of RoIs on an axis of ``length`` pixels.

    A sample beyond the map has the value of the border up to a pixel away, and 0 farther away.

    Args:
        start, size: In px of the map (R,).
        ratio: Samples per bin; 0: one per pixel, rounded up.
    """
    samples = torch.full_like(size, ratio) if ratio > 0 else (size / bins).ceil().clamp(min=0)
    start, samples = start.double()[:, None], samples.double()[:, None]
    step = size.double()[:, None] / bins / samples.clamp(min=1)
    device = start.device
    # Samples before the middle of a bin's first one
    before = torch.arange(bins, device=device) * samples + .5
    # Samples before the map are skipped, so that its size bounds the memory.
    skipped = torch.where(step > 0, (-1 - start) / step - before - 1, 0).ceil().clamp(min=0)
    most = int(samples.nan_to_num().clamp(1, 2 * length + 6).max())
    number = skipped[..., None] + torch.arange(most, device=device)
    at = start[..., None] + (before[..., None] + number) * step[..., None]
    if ratio > 0:
        at = at.sort(2).values  # a negative size reverses them
    share = ((number < samples[..., None]) & (at >= -1) & (at <= length)
             ) / samples.clamp(min=1)[..., None]
    at = at.nan_to_num().clamp(0, length - 1)
    low = at.floor()
    # Neighbouring samples share pixels; pixels between distant samples are left out.
    slot = F.pad(low.diff(dim=2).clamp(0, 2).long(), (1, 0)).cumsum(2)
    shape = (*slot.shape[:2], int(slot.max()) + 2)
    pixels = low.new_zeros(shape, dtype=torch.int32)
    pixels.scatter_(2, slot + 1, (low + 1).clamp(max=length - 1).int())
    pixels.scatter_(2, slot, low.int())
    weights = at.new_zeros(shape)
    weights.scatter_add_(2, slot, (1 - at + low) * share)
    weights.scatter_add_(2, slot + 1, (at - low) * share)
    counts = ((weights != 0) * torch.arange(1, shape[2] + 1, device=device)).amax(2)
    return _Axis(counts.int(), pixels, weights)
