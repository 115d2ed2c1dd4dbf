"""``mmcv.ops`` against slow computations of our own, whichever operators stand behind it.

The references are loops in float64 that autograd can follow, so that one formula checks both the
result and its gradients.
"""
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import (
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
    MultiScaleDeformableAttention,
    RoIAlign,
    RoIPool,
    batched_nms,
    deform_conv2d,
    get_compiler_version,
    get_compiling_cuda_version,
    modulated_deform_conv2d,
    nms,
    nms_match,
    roi_pool,
    sigmoid_focal_loss,
    soft_nms,
    softmax_focal_loss,
)
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

import mmeffformer  # noqa: F401  (lets torchvision stand in where mmcv has no compiled operators)
from mmeffformer import ops

COMPILED = ops.source() == 'compiled'
GPU = ['cuda'] if torch.cuda.is_available() else []
DEVICES = ['cpu'] + GPU
# mmcv compiles some operators for CUDA alone, and none for half precision on the CPU.
DEVICES_OF_CUDA_OPS = GPU if COMPILED else DEVICES


def rand(*shape, seed=0, low=-1., high=1.):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low


def leaf(tensor, device='cpu'):
    return tensor.detach().clone().to(device).requires_grad_()


def assert_same(actual, expected, tol=1e-9):
    torch.testing.assert_close(actual.detach().double().cpu(), expected.detach().double().cpu(),
                               rtol=tol, atol=tol)


def assert_same_with_grads(op, reference, inputs, device, tol=1e-9):
    """Compare results, and gradients for a random cotangent, by all ``inputs``."""
    ours, theirs = [leaf(t, device) for t in inputs], [leaf(t) for t in inputs]
    actual, expected = op(*ours), reference(*theirs)
    assert_same(actual, expected, tol)
    cotangent = rand(*expected.shape, seed=99)
    grads = torch.autograd.grad(actual, ours, cotangent.to(device))
    for got, want in zip(grads, torch.autograd.grad(expected, theirs, cotangent)):
        assert_same(got, want, tol)
        assert want.abs().sum() > 0


# Non-maximum suppression ----------------------------------------------------------------------


def random_boxes(number, seed=0, malformed=True):
    """Boxes that overlap a lot, with distinct scores."""
    rng = np.random.default_rng(seed)
    corner, size = rng.uniform(0, 20, (number, 2)), rng.uniform(1, 15, (number, 2))
    boxes = np.hstack([corner, corner + size]).astype(np.float32)
    if malformed and number > 3:
        boxes[1, 2:] = boxes[1, :2]  # no area
    scores = rng.permutation(np.linspace(.02, .98, number)).astype(np.float32)
    return boxes, scores


def iou(a, b, offset):
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    shared = max(width, 0) * max(height, 0)
    area = [(x2 - x1 + offset) * (y2 - y1 + offset) for x1, y1, x2, y2 in (a, b)]
    union = sum(area) - shared
    return shared / union if union else 0.


def reference_nms(boxes, scores, threshold, offset):
    keep = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(iou(boxes[i], boxes[j], offset) <= threshold for j in keep):
            keep.append(i)
    return keep


def reference_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset):
    scores, left, result = [float(s) for s in scores], list(range(len(boxes))), []
    while left:
        best = max(left, key=lambda i: scores[i])
        left.remove(best)
        result.append((best, scores[best]))
        for i in left:
            overlap = iou(boxes[best], boxes[i], offset)
            if method == 'gaussian':
                scores[i] *= math.exp(-overlap * overlap / sigma)
            elif overlap >= threshold:
                scores[i] *= 1 - overlap if method == 'linear' else 0
        left = [i for i in left if scores[i] >= min_score]
    return result


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [.2, .5])
def test_nms(device, offset, threshold):
    boxes, scores = random_boxes(40)
    expected = reference_nms(boxes.astype(float), scores, threshold, offset)
    tensors = [torch.from_numpy(a).to(device) for a in (boxes, scores)]
    dets, keep = nms(*tensors, threshold, offset=offset)
    assert keep.tolist() == expected and 5 < len(expected) < 40
    assert_same(dets, torch.from_numpy(np.hstack([boxes, scores[:, None]])[expected]))
    assert nms(*tensors, threshold, offset=offset, max_num=3)[1].tolist() == expected[:3]
    high = [i for i in expected if scores[i] > .4]
    assert nms(*tensors, threshold, offset=offset, score_threshold=.4)[1].tolist() == high


def test_nms_offset_counts_the_last_pixel():
    boxes, scores = torch.tensor([[0., 0, 1, 1], [1, 0, 2, 1]]), torch.tensor([.9, .8])
    assert nms(boxes, scores, .3, offset=0)[1].tolist() == [0, 1]
    assert nms(boxes, scores, .3, offset=1)[1].tolist() == [0]


def test_nms_at_the_threshold():
    # An overlap of 0.6 in float32 is not above a threshold of 0.6.
    boxes, scores = torch.tensor([[0., 0, 10, 10], [0, 0, 6, 10]]), torch.tensor([.9, .8])
    assert nms(boxes, scores, .6)[1].tolist() == [0, 1]
    assert nms(boxes, scores, .599)[1].tolist() == [0]


def test_nms_of_nothing_and_of_numpy():
    dets, keep = nms(torch.zeros(0, 4), torch.zeros(0), .5)
    assert dets.shape == (0, 5) and keep.shape == (0, ) and keep.dtype == torch.int64
    boxes, scores = random_boxes(10)
    assert nms(boxes, scores, .5)[1].tolist() == reference_nms(boxes, scores, .5, 0)


@pytest.mark.parametrize('device', [] if COMPILED else DEVICES)
@pytest.mark.parametrize('dtype', [torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_nms_of_other_types(device, dtype):
    boxes, scores = random_boxes(20)
    boxes = torch.from_numpy(boxes.round()).to(device, dtype)
    scores = torch.from_numpy(scores).to(device)
    expected = reference_nms(boxes.tolist(), scores.tolist(), .4, 0)
    assert nms(boxes, scores, .4)[1].tolist() == expected


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
@pytest.mark.parametrize('min_score', [1e-3, .3])
def test_soft_nms(device, offset, method, min_score):
    # The overlap of two boxes without area is NaN in compiled operators.
    boxes, scores = random_boxes(30, malformed=False)
    want = reference_soft_nms(boxes.astype(float), scores, .3, .5, min_score, method, offset)
    dets, keep = soft_nms(torch.from_numpy(boxes).to(device), torch.from_numpy(scores).to(device),
                          .3, .5, min_score, method, offset)
    assert keep.tolist() == [i for i, _ in want]
    assert_same(dets[:, :4], torch.from_numpy(boxes[keep.cpu()]))
    assert_same(dets[:, 4], torch.tensor([score for _, score in want]), 1e-5)


@pytest.mark.parametrize('method', [] if COMPILED else ['naive', 'linear', 'gaussian'])
def test_soft_nms_of_boxes_without_area(method):
    boxes = torch.tensor([[1., 1, 1, 1], [1, 1, 1, 1], [0, 0, 2, 2]])
    dets, keep = soft_nms(boxes, torch.tensor([.9, .8, .7]), method=method)
    assert keep.tolist() == [0, 1, 2]
    assert_same(dets[:, 4], torch.tensor([.9, .8, .7]))


def test_soft_nms_of_nothing_and_of_numpy():
    dets, keep = soft_nms(torch.zeros(0, 4), torch.zeros(0))
    assert dets.shape == (0, 5) and keep.shape == (0, )
    boxes, scores = random_boxes(5, malformed=False)
    dets, keep = soft_nms(boxes, scores)
    assert dets.shape == (len(keep), 5) and keep[0] == scores.argmax()
    # The best box stays even if its score is too low.
    assert soft_nms(boxes, scores, min_score=2.)[1].tolist() == [scores.argmax()]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('kind', ['nms', 'soft_nms'])
@pytest.mark.parametrize('split', [10000, 10])
def test_batched_nms(device, kind, split):
    boxes, scores = random_boxes(30, malformed=False)
    classes = np.arange(30) % 3
    want = {}
    for c in range(3):
        own = np.flatnonzero(classes == c)
        if kind == 'nms':
            kept = reference_nms(boxes[own], scores[own], .4, 0)
            want.update({own[i]: scores[own[i]] for i in kept})
        else:
            kept = reference_soft_nms(boxes[own], scores[own], .4, .5, .05, 'linear', 0)
            want.update({own[i]: score for i, score in kept})
    cfg = dict(type=kind, iou_threshold=.4, split_thr=split)
    if kind == 'soft_nms':
        cfg['min_score'] = .05
    dets, keep = batched_nms(*(torch.from_numpy(a).to(device) for a in (boxes, scores, classes)),
                             cfg)
    assert keep.tolist() == sorted(want, key=lambda i: -want[i])
    assert_same(dets[:, 4], torch.tensor([want[i] for i in keep.tolist()]), 1e-4)


# RoIAlign and RoIPool -------------------------------------------------------------------------

ROIS = torch.tensor([
    [0, 1.3, 2.1, 12.7, 9.2],
    [1, -6.2, -5.1, 7.4, 8.3],  # crosses the upper left border
    [1, 9.1, 3.2, 30.3, 26.9],  # crosses the lower right border
    [0, 40.2, 40.1, 55.9, 51.3],  # outside
    [0, 5.3, 6.1, 5.9, 6.4],  # smaller than a pixel
    [1, 0.2, 0.3, 17.1, 3.3],
], dtype=torch.float64)  # yapf: disable


def sample_clamped(image, y, x):
    """RoIAlign's bilinear sample of (C, H, W): border pixels repeat for one pixel, then 0."""
    height, width = image.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return image.new_zeros(len(image))
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    dy, dx = y - y0, x - x0
    return ((1 - dy) * (1 - dx) * image[:, y0, x0] + (1 - dy) * dx * image[:, y0, x1] +
            dy * (1 - dx) * image[:, y1, x0] + dy * dx * image[:, y1, x1])


def reference_roi_align(features, rois, size, scale, ratio, mode, aligned):
    result = []
    for index, *corners in rois.tolist():
        x1, y1, x2, y2 = (c * scale - (.5 if aligned else 0) for c in corners)
        extent = [y2 - y1, x2 - x1] if aligned else [max(y2 - y1, 1), max(x2 - x1, 1)]
        bins = [e / s for e, s in zip(extent, size)]
        rows, columns = (ratio or math.ceil(b) for b in bins)
        for i in range(size[0]):
            for j in range(size[1]):
                samples = [
                    sample_clamped(features[int(index)], y1 + bins[0] * (i + (k + .5) / rows),
                                   x1 + bins[1] * (j + (m + .5) / columns))
                    for k in range(rows) for m in range(columns)]
                stack = torch.stack(samples)
                result.append(stack.mean(0) if mode == 'avg' else stack.max(0)[0])
    return torch.stack(result).view(len(rois), *size, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('mode', ['avg', 'max'])
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('ratio', [0, 1, 2])
def test_roi_align(device, mode, aligned, ratio):
    pool = RoIAlign((2, 3), .5, ratio, mode, aligned)
    # Without alignment malformed RoIs count as one pixel.
    rois = ROIS if aligned else torch.cat([ROIS, ROIS[:1, [0, 3, 4, 1, 2]]])
    assert_same_with_grads(
        lambda x: pool(x, rois.to(device)),
        lambda x: reference_roi_align(x, rois, (2, 3), .5, ratio, mode, aligned),
        [rand(2, 3, 7, 9)], device, 1e-6)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_of_a_strided_input(device, mode):
    pool = RoIAlign((3, 2), .5, 0, mode)
    assert_same_with_grads(
        lambda x: pool(x.transpose(2, 3).contiguous(), ROIS.to(device)).flip(2),
        lambda x: reference_roi_align(x.transpose(2, 3), ROIS, (3, 2), .5, 0, mode, True).flip(2),
        [rand(2, 2, 9, 7)], device, 1e-6)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('mode', ['avg', 'max'])
@pytest.mark.parametrize('ratio', [0, 2])
def test_roi_align_without_rois(device, mode, ratio):
    features = leaf(rand(1, 2, 4, 4), device)
    out = RoIAlign(3, 1., ratio, mode)(features, features.new_zeros(0, 5))
    assert out.shape == (0, 2, 3, 3)
    out.sum().backward()
    assert not features.grad.any()


# The compiled operator refuses RoIs of negative size on the CPU.
@pytest.mark.parametrize('device', DEVICES_OF_CUDA_OPS)
def test_roi_align_of_malformed_rois(device):
    rois = torch.tensor([[0, 5., 5, 2, 1], [0, 5, 1, 2, 6], [0, 1, 1, 4, 5]], device=device)
    features = leaf(rand(1, 2, 8, 8).float(), device)
    out = RoIAlign(2, 1., 0)(features, rois)
    assert not out[:2].any()
    assert_same(out[2:], RoIAlign(2, 1., 0)(features, rois[2:]))
    out[:2].sum().backward()
    assert not features.grad.any()
    # Fixed samples of a mirrored RoI mirror the result.
    mirrored = RoIAlign(2, 1., 2)(features, rois[2:, [0, 3, 4, 1, 2]])
    assert_same(mirrored, RoIAlign(2, 1., 2)(features, rois[2:]).flip(2, 3), 1e-6)


def reference_roi_pool(features, rois, size, scale):
    """Bins' borders rounded outwards; the last pixel of a RoI belongs to it."""
    height, width = features.shape[2:]
    result = features.new_zeros(len(rois), features.shape[1], *size)
    for r, (index, x1, y1, x2, y2) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = x1 * scale, y1 * scale, (x2 + 1) * scale, (y2 + 1) * scale
        if x2 <= x1 or y2 <= y1:
            continue
        for i in range(size[0]):
            for j in range(size[1]):
                bin_h, bin_w = (y2 - y1) / size[0], (x2 - x1) / size[1]
                rows = [y for y in range(math.floor(i * bin_h + y1),
                                         math.ceil((i + 1) * bin_h + y1)) if 0 <= y < height]
                columns = [x for x in range(math.floor(j * bin_w + x1),
                                            math.ceil((j + 1) * bin_w + x1)) if 0 <= x < width]
                if rows and columns:
                    bin_ = features[int(index)][:, rows][:, :, columns]
                    result[r, :, i, j] = bin_.flatten(1).max(1)[0]
    return result


@pytest.mark.parametrize('device', DEVICES_OF_CUDA_OPS)
@pytest.mark.parametrize('scale', [1., .5, .25])
@pytest.mark.parametrize('size', [(2, 3), (5, 5)])
def test_roi_pool(device, scale, size):
    pool = RoIPool(size, scale)
    assert_same_with_grads(lambda x: pool(x, ROIS.to(device)),
                           lambda x: reference_roi_pool(x, ROIS, size, scale),
                           [rand(2, 3, 7, 9)], device)


@pytest.mark.parametrize('device', DEVICES_OF_CUDA_OPS)
def test_roi_pool_of_malformed_rois_and_none(device):
    rois = torch.tensor([[0, 5.5, 5.5, 4.2, 1], [0, 5.5, 1, 4.2, 6], [0, 1, 1, 4, 5]],
                        device=device)
    features = rand(1, 2, 8, 8).float().to(device)
    out = RoIPool(2)(features, rois)
    assert not out[:2].any() and out[2].all()
    assert roi_pool(features, rois[:0], 2).shape == (0, 2, 2, 2)


@pytest.mark.parametrize('device', DEVICES_OF_CUDA_OPS)
def test_roi_pool_of_equal_pixels(device):
    # The gradient goes to the first of them in reading order.
    features = torch.zeros(1, 1, 3, 3, device=device)
    features[0, 0, 0, 1:] = features[0, 0, 1, 0] = 1
    features.requires_grad_()
    RoIPool(1)(features, features.new_tensor([[0, 0, 0, 2, 2]])).sum().backward()
    assert features.grad.nonzero().tolist() == [[0, 0, 0, 1]]


# Focal losses ---------------------------------------------------------------------------------


@pytest.mark.parametrize('device', DEVICES_OF_CUDA_OPS)
@pytest.mark.parametrize('gamma,alpha', [(2., .25), (1.5, .6), (0., .5)])
@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_sigmoid_focal_loss(device, gamma, alpha, weighted, reduction):
    # Class 4 is the background, for which the weights of classes have no entry.
    target = torch.tensor([0, 3, 1, 2, 2] if weighted else [0, 3, 4, 2, 2])
    weight = rand(4, seed=5, low=.5, high=2) if weighted else None

    def loss(x):
        result = sigmoid_focal_loss(x, target.to(device), gamma, alpha,
                                    weight.to(device) if weighted else None, reduction)
        return result.reshape(-1)

    def reference(x):
        hot = F.one_hot(target, 5)[:, :4].double()
        bce = F.binary_cross_entropy_with_logits(x, hot, reduction='none')
        miss = (x.sigmoid() - hot).abs()
        result = bce * miss**gamma * (alpha * hot + (1 - alpha) * (1 - hot))
        if weighted:
            result = result * weight[target][:, None]
        return {'none': result, 'sum': result.sum(), 'mean': result.sum() / 5}[reduction].view(-1)

    assert_same_with_grads(loss, reference, [rand(5, 4, low=-6, high=6)], device, 1e-6)


@pytest.mark.parametrize('device', DEVICES_OF_CUDA_OPS)
def test_sigmoid_focal_loss_of_extreme_logits(device):
    logits = torch.tensor([[300., -300], [-300, 300]], device=device, requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([0, 0], device=device), 2., .25, None, 'sum')
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    # log(1e-38) is as bad as it gets.
    assert_same(loss, torch.tensor(87.3365), 1e-4)


@pytest.mark.parametrize('device', [] if COMPILED else DEVICES)
def test_sigmoid_focal_loss_weighs_the_background_with_one(device):
    logits, weight = rand(2, 3).to(device), torch.full((3, ), 5., device=device)
    target = torch.tensor([3, 1], device=device)
    plain = sigmoid_focal_loss(logits, target, 2., .25, None, 'none')
    weighted = sigmoid_focal_loss(logits, target, 2., .25, weight, 'none')
    assert_same(weighted, plain * plain.new_tensor([[1], [5]]))


@pytest.mark.parametrize('device', DEVICES_OF_CUDA_OPS)
@pytest.mark.parametrize('gamma', [2., .5, 0.])
@pytest.mark.parametrize('weighted', [False, True])
def test_softmax_focal_loss(device, gamma, weighted):
    target = torch.tensor([0, 3, 1, 2, 2])
    weight = rand(4, seed=5, low=.5, high=2) if weighted else None

    def loss(x):
        return softmax_focal_loss(x, target.to(device), gamma, .25,
                                  weight.to(device) if weighted else None, 'mean').view(1)

    def reference(x):
        log = x.log_softmax(1).gather(1, target[:, None])[:, 0]
        result = -.25 * (1 - log.exp())**gamma * log
        return ((result * weight[target] if weighted else result).sum() / 5).view(1)

    assert_same_with_grads(loss, reference, [rand(5, 4, low=-3, high=3)], device, 1e-6)


# Deformable convolution -----------------------------------------------------------------------


def sample_zero_padded(image, y, x):
    """Bilinear sample of (C, H, W), 0 outside, differentiable by the tensors ``y`` and ``x``."""
    height, width = image.shape[1:]
    y0, x0 = math.floor(y.item()), math.floor(x.item())
    result = image.new_zeros(len(image))
    for yi, xi in ((y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1)):
        if 0 <= yi < height and 0 <= xi < width:
            result = result + (1 - (y - yi).abs()) * (1 - (x - xi).abs()) * image[:, yi, xi]
    return result


def reference_deform_conv(x, offset, mask, weight, bias, stride, padding, dilation, groups,
                          deform_groups):
    kernel = weight.shape[2:]
    points, part = kernel[0] * kernel[1], x.shape[1] // deform_groups
    result = []
    for image, shift, modulation in zip(x, offset, mask):
        for i in range(offset.shape[2]):
            for j in range(offset.shape[3]):
                columns = []
                for g in range(deform_groups):
                    for k in range(points):
                        dy, dx = shift[2 * (g * points + k):][:2, i, j]
                        y = i * stride[0] - padding[0] + k // kernel[1] * dilation[0] + dy
                        x_ = j * stride[1] - padding[1] + k % kernel[1] * dilation[1] + dx
                        value = sample_zero_padded(image[g * part:(g + 1) * part], y, x_)
                        columns.append(value * modulation[g * points + k, i, j])
                # Order (deform group, point, channel) to (channel, point).
                column = torch.stack(columns).view(deform_groups, points, part)
                column = column.transpose(1, 2).reshape(groups, -1)
                filters = weight.reshape(groups, weight.shape[0] // groups, -1)
                result.append(torch.einsum('gck,gk->gc', filters, column).flatten() + bias)
    return torch.stack(result).view(len(x), *offset.shape[2:], -1).permute(0, 3, 1, 2)


#       kernel, stride, padding, dilation, groups, deform_groups
DEFORMED = [
    ((3, 3), (1, 1), (1, 1), (1, 1), 1, 1),
    ((3, 2), (2, 1), (1, 2), (1, 2), 1, 2),
    ((2, 3), (1, 2), (0, 1), (2, 1), 2, 1),
    ((1, 1), (1, 1), (0, 0), (1, 1), 2, 2),
    ((3, 3), (2, 2), (1, 1), (1, 1), 2, 4),
]


def deformed(kernel, stride, padding, dilation, groups, deform_groups):
    """Input, offset, mask, weight and bias; offsets reach over the image's borders."""
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip((5, 4), kernel, stride, padding, dilation)]
    points = deform_groups * kernel[0] * kernel[1]
    return (rand(2, 4, 5, 4), rand(2, 2 * points, *size, seed=1, low=-2.5, high=2.5),
            rand(2, points, *size, seed=2, low=0), rand(6, 4 // groups, *kernel, seed=3),
            rand(6, seed=4))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('im2col_step', [32, 1])
@pytest.mark.parametrize('geometry', DEFORMED)
def test_deform_conv(device, im2col_step, geometry):
    x, offset, mask, weight, bias = deformed(*geometry)
    options = geometry[1:]
    assert_same_with_grads(
        lambda *t: deform_conv2d(*t, *options, False, im2col_step),
        lambda x, offset, weight: reference_deform_conv(
            x, offset, torch.ones_like(mask), weight, 0, *options),
        [x, offset, weight], device)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('geometry', DEFORMED)
@pytest.mark.parametrize('with_bias', [True, False])
def test_modulated_deform_conv(device, geometry, with_bias):
    x, offset, mask, weight, bias = deformed(*geometry)
    options = geometry[1:]
    inputs = [x, offset, mask, weight] + [bias] * with_bias
    assert_same_with_grads(
        lambda *t: modulated_deform_conv2d(*t, *[None] * (not with_bias), *options),
        lambda *t: reference_deform_conv(*t, *[0] * (not with_bias), *options), inputs, device)


@pytest.mark.parametrize('device', [] if COMPILED else DEVICES)
def test_deform_conv_of_strided_tensors(device):
    # The compiled operator refuses these.
    geometry = DEFORMED[1]
    x, offset, mask, weight, bias = deformed(*geometry)

    def strided(tensor):
        return tensor.to(device).transpose(2, 3).contiguous().transpose(2, 3)

    want = reference_deform_conv(x, offset, mask, weight, bias, *geometry[1:])
    assert_same(modulated_deform_conv2d(strided(x), strided(offset), strided(mask),
                                        weight.to(device), bias.to(device), *geometry[1:]), want)
    ours = [leaf(strided(t)) for t in (x, offset, weight)]
    plain = [leaf(t, device) for t in (x, offset, weight)]
    for tensors in (ours, plain):
        deform_conv2d(*tensors, *geometry[1:]).square().sum().backward()
    for a, b in zip(ours, plain):
        assert_same(a.grad, b.grad)


@pytest.mark.parametrize('device', DEVICES)
def test_deform_conv_without_offsets_is_a_convolution(device):
    x = rand(2, 4, 6, 5).float().to(device)
    for pack in (DeformConv2dPack(4, 6, 3, padding=1), ModulatedDeformConv2dPack(4, 6, 3,
                                                                                padding=1)):
        pack = pack.to(device)
        want = F.conv2d(x, pack.weight, padding=1)
        if isinstance(pack, ModulatedDeformConv2d):
            want = want / 2 + pack.bias[:, None, None]
        assert_same(pack(x), want, 1e-5)
    # mmcv pads an input smaller than the kernel.
    small = DeformConv2d(4, 6, 3, padding=1).to(device)
    assert small(x[:, :, :2, :2], x.new_zeros(2, 18, 2, 2)).shape == (2, 6, 2, 2)


# Multi-scale deformable attention -------------------------------------------------------------

SHAPES = [(3, 4), (2, 5)]


def reference_ms_deform_attn(value, locations, weights):
    batch, _, heads, channels = value.shape
    starts = [0, 12]
    result = []
    for n in range(batch):
        for q in range(locations.shape[1]):
            for h in range(heads):
                total = 0
                for level, (height, width) in enumerate(SHAPES):
                    image = value[n, starts[level]:starts[level] + height * width, h]
                    image = image.t().reshape(channels, height, width)
                    for p in range(locations.shape[4]):
                        x, y = locations[n, q, h, level, p]
                        sample = sample_zero_padded(image, y * height - .5, x * width - .5)
                        total = total + weights[n, q, h, level, p] * sample
                result.append(total)
    return torch.stack(result).view(batch, locations.shape[1], heads * channels)


@pytest.mark.parametrize('device', DEVICES_OF_CUDA_OPS)
def test_ms_deform_attn(device):
    shapes = torch.tensor(SHAPES, device=device)
    starts = torch.tensor([0, 12], device=device)
    inputs = [rand(2, 22, 2, 4), rand(2, 3, 2, 2, 3, 2, seed=1, low=-.2, high=1.2),
              rand(2, 3, 2, 2, 3, seed=2, low=0)]
    assert_same_with_grads(
        lambda value, locations, weights: MultiScaleDeformableAttnFunction.apply(
            value, shapes, starts, locations, weights, 64), reference_ms_deform_attn, inputs,
        device, 1e-8)


@pytest.mark.parametrize('device', DEVICES)
def test_ms_deform_attn_module(device):
    module = MultiScaleDeformableAttention(16, 2, 2, 3, batch_first=True).to(device)
    out = module(rand(2, 3, 16).float().to(device), value=rand(2, 22, 16).float().to(device),
                 reference_points=rand(2, 3, 2, 2, low=0).float().to(device),
                 spatial_shapes=torch.tensor(SHAPES, device=device),
                 level_start_index=torch.tensor([0, 12], device=device))
    assert out.shape == (2, 3, 16)
    out.sum().backward()
    assert module.value_proj.weight.grad.any()


# Half precision -------------------------------------------------------------------------------


@pytest.mark.parametrize('device', [] if COMPILED else DEVICES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(device, dtype):
    """Every operator returns its input's type and comes near the result in float64."""
    x, offset, mask, weight, bias = deformed(*DEFORMED[4])
    options, rois = DEFORMED[4][1:], ROIS.round()
    shapes = torch.tensor(SHAPES, device=device)
    target = torch.tensor([0, 3, 1, 2, 2], device=device)
    cases = [
        (lambda f: RoIAlign(2, .5, 2)(f, rois.to(f)), [rand(2, 3, 7, 9)]),
        (lambda f: RoIAlign(2, .5, 0, 'max')(f, rois.to(f)), [rand(2, 3, 7, 9)]),
        (lambda f: RoIPool(2, .5)(f, rois.to(f)), [rand(2, 3, 7, 9)]),
        (lambda f: sigmoid_focal_loss(f, target, 2., .25, None, 'none'), [rand(5, 4)]),
        (lambda f: softmax_focal_loss(f, target, 2., .25, None, 'sum'), [rand(5, 4)]),
        (lambda *t: deform_conv2d(*t, *options), [x, offset, weight]),
        (lambda *t: modulated_deform_conv2d(*t, *options), [x, offset, mask, weight, bias]),
        (lambda *t: MultiScaleDeformableAttnFunction.apply(t[0], shapes, shapes, *t[1:], 64),
         [rand(2, 22, 2, 4), rand(2, 3, 2, 2, 3, 2, low=0), rand(2, 3, 2, 2, 3, low=0)]),
    ]
    for op, inputs in cases:
        # Rounded beforehand, so that both see the same numbers.
        half = [leaf(t.to(dtype), device) for t in inputs]
        full = [leaf(t.detach().double(), device) for t in half]
        out, want = op(*half), op(*full)
        assert out.dtype == dtype
        assert_same(out, want, 3e-2)
        out.sum().backward()
        want.sum().backward()
        for a, b in zip(half, full):
            assert a.grad.dtype == dtype
            assert_same(a.grad, b.grad, 6e-2)


# The stand-in itself --------------------------------------------------------------------------


def test_versions_are_text():
    assert isinstance(get_compiler_version(), str)
    assert isinstance(get_compiling_cuda_version(), str)


@pytest.mark.parametrize('call', [] if COMPILED else [lambda: nms_match(torch.rand(3, 5), .5)])
def test_other_operators_say_what_they_need(call):
    with pytest.raises(NotImplementedError, match="'nms_match'.*compiled"):
        call()


def test_stand_in_leaves_pythons_own_names_alone():
    import mmcv._ext as extension
    assert not hasattr(extension, '__wrapped__') and not hasattr(extension, '_private')


def test_source():
    import mmcv._ext as extension
    assert ops.source() == ('torchvision' if extension.__file__.endswith('mmcv_ext.py') else
                            'compiled')
    assert ops.diagnose() == (ops.source(), extension.__file__)


def test_install_appends_once():
    before = list(sys.meta_path)
    ops.install()
    assert sys.meta_path == before
    assert [type(f).__module__ for f in before].count('mmeffformer.ops') == 1


def diagnose_with(folder, flags=()):
    """Ask a fresh interpreter, in which ``folder`` comes first, about its operators."""
    code = ('import importlib.util as u, sys\n'
            f'spec = u.spec_from_file_location("standing_in", {ops.__file__!r})\n'
            'ops = u.module_from_spec(spec)\n'
            'spec.loader.exec_module(ops)\n'
            'ops.install()\n'
            'assert "torch" not in sys.modules and "mmcv" not in sys.modules\n'
            'print(*ops.diagnose())')
    return subprocess.run([sys.executable, *flags, '-c', code], check=True, text=True,
                          capture_output=True, cwd=folder,
                          env={**os.environ, 'PYTHONPATH': str(folder)}).stdout.strip()


@pytest.mark.parametrize('content,answer', [
    ('nms = None', 'compiled {}'),
    ('raise OSError("undefined symbol: nms")', 'broken OSError: undefined symbol: nms'),
    (None, 'torchvision'),
])
def test_diagnosis_of_an_mmcv(tmp_path, content, answer):
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').write_text('')
    if content is not None:
        (package / '_ext.py').write_text(content)
    assert diagnose_with(tmp_path).startswith(answer.format(package / '_ext.py'))


def test_diagnosis_without_mmcv(tmp_path):
    assert diagnose_with(tmp_path, ['-I', '-S']) == 'absent'
