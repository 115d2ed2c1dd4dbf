"""Non-maximum suppression of ``mmcv.ops`` against loops."""
import math

import numpy as np
import pytest
import torch
import torchvision
from mmcv.ops import batched_nms, nms, soft_nms
from support.operators import assert_same, stand_ins_only


def random_boxes(number, zero_area=False):
    """Boxes that overlap a lot, with distinct scores."""
    rng = np.random.default_rng(0)
    corner, size = rng.uniform(0, 20, (number, 2)), rng.uniform(1, 15, (number, 2))
    boxes = np.hstack([corner, corner + size]).astype(np.float32)
    if zero_area:
        boxes[1, 2:] = boxes[1, :2]
    return boxes, rng.permutation(np.linspace(.02, .98, number)).astype(np.float32)


def iou(a, b, offset):
    shared = math.prod(max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + offset, 0) for i in (0, 1))
    area = [(x2 - x1 + offset) * (y2 - y1 + offset) for x1, y1, x2, y2 in (a, b)]
    union = sum(area) - shared
    return shared / union if union else 0.


def reference_nms(boxes, scores, threshold, offset=0):
    keep = []
    for i in np.argsort(-np.asarray(scores)):
        if all(iou(boxes[i], boxes[j], offset) <= threshold for j in keep):
            keep.append(i)
    return keep


def reference_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset=0):
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


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [.2, .5])
def test_nms(device, offset, threshold):
    boxes, scores = random_boxes(40, zero_area=True)
    expected = reference_nms(boxes.astype(float), scores, threshold, offset)
    tensors = [torch.from_numpy(a).to(device) for a in (boxes, scores)]
    dets, keep = nms(*tensors, threshold, offset=offset)
    assert keep.tolist() == expected and 5 < len(expected) < 40
    assert_same(dets, torch.from_numpy(np.hstack([boxes, scores[:, None]])[expected]))
    assert nms(*tensors, threshold, offset=offset, max_num=3)[1].tolist() == expected[:3]
    high = [i for i in expected if scores[i] > .4]
    assert nms(*tensors, threshold, offset=offset, score_threshold=.4)[1].tolist() == high


@stand_ins_only
@pytest.mark.parametrize('ranges', [1, 3, 400])
def test_nms_of_ranges_that_do_not_overlap(monkeypatch, ranges):
    generator = torch.Generator().manual_seed(0)
    corner, size = torch.rand(2, 2500, 2, generator=generator) * 60
    number = torch.randint(ranges, (2500, 1), generator=generator)
    boxes = torch.cat([corner, corner + size], 1) + 121 * number
    scores = torch.rand(2500, generator=generator).mul(50).round()  # many are equal
    sizes, suppress = [], torchvision.ops.nms
    expected = suppress(boxes, scores, .3)
    monkeypatch.setattr(torchvision.ops, 'nms',
                        lambda *args: sizes.append(len(args[0])) or suppress(*args))
    kept = nms(boxes, scores, .3)[1]
    assert kept.tolist() == expected.tolist()
    assert len(sizes) == {1: 1, 3: 3, 400: 5}[ranges] and sum(sizes) == 2500


@pytest.mark.parametrize('second, threshold, offset, kept', [
    ([1., 0, 2, 1], .3, 0, [0, 1]), ([1., 0, 2, 1], .3, 1, [0]),  # the last pixel counts
    # An overlap of 0.6 in float32 does not exceed a threshold of 0.6.
    ([0., 0, .6, 1], .6, 0, [0, 1]), ([0., 0, .6, 1], .599, 0, [0]),
])
def test_nms_of_two_boxes(second, threshold, offset, kept):
    boxes, scores = torch.tensor([[0., 0, 1, 1], second]), torch.tensor([.9, .8])
    assert nms(boxes, scores, threshold, offset=offset)[1].tolist() == kept


@pytest.mark.parametrize('suppress', [nms, soft_nms])
def test_no_boxes(suppress):
    dets, keep = suppress(torch.zeros(0, 4), torch.zeros(0), .5)
    assert dets.shape == (0, 5) and keep.shape == (0, ) and keep.dtype == torch.int64


@stand_ins_only
@pytest.mark.parametrize('dtype', [torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_nms_of_other_dtypes(device, dtype):
    boxes, scores = random_boxes(20)
    boxes = torch.from_numpy(boxes.round()).to(device, dtype)
    scores = torch.from_numpy(scores).to(device)
    expected = reference_nms(boxes.tolist(), scores.tolist(), .4)
    assert nms(boxes, scores, .4)[1].tolist() == expected


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
@pytest.mark.parametrize('min_score', [1e-3, .3])
def test_soft_nms(device, offset, method, min_score):
    boxes, scores = random_boxes(30)
    want = reference_soft_nms(boxes.astype(float), scores, .3, .5, min_score, method, offset)
    dets, keep = soft_nms(torch.from_numpy(boxes).to(device), torch.from_numpy(scores).to(device),
                          .3, .5, min_score, method, offset)
    assert keep.tolist() == [i for i, _ in want]
    assert_same(dets[:, :4], torch.from_numpy(boxes[keep.cpu()]))
    assert_same(dets[:, 4], torch.tensor([score for _, score in want]), 1e-5)


@stand_ins_only  # the overlap of two boxes without area is NaN in compiled operators
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
def test_soft_nms_of_boxes_without_area(method):
    boxes = torch.tensor([[1., 1, 1, 1], [1, 1, 1, 1], [0, 0, 2, 2]])
    dets, keep = soft_nms(boxes, torch.tensor([.9, .8, .7]), method=method)
    assert keep.tolist() == [0, 1, 2]
    assert_same(dets[:, 4], torch.tensor([.9, .8, .7]))


def test_boxes_of_numpy():
    boxes, scores = random_boxes(10)
    assert nms(boxes, scores, .5)[1].tolist() == reference_nms(boxes, scores, .5)
    dets, keep = soft_nms(boxes, scores)
    assert dets.shape == (len(keep), 5) and keep[0] == scores.argmax()
    # The best box stays even if its score is too low.
    assert soft_nms(boxes, scores, min_score=2.)[1].tolist() == [scores.argmax()]


@pytest.mark.parametrize('kind', ['nms', 'soft_nms'])
@pytest.mark.parametrize('split', [10000, 10])
def test_batched_nms(device, kind, split):
    boxes, scores = random_boxes(30)
    classes = np.arange(30) % 3
    want = {}
    for c in range(3):
        own = np.flatnonzero(classes == c)
        if kind == 'nms':
            kept = [(i, scores[own[i]]) for i in reference_nms(boxes[own], scores[own], .4)]
        else:
            kept = reference_soft_nms(boxes[own], scores[own], .4, .5, .05, 'linear')
        want.update({own[i]: score for i, score in kept})
    cfg = dict(type=kind, iou_threshold=.4, split_thr=split)
    if kind == 'soft_nms':
        cfg['min_score'] = .05
    dets, keep = batched_nms(*(torch.from_numpy(a).to(device) for a in (boxes, scores, classes)),
                             cfg)
    assert keep.tolist() == sorted(want, key=lambda i: -want[i])
    assert_same(dets[:, 4], torch.tensor([want[i] for i in keep.tolist()]), 1e-4)
