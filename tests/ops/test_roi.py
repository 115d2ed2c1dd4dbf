"""RoIAlign of ``mmcv.ops`` against loops."""
import math
import sys

import pytest
import torch
import torchvision
from mmcv.ops import RoIAlign
from support.operators import (
    assert_half_precision,
    assert_same,
    assert_same_with_grads,
    leaf,
    rand,
    stand_ins_only,
)

from mmeffformer import ops

ROIS = torch.tensor([
    [0, 1.3, 2.1, 12.7, 9.2],
    [1, -6.2, -5.1, 7.4, 8.3],  # crosses the upper left border
    [1, 9.1, 3.2, 30.3, 26.9],  # crosses the lower right border
    [0, 40.2, 40.1, 55.9, 51.3],  # outside
    [0, 5.3, 6.1, 5.9, 6.4],  # smaller than a pixel
    [1, 0.2, 0.3, 17.1, 3.3],
], dtype=torch.float64)


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


def reference_roi_align(features, rois, size, scale, ratio, aligned):
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
                result.append(torch.stack(samples).mean(0))
    return torch.stack(result).view(len(rois), *size, -1).permute(0, 3, 1, 2)


# On the CPU, few channels are left to torchvision.
@pytest.mark.parametrize('channels', [3, 8])
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('ratio', [0, 1, 2])
def test_roi_align(device, channels, aligned, ratio):
    pool = RoIAlign((2, 3), .5, ratio, 'avg', aligned)
    # Without alignment malformed RoIs count as one pixel.
    rois = ROIS if aligned else torch.cat([ROIS, ROIS[:1, [0, 3, 4, 1, 2]]])
    assert_same_with_grads(lambda x: pool(x, rois.to(device)),
                           lambda x: reference_roi_align(x, rois, (2, 3), .5, ratio, aligned),
                           [rand(2, channels, 7, 9)], device, 1e-6)


def test_roi_align_of_a_strided_input(device):
    pool = RoIAlign((3, 2), .5, 0)
    assert_same_with_grads(
        lambda x: pool(x.transpose(2, 3).contiguous(), ROIS.to(device)).flip(2),
        lambda x: reference_roi_align(x.transpose(2, 3), ROIS, (3, 2), .5, 0, True).flip(2),
        [rand(2, 8, 9, 7)], device, 1e-6)


def test_roi_align_without_rois(device):
    features = leaf(rand(1, 8, 4, 4), device)
    out = RoIAlign(3, 1., 0)(features, features.new_zeros(0, 5))
    assert out.shape == (0, 8, 3, 3)
    out.sum().backward()
    assert not features.grad.any()


# The compiled operator refuses RoIs of negative size on the CPU.
@pytest.mark.parametrize('channels', [2, 8])
def test_roi_align_of_malformed_rois(cuda_op_device, channels):
    rois = torch.tensor([[0, 5., 5, 2, 1], [0, 5, 1, 2, 6], [0, 1, 1, 4, 5]]).to(cuda_op_device)
    features = leaf(rand(1, channels, 8, 8).float(), cuda_op_device)
    out = RoIAlign(2, 1., 0)(features, rois)
    assert not out[:2].any()
    assert_same(out[2:], RoIAlign(2, 1., 0)(features, rois[2:]))
    out[:2].sum().backward()
    assert not features.grad.any()
    # Samples of a fixed number: a mirrored RoI mirrors the result.
    mirrored = RoIAlign(2, 1., 2)(features, rois[2:, [0, 3, 4, 1, 2]])
    assert_same(mirrored, RoIAlign(2, 1., 2)(features, rois[2:]).flip(2, 3), 1e-6)


@stand_ins_only
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_roi_align_of_half_precision(device, dtype):
    assert_half_precision(lambda x: RoIAlign(2, .5, 2)(x, ROIS.round().to(x)), [rand(2, 8, 7, 9)],
                          dtype, device)


def random_rois(count, side):
    """Return RoIs (count, 5) of two images: of all sizes up to that of the map, and beyond."""
    corners = rand(2, count, 2, seed=3, low=-.2 * side, high=1.2 * side).sort(0).values
    image = torch.arange(count, dtype=torch.float64)[:, None] % 2
    return torch.cat([image, *corners], 1)


@stand_ins_only
@pytest.mark.parametrize('size', [(7, 7), (3, 5)])
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('ratio', [0, 2])
def test_roi_align_agrees_with_torchvision(size, aligned, ratio):
    rois, features = random_rois(50, 160), rand(2, 8, 32, 40)

    def reference(x):
        return torchvision.ops.roi_align(x, rois, size, .25, ratio, aligned)

    assert_same_with_grads(lambda x: RoIAlign(size, .25, ratio, 'avg', aligned)(x, rois),
                           reference, [features], 'cpu')


@stand_ins_only
def test_roi_align_is_nearer_to_float64_than_torchvision():
    rois, features = random_rois(200, 1024).float(), rand(2, 16, 256, 256).float()
    want = torchvision.ops.roi_align(features.double(), rois.double(), 7, .25, 0, True)
    error = (RoIAlign(7, .25, 0)(features, rois) - want).abs().max()
    of_torchvision = (torchvision.ops.roi_align(features, rois, 7, .25, 0, True) - want).abs()
    assert error < 5e-6 < of_torchvision.max()


@stand_ins_only
def test_roi_align_of_some_rois_at_a_time(monkeypatch):
    rois, features = random_rois(9, 40), rand(2, 8, 32, 40)
    pool = RoIAlign(3, 1., 0)
    monkeypatch.setattr(sys.modules['mmcv._ext.roi'], 'MAX_PIXELS', 500)
    assert_same_with_grads(
        lambda x: pool(x, rois), lambda x: torchvision.ops.roi_align(x, rois, 3, 1., 0, True),
        [features], 'cpu')


@stand_ins_only
def test_pixels_between_distant_samples_are_left_out():
    rois = torch.tensor([[0, 3., 5, 290, 190]])
    part, = sys.modules['mmcv._ext.roi']._bins(rois, (1, 8, 200, 300), (2, 3), 1., 2, True)
    assert len(part.pixels) == 6 * 16  # bins, corners of four samples in each


@stand_ins_only
@pytest.mark.parametrize('ratio', [0, 2])
def test_roi_align_of_rois_far_beyond_the_map(ratio):
    """Memory is bounded by the map, not by the RoI."""
    rois = torch.tensor([[0, -1e7, -1e7, 1e7, 1e7], [0, 1e6, 2, 2e6, 9], [0, -9e8, 1, -1e8, 7],
                         [0, 1, 2, 9, 8]])
    out = RoIAlign(2, 1., ratio)(rand(1, 8, 8, 8).float(), rois)
    assert out.isfinite().all() and not out[1:3].any() and out[3].any()
    assert bool(out[0].any()) == (ratio == 0)  # two samples per bin miss the map


@stand_ins_only
def test_roi_align_of_rois_that_are_not_finite():
    rois = torch.tensor([[0, float('nan'), 1, 5, 6], [0, 1, 1, 5, float('inf')], [0, 1, 2, 9, 8]])
    out = RoIAlign(2, 1., 0)(rand(1, 8, 8, 8).float(), rois)
    assert not out[:2].nan_to_num().any() and out[2].any()


@stand_ins_only
def test_torchvision_only():
    rois, features = random_rois(9, 40).float(), rand(2, 8, 32, 40).float()
    want = torchvision.ops.roi_align(features, rois, 7, 1., 0, True)
    pool = RoIAlign(7, 1., 0)
    assert not torch.equal(pool(features, rois), want)  # sums are rounded in another order
    with ops.torchvision_only():
        assert torch.equal(pool(features, rois), want)
    assert not torch.equal(pool(features, rois), want)


@stand_ins_only
def test_roi_align_by_maximum_needs_compiled_operators(device):
    with pytest.raises(NotImplementedError, match="pool_mode='max'.*compiled operators"):
        RoIAlign(2, .5, 2, 'max')(rand(2, 3, 7, 9).to(device), ROIS.to(device))
