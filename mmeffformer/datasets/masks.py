"""Masks in COCO's formats."""
import math
from typing import List

import cv2
import numpy as np


def mask_to_polygons(mask: np.ndarray) -> List[List[float]]:
    """Return COCO's polygons of a mask, bool (h, w), not empty.

    There is one polygon [x0, y0, x1, y1, ...] in px for each connected part, where pixel (0, 0)
    covers [0, 1] x [0, 1]. COCO's polygons cannot have holes, so each hole is joined to its
    outline by a cut of width 0.
    """
    # At double resolution contours run a quarter of a pixel inside the pixels' edges, so that
    # rasterising them by pixel centres gives the mask back, one pixel wide parts included.
    x, y, w, h = cv2.boundingRect(mask.view(np.uint8))
    double = np.repeat(np.repeat(mask[y:y + h, x:x + w].view(np.uint8), 2, 0), 2, 1)
    contours, tree = cv2.findContours(double, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    tolerance = min(1.5, .04 * math.sqrt(mask.sum()))  # half px; less for small masks
    polygons = {}
    # CCOMP's fourth number is the outline around a hole, -1 for outlines: those sort first.
    parents = tree[0][:, 3]
    for i in np.argsort(parents >= 0, kind='stable'):
        contour, parent = contours[i][:, 0], parents[i]
        smooth = cv2.approxPolyDP(contour, tolerance, True)[:, 0]
        contour = smooth if len(smooth) > 2 else contour
        if parent >= 0:
            outer = polygons[parent]
            distance = ((outer[:, None] - contour[None])**2).sum(-1)
            a, b = np.unravel_index(distance.argmin(), distance.shape)
            contour = np.concatenate([outer[:a + 1], np.roll(contour, -b, 0), contour[b:b + 1],
                                      outer[a:]])
        polygons[i if parent < 0 else parent] = contour
    return [((p + .5) / 2 + (x, y)).ravel().tolist() for p in polygons.values()]


def mask_to_rle(mask: np.ndarray) -> dict:
    """Return COCO's uncompressed RLE of the columns of a mask, bool (h, w)."""
    edges = np.flatnonzero(np.diff(mask.ravel(order='F').view(np.int8), prepend=0))
    return dict(counts=np.diff(edges, prepend=0, append=mask.size).tolist(), size=list(mask.shape))
