"""Non-maximum suppression.

Differences from mmcv's compiled operators: boxes of zero area do not overlap in Gaussian soft-NMS
(compiled: NaN), and boxes of equal score may be ordered differently.
"""
from typing import Sequence

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from . import common
from .common import widen

PIECE = 512  # boxes, from which on fewer comparisons outweigh one more call


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Return the indices (K,) of the boxes kept, by falling score.

    Args:
        boxes: (N, 4), x1, y1, x2, y2 in px.
        scores: (N,).
        iou_threshold: A box whose IoU with a better one exceeds it is dropped.
        offset: 1 if the last pixel belongs to a box (width = x2 - x1 + 1), else 0.
    """
    boxes, scores = widen(boxes, scores)
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    # The compiled operator compares in float32: an IoU of exactly 0.6 does not exceed 0.6.
    threshold = float(np.float32(iou_threshold))
    if (not common.FASTER or boxes.device.type != 'cpu' or len(boxes) < 2 * PIECE
            or threshold < 0):
        return torchvision.ops.nms(boxes, scores, threshold)
    keep = torch.cat([piece[torchvision.ops.nms(boxes[piece], scores[piece], threshold)]
                      for piece in _pieces(boxes)]).sort().values
    return keep[scores[keep].sort(descending=True, stable=True).indices]


def _pieces(boxes: Tensor) -> Sequence[Tensor]:
    """Return the indices of sets of boxes that overlap no box of another set.

    Callers move the boxes of each class or level to a range of its own, and then suppress all
    together: on a CPU most of the time would go into comparing boxes of different ranges.
    """
    left, order = boxes[:, 0].sort()
    reach = boxes[order, 2].cummax(0).values
    first = F.pad((left[1:] > reach[:-1]).nonzero()[:, 0] + 1, (1, 0))  # of each range
    last_first = first[torch.searchsorted(first, torch.arange(len(boxes)), right=True) - 1]
    pieces = order.split((last_first // PIECE).unique_consecutive(return_counts=True)[1].tolist())
    return [piece.sort().values for piece in pieces]  # as they came, for boxes of equal score


def softnms(boxes: Tensor, scores: Tensor, dets: Tensor, iou_threshold: float, sigma: float,
            min_score: float, method: int, offset: int) -> Tensor:
    """Return the indices (K,) of the boxes kept, best first.

    Args:
        boxes: (N, 4) on the CPU.
        scores: (N,) on the CPU.
        dets: (N, 5). The boxes kept and their new scores are written to the first K rows.
        iou_threshold: IoU from which methods 0 and 1 lower a score.
        sigma: Width of the Gaussian of method 2.
        min_score: Boxes whose score falls below it are dropped.
        method: 0 removes, 1 multiplies by (1 - IoU), 2 by exp(-IoU² / sigma).
        offset: As in :func:`nms`.
    """
    # One step per box kept, each on a short array, where numpy has less overhead than torch.
    corners, new_scores = (t.detach().numpy().copy() for t in widen(boxes, scores))
    top_left, bottom_right = corners[:, :2], corners[:, 2:] + offset
    area = (bottom_right - top_left).prod(1)
    left, kept = np.arange(len(corners)), []
    while len(left):
        at = new_scores[left].argmax()
        best = left[at]
        kept.append(best)
        left = np.delete(left, at)
        side = np.minimum(bottom_right[best], bottom_right[left]) - np.maximum(
            top_left[best], top_left[left])
        shared = side.clip(0).prod(1)
        union = area[best] + area[left] - shared
        iou = np.divide(shared, union, out=np.zeros_like(shared), where=union != 0)
        if method == 2:
            factor = np.exp(-iou**2 / sigma)
        else:
            factor = np.where(iou >= iou_threshold, 1 - iou if method == 1 else 0, 1)
        new_scores[left] *= factor
        left = left[new_scores[left] >= min_score]
    keep = torch.tensor(np.array(kept, dtype=np.int64))
    dets[:len(keep), :4] = torch.from_numpy(corners)[keep]
    dets[:len(keep), 4] = torch.from_numpy(new_scores)[keep]
    return keep
