"""The module ``mmcv._ext`` written with torchvision, for an mmcv without compiled operators.

Names, arguments and order are those with which mmcv's Python wrappers call the extension: results
go into the tensors handed over, which the wrappers have filled with zeros. Operators that are not
here raise :class:`NotImplementedError` when called. All run on the CPU and on CUDA, and compute
half precision in float32.

Differences from mmcv's compiled operators:

* RoIPool, the focal losses and deformable attention also run on the CPU. RoIAlign accepts RoIs of
  negative size there, with the result of the compiled CUDA operator.
* A bin of RoIAlign (max) without a sample is 0 rather than the lowest number, and a malformed RoI
  in RoIPool has no gradient, where the compiled operator gives its gradient to the first pixel.
* Boxes of zero area count as not overlapping in Gaussian soft-NMS (compiled: NaN). Boxes of equal
  score may come out in another order.
* A target outside the classes has weight 1 in the sigmoid focal loss, and a negative one loss 0
  in the softmax focal loss, where the compiled operators read outside the weights.
* A point sampled exactly one pixel above or left of the image, where the derivative jumps, has
  the derivative towards the image in deformable convolution and attention (compiled: 0).
* Deformable convolution without modulation costs its backward pass twice if both the input and the
  weight need gradients: torchvision computes all gradients in one call, mmcv asks in two.

As with the compiled operators, summation order on CUDA varies, so gradients there are not
bitwise reproducible.
"""
import numpy as np
import torch
import torchvision

_tv = torch.ops.torchvision
_TINY = torch.finfo(torch.float32).tiny


def __getattr__(name):
    # mmcv asks with hasattr for every operator at import, and only a call must fail. Names with
    # underscores are Python's own questions about a module.
    if name.startswith('_'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def missing(*args, **kwargs):
        raise NotImplementedError(
            f'The operator {name!r} needs mmcv with compiled operators; torchvision stands in for '
            'the common ones only. With torch and a C++ compiler installed (and nvcc for CUDA; '
            'FORCE_CUDA=1 compiles for it where no GPU is visible), build the maintained fork '
            'with `pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation '
            '--no-binary onedl-mmcv onedl-mmcv`, or the original with `pip uninstall mmcv-lite` '
            'and `MMCV_WITH_OPS=1 pip install --no-cache-dir --no-build-isolation --no-binary '
            'mmcv "mmcv<2.2"` (setuptools before 81).')

    missing.__name__ = missing.__qualname__ = name
    return missing


def get_compiler_version():
    """Say that no compiler was used (str)."""
    return f'none (operators from torchvision {torchvision.__version__})'


def get_compiling_cuda_version():
    """Say that no CUDA compiler was used (str)."""
    return 'not available'


def _wide(*tensors):
    """Cast half precision (and integers) to float32; float64 anywhere makes all float64."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


# Non-maximum suppression ----------------------------------------------------------------------


def nms(boxes, scores, iou_threshold, offset):
    """Indices (K,) of the boxes kept, by falling score.

    Args:
        boxes (Tensor): (N, 4), x1, y1, x2, y2 in pixels.
        scores (Tensor): (N,).
        iou_threshold (float): A box that overlaps a better one by more is dropped.
        offset (int): 1 if the last pixel belongs to a box (width = x2 - x1 + 1), else 0.
    """
    boxes, scores = _wide(boxes, scores)
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    # The compiled operator compares in float32: an overlap of exactly 0.6 is not above 0.6.
    return torchvision.ops.nms(boxes, scores, float(np.float32(iou_threshold)))


def softnms(boxes, scores, dets, iou_threshold, sigma, min_score, method, offset):
    """Indices (K,) of the boxes kept, best first; their boxes and new scores go to ``dets[:K]``.

    Args:
        boxes (Tensor): (N, 4) on the CPU.
        scores (Tensor): (N,) on the CPU.
        dets (Tensor): (N, 5) for the result.
        iou_threshold (float): Overlap from which methods 0 and 1 lower a score.
        sigma (float): Width of the Gaussian, method 2.
        min_score (float): Boxes that fall below are dropped.
        method (int): 0 removes, 1 multiplies by (1 - overlap), 2 by exp(-overlap² / sigma).
        offset (int): As in :func:`nms`.
    """
    # One step per box kept, each on a short array: numpy's small overhead per call counts.
    boxes, scores = (t.detach().numpy() for t in _wide(boxes, scores))
    top_left, bottom_right = boxes[:, :2], boxes[:, 2:] + offset
    area = (bottom_right - top_left).prod(1)
    scores, left, keep = scores.copy(), np.arange(len(boxes)), []
    while len(left):
        at = scores[left].argmax()
        best = left[at]
        keep.append(best)
        left = np.delete(left, at)
        side = np.minimum(bottom_right[best], bottom_right[left]) - np.maximum(
            top_left[best], top_left[left])
        shared = side.clip(0).prod(1)
        union = area[best] + area[left] - shared
        overlap = np.divide(shared, union, out=np.zeros_like(shared), where=union != 0)
        if method == 2:
            factor = np.exp(-overlap**2 / sigma)
        else:
            factor = np.where(overlap >= iou_threshold, 1 - overlap if method == 1 else 0, 1)
        scores[left] *= factor
        left = left[scores[left] >= min_score]
    keep = torch.tensor(np.array(keep, dtype=np.int64))
    dets[:len(keep), :4] = torch.from_numpy(boxes)[keep]
    dets[:len(keep), 4] = torch.from_numpy(scores)[keep]
    return keep


# RoIAlign -------------------------------------------------------------------------------------


def _sample_grids(rois, height, width, scale, sampling_ratio, aligned):
    """Yield (RoIs, rows, columns): which RoIs take that many samples per bin."""
    if sampling_ratio > 0:
        yield slice(None), sampling_ratio, sampling_ratio
        return
    # The offset cancels, except for the rounding, which must be the one of the average.
    corners = rois[:, 1:] * scale - (0.5 if aligned else 0)
    size = corners[:, 2:] - corners[:, :2]
    if not aligned:
        size = size.clamp(min=1)
    grid = (size / size.new_tensor([width, height])).ceil()
    for columns, rows in grid.unique(dim=0).tolist():
        if rows > 0 and columns > 0:
            yield (grid == grid.new_tensor([columns, rows])).all(1), int(rows), int(columns)


def _roi_align_rois(rois, sampling_ratio):
    # torchvision's CPU kernel cannot allot a negative number of samples; none is what it means.
    if sampling_ratio > 0:
        return rois
    return torch.cat([rois[:, :3], torch.maximum(rois[:, 3:], rois[:, 1:3])], 1)


def roi_align_forward(input, rois, output, argmax_y, argmax_x, aligned_height, aligned_width,
                      spatial_scale, sampling_ratio, pool_mode, aligned):
    """Pool bilinear samples of each RoI into ``output`` (R, C, aligned_height, aligned_width).

    Args:
        input (Tensor): (N, C, H, W).
        rois (Tensor): (R, 5), image index and x1, y1, x2, y2 in pixels of the original image.
        output (Tensor): (R, C, h, w) for the result.
        argmax_y (Tensor): Like ``output`` with ``pool_mode`` 0: row, within its bin's grid, of
            the greatest sample. (The compiled operator keeps coordinates; only the backward
            pass reads them.)
        argmax_x (Tensor): The same for the column.
        aligned_height (int): h.
        aligned_width (int): w.
        spatial_scale (float): Feature pixels per image pixel.
        sampling_ratio (int): Samples per bin and axis; 0: one per feature pixel, rounded up.
        pool_mode (int): 0 maximum, 1 average.
        aligned (bool): Pixel centres at 0.5 rather than 0.
    """
    features, rois = _wide(input, rois)
    if pool_mode == 1:
        output.copy_(_tv.roi_align(features, _roi_align_rois(rois, sampling_ratio), spatial_scale,
                                   aligned_height, aligned_width, sampling_ratio, aligned))
        return
    # Each sample on its own as a bin of a finer grid, then the maximum over the samples of a bin.
    for chosen, rows, columns in _sample_grids(rois, aligned_height, aligned_width, spatial_scale,
                                               sampling_ratio, aligned):
        samples = _tv.roi_align(features, rois[chosen], spatial_scale, aligned_height * rows,
                                aligned_width * columns, 1, aligned)
        samples = samples.unflatten(3, (aligned_width, columns)).unflatten(
            2, (aligned_height, rows)).transpose(3, 4).flatten(4)
        best, position = samples.max(-1)
        output[chosen] = best.to(output.dtype)
        argmax_y[chosen] = position.div(columns, rounding_mode='floor').to(argmax_y.dtype)
        argmax_x[chosen] = (position % columns).to(argmax_x.dtype)


def roi_align_backward(grad_output, rois, argmax_y, argmax_x, grad_input, aligned_height,
                       aligned_width, spatial_scale, sampling_ratio, pool_mode, aligned):
    """Gradient of :func:`roi_align_forward` into ``grad_input`` (N, C, H, W)."""
    grad, rois = _wide(grad_output, rois)
    if pool_mode == 1:
        grad_input.copy_(_tv._roi_align_backward(
            grad, _roi_align_rois(rois, sampling_ratio), spatial_scale, aligned_height,
            aligned_width, *grad_input.shape, sampling_ratio, aligned))
        return
    for chosen, rows, columns in _sample_grids(rois, aligned_height, aligned_width, spatial_scale,
                                               sampling_ratio, aligned):
        position = argmax_y[chosen].long() * columns + argmax_x[chosen].long()
        part = grad[chosen].unsqueeze(-1)
        samples = part.new_zeros(*position.shape, rows * columns)
        samples.scatter_(-1, position.unsqueeze(-1), part)
        samples = samples.unflatten(-1, (rows, columns)).transpose(3, 4).flatten(4).flatten(2, 3)
        grad_input += _tv._roi_align_backward(
            samples, rois[chosen], spatial_scale, aligned_height * rows, aligned_width * columns,
            *grad_input.shape, 1, aligned).to(grad_input.dtype)


# RoIPool --------------------------------------------------------------------------------------


def _bins(start, size, number, limit):
    """First pixel and end (both (R, number)) of each RoI's bins along one axis of ``limit``."""
    step = size[:, None] / number
    index = torch.arange(number + 1, device=start.device)
    low = (index[:-1] * step + start[:, None]).floor()
    high = (index[1:] * step + start[:, None]).ceil()
    return low.clamp(0, limit).long(), high.clamp(0, limit).long()


def _members(low, high, limit):
    """Pixels of each bin, (bins, longest); short bins repeat their last, harmless to a maximum."""
    reach = torch.arange(max(int((high - low).max()), 1), device=low.device)
    pixels = torch.minimum(low[:, None] + reach, high[:, None] - 1)
    return pixels.clamp(0, limit - 1)


def roi_pool_forward(input, rois, output, argmax, pooled_height, pooled_width, spatial_scale):
    """Maximum of the whole pixels of each bin into ``output`` (R, C, h, w).

    As in mmcv, and unlike in torchvision, the last pixel belongs to a RoI, corners are scaled
    without rounding and only the bins' borders are rounded (outwards). Empty bins and malformed
    RoIs give 0.

    Args:
        input (Tensor): (N, C, H, W).
        rois (Tensor): (R, 5), image index and x1, y1, x2, y2 in pixels of the original image.
        output (Tensor): (R, C, h, w) for the result.
        argmax (Tensor): Like ``output``, int32: y * W + x of the maximum, -1 if there is none.
        pooled_height (int): h.
        pooled_width (int): w.
        spatial_scale (float): Feature pixels per image pixel.
    """
    height, width = input.shape[2:]
    features, rois = _wide(input, rois)
    start = rois[:, 1:3] * spatial_scale
    size = (rois[:, 3:] + 1) * spatial_scale - start
    left, right = _bins(start[:, 0], size[:, 0], pooled_width, width)
    top, bottom = _bins(start[:, 1], size[:, 1], pooled_height, height)
    argmax.fill_(-1)
    across = torch.arange(pooled_width, device=rois.device)
    down = torch.arange(pooled_height, device=rois.device)[:, None]
    for i in (size > 0).all(1).nonzero().flatten().tolist():
        columns = _members(left[i], right[i], width)
        rows = _members(top[i], bottom[i], height)
        # Along the row first, so that of equal pixels the first in reading order is chosen.
        best, x = features[int(rois[i, 0])][:, :, columns].max(-1)
        x = columns[across, x]
        best, y = best[:, rows].max(2)
        y = rows[down, y]
        empty = (bottom[i] <= top[i])[:, None] | (right[i] <= left[i])
        output[i] = best.masked_fill(empty, 0)
        argmax[i] = (y * width + x.gather(1, y)).masked_fill(empty, -1)


def roi_pool_backward(grad_output, rois, argmax, grad_input, pooled_height, pooled_width,
                      spatial_scale):
    """Gradient of :func:`roi_pool_forward` into ``grad_input`` (N, C, H, W)."""
    _, channels, height, width = grad_input.shape
    plane = rois[:, :1].long() * channels + torch.arange(channels, device=rois.device)
    pixel = plane[..., None, None] * (height * width) + argmax
    hit = argmax >= 0
    grad_input.view(-1).index_add_(0, pixel[hit], grad_output[hit])


# Focal losses ---------------------------------------------------------------------------------


def _sigmoid_focal(input, target, weight, alpha):
    """Probabilities, where they are wanted high, and the factor of each loss, all (N, C)."""
    p = _wide(input)[0].sigmoid()
    classes = input.size(1)
    positive = target[:, None] == torch.arange(classes, device=target.device)
    factor = torch.where(positive, p.new_tensor(alpha), p.new_tensor(1 - alpha))
    if weight.numel():
        known = (target >= 0) & (target < classes)
        of_target = weight.to(p.dtype)[target.clamp(0, classes - 1)]
        factor = factor * of_target.where(known, torch.ones_like(of_target))[:, None]
    return p, positive, factor


def sigmoid_focal_loss_forward(input, target, weight, output, gamma, alpha):
    """Focal loss of every logit into ``output`` (N, C).

    Args:
        input (Tensor): Logits (N, C).
        target (Tensor): Classes (N,), int64; C is the background.
        weight (Tensor): Factor of each sample by its target class, (C,), or empty for 1.
        output (Tensor): (N, C) for the result.
        gamma (float): Exponent that quiets easy samples.
        alpha (float): Factor of positives; negatives have 1 - alpha.
    """
    p, positive, factor = _sigmoid_focal(input, target, weight, alpha)
    right = torch.where(positive, p, 1 - p)
    output.copy_(-factor * (1 - right)**gamma * right.clamp(min=_TINY).log())


def sigmoid_focal_loss_backward(input, target, weight, grad_input, gamma, alpha):
    """Derivative of :func:`sigmoid_focal_loss_forward` by each logit into ``grad_input``."""
    p, positive, factor = _sigmoid_focal(input, target, weight, alpha)
    right = torch.where(positive, p, 1 - p)
    slope = (1 - right)**gamma * (gamma * right * right.clamp(min=_TINY).log() - (1 - right))
    grad_input.copy_(factor * torch.where(positive, slope, -slope))


def _softmax_focal(softmax, target, weight, alpha):
    """Probability of the target and the factor of its loss, both (N,); factor 0 if negative."""
    safe = target.clamp(min=0)
    softmax, = _wide(softmax)
    p = softmax.gather(1, safe[:, None])[:, 0]
    factor = weight.to(p.dtype)[safe] * alpha if weight.numel() else torch.full_like(p, alpha)
    return p, factor.masked_fill(target < 0, 0)


def softmax_focal_loss_forward(softmax, target, weight, output, gamma, alpha):
    """Focal loss of every sample into ``output`` (N,).

    Args:
        softmax (Tensor): Probabilities (N, C).
        target (Tensor): Classes (N,), int64; samples with a negative one have loss 0.
        weight (Tensor): Factor of each class, (C,), or empty for 1.
        output (Tensor): (N,) for the result.
        gamma (float): Exponent that quiets easy samples.
        alpha (float): Factor of all losses.
    """
    p, factor = _softmax_focal(softmax, target, weight, alpha)
    output.copy_(-factor * (1 - p)**gamma * p.clamp(min=_TINY).log())


def softmax_focal_loss_backward(softmax, target, weight, buff, grad_input, gamma, alpha):
    """Derivative of :func:`softmax_focal_loss_forward` by each logit into ``grad_input`` (N, C).

    ``buff`` (N,) receives the derivative by the logarithm of the target's probability.
    """
    p, factor = _softmax_focal(softmax, target, weight, alpha)
    wrong = (1 - p).clamp(min=_TINY)  # where p is 1 a gamma below 1 would make infinity times 0
    by_log = gamma * wrong**(gamma - 1) * p * p.clamp(min=_TINY).log() - (1 - p)**gamma
    buff.copy_(factor * by_log)
    softmax, = _wide(softmax)
    is_target = target[:, None] == torch.arange(softmax.size(1), device=target.device)
    grad_input.copy_((factor * by_log)[:, None] * (is_target.to(p.dtype) - softmax))


# Deformable convolution -----------------------------------------------------------------------
# Both libraries order offsets by group, kernel row, kernel column and then (y, x).


def _deform_args(input, weight, offset, mask, bias, geometry):
    """Arguments of torchvision's kernels; ``mask`` or ``bias`` None where there is none."""
    use_mask = mask is not None
    if not use_mask:
        mask = input.new_zeros(input.size(0), 1)
    if bias is None:
        bias = weight.new_zeros(weight.size(0))
    return (*_wide(input, weight, offset, mask, bias), *geometry, use_mask)


def deform_conv_forward(input, weight, offset, output, columns, ones, kW, kH, dW, dH, padW, padH,
                        dilationW, dilationH, group, deformable_group, im2col_step):
    """Convolution at shifted points into ``output`` (N, C_out, H_out, W_out).

    Args:
        input (Tensor): (N, C_in, H, W).
        weight (Tensor): (C_out, C_in / group, kH, kW).
        offset (Tensor): (N, deformable_group * kH * kW * 2, H_out, W_out), (y, x) in pixels.
        output (Tensor): For the result.
        columns, ones (Tensor): Scratch of the compiled operator, not used.
        kW, kH, dW, dH, padW, padH, dilationW, dilationH (int): Kernel, stride, padding and
            dilation in pixels.
        group (int): Groups of channels in the convolution.
        deformable_group (int): Groups of channels with offsets of their own.
        im2col_step (int): Images at a time in the compiled operator, not used.
    """
    geometry = dH, dW, padH, padW, dilationH, dilationW, group, deformable_group
    output.copy_(_tv.deform_conv2d(*_deform_args(input, weight, offset, None, None, geometry)))


def deform_conv_backward_input(input, offset, gradOutput, gradInput, gradOffset, weight, columns,
                               kW, kH, dW, dH, padW, padH, dilationW, dilationH, group,
                               deformable_group, im2col_step):
    """Gradients of :func:`deform_conv_forward` by ``input`` and ``offset``."""
    geometry = dH, dW, padH, padW, dilationH, dilationW, group, deformable_group
    args = _deform_args(input, weight, offset, None, None, geometry)
    grads = _tv._deform_conv2d_backward(gradOutput.to(args[0].dtype), *args)
    gradInput.copy_(grads[0])
    gradOffset.copy_(grads[2])


def deform_conv_backward_parameters(input, offset, gradOutput, gradWeight, columns, ones, kW, kH,
                                    dW, dH, padW, padH, dilationW, dilationH, group,
                                    deformable_group, scale, im2col_step):
    """Gradient of :func:`deform_conv_forward` by ``weight``, times ``scale``."""
    geometry = dH, dW, padH, padW, dilationH, dilationW, group, deformable_group
    args = _deform_args(input, gradWeight, offset, None, None, geometry)
    grads = _tv._deform_conv2d_backward(gradOutput.to(args[0].dtype), *args)
    gradWeight.copy_(scale * grads[1])


def modulated_deform_conv_forward(input, weight, bias, ones, offset, mask, output, columns,
                                  kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w,
                                  dilation_h, dilation_w, group, deformable_group, with_bias):
    """Convolution at shifted and weighted points into ``output`` (N, C_out, H_out, W_out).

    Args:
        input, weight, offset, output: As in :func:`deform_conv_forward`.
        bias (Tensor): (C_out,), ignored unless ``with_bias``.
        ones, columns (Tensor): Scratch of the compiled operator, not used.
        mask (Tensor): Weights of the points (N, deformable_group * kH * kW, H_out, W_out).
        kernel_h ... dilation_w (int): Kernel, stride, padding and dilation in pixels.
        group (int): Groups of channels in the convolution.
        deformable_group (int): Groups of channels with offsets of their own.
        with_bias (bool): Add ``bias``.
    """
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    output.copy_(_tv.deform_conv2d(*_deform_args(input, weight, offset, mask,
                                                 bias if with_bias else None, geometry)))


def modulated_deform_conv_backward(input, weight, bias, ones, offset, mask, columns, grad_input,
                                   grad_weight, grad_bias, grad_offset, grad_mask, grad_output,
                                   kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w,
                                   dilation_h, dilation_w, group, deformable_group, with_bias):
    """All gradients of :func:`modulated_deform_conv_forward`."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    args = _deform_args(input, weight, offset, mask, bias if with_bias else None, geometry)
    grads = _tv._deform_conv2d_backward(grad_output.to(args[0].dtype), *args)
    for target, grad in zip((grad_input, grad_weight, grad_offset, grad_mask), grads):
        target.copy_(grad)
    if with_bias:
        grad_bias.copy_(grads[4])


# Multi-scale deformable attention -------------------------------------------------------------


def _attend(value, spatial_shapes, sampling_locations, attention_weights):
    # mmcv has it in plain torch; at this module's import mmcv.ops is only half imported.
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch
    return multi_scale_deformable_attn_pytorch(value, spatial_shapes.tolist(), sampling_locations,
                                               attention_weights)


def ms_deform_attn_forward(value, value_spatial_shapes, value_level_start_index,
                           sampling_locations, attention_weights, im2col_step):
    """Weighted sums of bilinear samples, (N, queries, heads * channels).

    Args:
        value (Tensor): (N, sum of H * W, heads, channels).
        value_spatial_shapes (Tensor): H and W of each level, (levels, 2).
        value_level_start_index (Tensor): Not used, follows from the shapes.
        sampling_locations (Tensor): (N, queries, heads, levels, points, 2), (x, y) in [0, 1].
        attention_weights (Tensor): (N, queries, heads, levels, points).
        im2col_step (int): Images at a time in the compiled operator, not used.
    """
    dtype = value.dtype
    value, locations, weights = _wide(value, sampling_locations, attention_weights)
    return _attend(value, value_spatial_shapes, locations, weights).to(dtype)


def ms_deform_attn_backward(value, value_spatial_shapes, value_level_start_index,
                            sampling_locations, attention_weights, grad_output, grad_value,
                            grad_sampling_loc, grad_attn_weight, im2col_step):
    """Gradients of :func:`ms_deform_attn_forward` by values, locations and weights."""
    inputs = [t.detach().requires_grad_()
              for t in _wide(value, sampling_locations, attention_weights)]
    with torch.enable_grad():
        output = _attend(inputs[0], value_spatial_shapes, *inputs[1:])
    grads = torch.autograd.grad(output, inputs, grad_output.to(output.dtype))
    for target, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads):
        target.copy_(grad)
