"""Scale, anchors, batch size and schedule for a data set and the devices of this machine."""
import os
from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch.cuda import device_count, get_device_properties

MIN_OBJECT_PX = 8  # side of the objects that have at least this size after resizing ...
MIN_OBJECT_QUANTILE = .05  # ... except for the smallest ones
COCO_SCALE = (1333, 800)  # px, mmdet's recipe
GIB_PER_IMAGE = 3.  # of training Mask R-CNN L1 at COCO_SCALE


class Device(NamedTuple):
    """Devices of a training run: number of GPUs (0: a CPU), GiB of each, CPU cores."""

    gpus: int
    memory_gib: float
    cores: int

    @classmethod
    def find(cls) -> 'Device':
        """Return the devices of this machine."""
        gpus = device_count() if torch.cuda.is_available() else 0
        memory = get_device_properties(0).total_memory / 2**30 if gpus else 0.
        return cls(gpus, memory, os.cpu_count() or 1)


class Schedule(NamedTuple):
    """Batch size per process, iterations, learning rate, workers per process."""

    batch_size: int
    num_steps: int
    lr: float
    num_workers: int


def find_schedule(task: str, images: int, side: float, pretrained: bool,
                  device: Device) -> Schedule:
    """Return a schedule for ``images`` training images of about ``side`` x ``side`` px.

    Small sets get a minimum of images seen, as a network has to learn its heads on any set; on a
    CPU there is also a maximum.
    """
    if device.gpus:
        pixels = side**2 / (COCO_SCALE[0] * COCO_SCALE[1])
        batch = int(np.clip(device.memory_gib / GIB_PER_IMAGE / pixels, 1, 16))
        fewest, most = (8000, 10**6) if pretrained else (24000, 10**6)
    else:
        batch, (fewest, most) = 4, (1200, 2400) if pretrained else (1440, 2400)
    batch = max(1, min(batch, images))
    seen = np.clip((12 if pretrained else 36) * images, fewest, most)
    total = batch * max(1, device.gpus)
    lr = {'det': 1e-3, 'seg': 2e-3}[task] if not pretrained else 2e-4 if total >= 8 else 1e-4
    return Schedule(batch, round(seen / total / 10) * 10 or 10, lr,
                    max(1, min(4, device.cores // (2 * max(1, device.gpus)))))


def round_up(value: float, step: int = 32) -> int:
    return int(-(-value // step) * step)


def resized(sizes: np.ndarray, scale: Tuple[int, int]) -> np.ndarray:
    """Return the factors by which images of ``sizes``, (n, 2) px, are resized into ``scale``."""
    return np.minimum(max(scale) / sizes.max(1), min(scale) / sizes.min(1))


def find_scale(images: Sequence[Tuple[int, int]], objects: Optional[Sequence[np.ndarray]],
               device: Device, pretrained: bool) -> Tuple[Tuple[int, int], np.ndarray]:
    """Return the (long, short) side in px that images are resized into, and the objects' sizes.

    Starts from mmdet's scale for COCO, or on a CPU and without pretrained weights from the
    images' own size, and enlarges it until 95 % of the objects have sides of 8 px.

    Args:
        images: (width, height) of each image, px.
        objects: Square roots of the areas of each image's objects, px; None in segmentation.
    """
    sizes = np.array(images, float)
    long, short = np.median(sizes.max(1)), np.median(sizes.min(1))
    start, most = (1333, 2048) if device.gpus else (512, 1333)
    start = min(start, long * (2 if device.gpus and pretrained else 1))
    for side in range(round_up(start), max(round_up(start), most) + 1, 32):
        scale = side, round_up(short / long * side)
        if objects is None:
            return scale, np.empty(0)
        factors = resized(sizes, scale)
        found = np.concatenate([factor * own for factor, own in zip(factors, objects)])
        if side > 2.5 * long or np.quantile(found, MIN_OBJECT_QUANTILE) >= MIN_OBJECT_PX:
            break
    return scale, found


def find_anchor_scale(sizes: np.ndarray) -> int:
    """Return the RPN's anchor scale for objects of ``sizes`` px, 8 for COCO.

    The anchors on the second of five levels, of stride 8, get the median size.
    """
    return int(np.clip(round(float(np.median(sizes)) / 8), 2, 16))


def find_max_per_img(most: int) -> int:
    """Return the detections per image to keep: 100, or more than ``most`` objects need."""
    return max(100, -(-3 * most // 200) * 100)


def make_palette(count: int) -> List[Tuple[int, int, int]]:
    """Return ``count`` distinct colours (R, G, B): hues in steps of the golden ratio."""
    from colorsys import hsv_to_rgb
    return [tuple(round(255 * value) for value in hsv_to_rgb(  # type: ignore[misc]
        i * .618 % 1, .85 - .35 * (i // 8 % 2), .95 - .3 * (i // 16 % 2))) for i in range(count)]
