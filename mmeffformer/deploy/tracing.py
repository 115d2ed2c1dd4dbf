"""Base classes of graphs, and steps of detectors that can be traced for any size.

Shapes: B batch, C channels, H rows, W columns, N detections.
"""
from typing import Any, Dict, Iterable, Iterator, Tuple

import torch
from torch import Tensor, nn
from torch.onnx.operators import shape_as_tensor
from torch.overrides import TorchFunctionMode
from torchvision.ops import nms

from ..utils.config import class_name


class Traceable(nn.Module):
    """A module that maps an image to a tuple of tensors, named ``output_names``."""

    output_names: Tuple[str, ...] = ()

    def forward(self, image: Tensor) -> Tuple[Tensor, ...]:
        """Return the outputs for an image (B, C, H, W)."""
        with AdaptivePooling():
            return self.compute(image)

    def compute(self, image: Tensor) -> Tuple[Tensor, ...]:
        raise NotImplementedError

    def dynamic_axes(self, any_size: bool) -> Dict[str, Dict[int, str]]:
        """Return names of the axes of the outputs whose size depends on the image."""
        return {name: {2: f'{name}_height', 3: f'{name}_width'} for name in self.output_names
                } if any_size else {}


class Detector(Traceable):
    """A module that maps an image (1, C, H, W) to N detections, best first.

    Outputs: boxes (N, 4) as x1, y1, x2, y2 in px of the image; scores (N); labels (N), the
    classes' indices; and those that a subclass adds.
    """

    output_names = ('boxes', 'scores', 'labels')

    def dynamic_axes(self, any_size: bool) -> Dict[str, Dict[int, str]]:
        return {name: {0: 'detections'} for name in self.output_names}


class AdaptivePooling(TorchFunctionMode):
    """Compute adaptive average pooling as matrix products, which can be exported for any size.

    ONNX pools adaptively only to sizes that divide the input's, which must be fixed.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.adaptive_avg_pool2d:
            return _adaptive_avg_pool2d(*args, **kwargs or {})
        return func(*args, **kwargs or {})


def _adaptive_avg_pool2d(input: Tensor, output_size) -> Tensor:
    sizes = output_size if isinstance(output_size, (tuple, list)) else (output_size, ) * 2
    if all(size == 1 for size in sizes):
        return input.mean((2, 3), keepdim=True)
    rows, cols = (size if size is None else _bins(shape_as_tensor(input)[axis], size, input.dtype)
                  for axis, size in zip((2, 3), sizes))
    pooled = input if rows is None else rows @ input
    return pooled if cols is None else pooled @ cols.T


def _bins(count: Tensor, bins: int, dtype: torch.dtype) -> Tensor:
    """Return weights (bins, count) that average a line of ``count`` cells in bins."""
    index, cells = torch.arange(bins)[:, None], torch.arange(count)
    start, end = index * count // bins, ((index + 1) * count + bins - 1) // bins
    return ((cells >= start) & (cells < end)).to(dtype) / (end - start)


def grouped_nms(boxes: Tensor, scores: Tensor, groups: Tensor, cfg) -> Tensor:
    """Return the indices of the boxes (N, 4) that nms within each group keeps, best first.

    ``cfg`` is the ``test_cfg`` of a head, which has ``nms`` and ``max_per_img``.
    """
    if not cfg.nms.get('class_agnostic', False):
        # Offsets beyond the largest coordinate keep boxes of different groups from overlapping.
        boxes = boxes + (groups.to(boxes) * (one_more(boxes).max() + 1))[:, None]
    keep = nms(boxes, scores, cfg.nms.iou_threshold)
    limit = cfg.get('max_per_img', -1)
    return keep[:limit] if limit > 0 else keep


def one_more(boxes: Tensor) -> Tensor:
    """Return boxes (N + 1, 4): some runtimes cannot compute on none."""
    return torch.cat([boxes, boxes.new_tensor([[0., 0., 1., 1.]])])


def check_settings(settings: Iterable[Tuple[str, Any, Any]]) -> None:
    """Raise a ValueError if a value is not the supported one, of (name, value, supported)."""
    for name, value, expected in settings:
        if value != expected:
            raise ValueError(f'{name} is {value!r}: a whole detector can be exported with '
                             f"{expected!r} only. Export its neck (what='neck')")


def nms_settings(cfg) -> Iterator[Tuple[str, Any, Any]]:
    """Yield the settings of nms in a ``test_cfg`` that :func:`grouped_nms` does not compute."""
    yield 'test_cfg.nms.type', class_name({'type': 'nms', **cfg.nms}), 'nms'
    known = {'type', 'iou_threshold', 'class_agnostic', 'split_thr'}
    yield 'further keys of test_cfg.nms', sorted({*cfg.nms} - known), []
