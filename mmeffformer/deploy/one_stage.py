"""One-stage detectors of mmdet as traceable graphs.

Heads differ in how they score and decode boxes. Their own ``predict_by_feat`` is traced, in which
the few steps that cannot be are replaced: the choice of candidates, clipping to the image, and all
after decoding.

Shapes: C channels, H rows, W columns, N detections, K candidates.
"""
from copy import copy
from functools import partial
from types import FunctionType, MethodType
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx.operators import shape_as_tensor
from torch.overrides import TorchFunctionMode

from .tracing import Detector, check_settings, grouped_nms, nms_settings

# The methods that are traced or replaced, and the heads whose own ones these may be.
METHODS = {'predict': ['AnchorHead'],
           'predict_by_feat': ['AnchorHead', 'RTMDetInsHead', 'YOLOXHead'],
           '_predict_by_feat_single': ['AnchorHead', 'GFLHead', 'RTMDetInsHead'],
           '_bbox_post_process': ['AnchorHead', 'YOLOXHead'],
           '_bbox_mask_post_process': ['RTMDetInsHead'],
           '_mask_predict_by_feat_single': ['RTMDetInsHead']}
# Coders that clip boxes to the image, or not, by ``clip_border``.
CODERS = ['DeltaXYWHBBoxCoder', 'DistancePointBBoxCoder', 'TBLRBBoxCoder']


def is_one_stage(model: nn.Module) -> bool:
    """Return whether a model is a detector with a head on dense features."""
    return all(hasattr(getattr(model, 'bbox_head', None), name) for name in (
        'predict_by_feat', 'prior_generator', 'test_cfg'))


class OneStageDetector(Detector):
    """Detections of an mmdet RetinaNet, FCOS, RTMDet or the like in one image (1, C, H, W).

    With RTMDet-Ins, a further output is mask_logits (N, ceil(H / 8), ceil(W / 8)), those of a
    grid over the image.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        check_settings(_settings(model))
        self.model, self.head = model, copy(model.bbox_head)
        self.with_masks = hasattr(self.head, '_mask_predict_by_feat_single')
        self.output_names += ('mask_logits', ) * self.with_masks
        for name in ('predict_by_feat', '_predict_by_feat_single'):
            setattr(self.head, name, _rebound(getattr(self.head, name),
                                              filter_scores_and_topk=_best_candidates))
        self.head._bbox_post_process = self.head._bbox_mask_post_process = self._select
        if hasattr(self.head, 'bbox_coder'):
            coder = copy(self.head.bbox_coder)
            coder.decode = partial(_decode, self.head.bbox_coder)
            self.head.bbox_coder = coder

    def compute(self, image: Tensor) -> Tuple[Tensor, ...]:
        outputs = self.head(self.model.extract_feat(image))
        size = shape_as_tensor(image)[[2, 3]]
        detections, = self.head.predict_by_feat(*outputs, batch_img_metas=[dict(img_shape=size)])
        return detections

    def dynamic_axes(self, any_size: bool) -> Dict[str, Dict[int, str]]:
        axes = super().dynamic_axes(any_size)
        if self.with_masks and any_size:
            axes['mask_logits'].update({1: 'mask_height', 2: 'mask_width'})
        return axes

    def _select(self, results, cfg, mask_feat: Optional[Tensor] = None, **_
                ) -> Tuple[Tensor, ...]:
        """Return the outputs from the candidates, ``InstanceData`` of mmdet."""
        boxes, scores, labels = results.bboxes, results.scores, results.labels
        if 'score_factors' in results:
            scores = scores * results.score_factors
        large = torch.arange(labels.shape[0], device=labels.device)
        if cfg.get('min_bbox_size', -1) >= 0:
            large = (boxes[:, 2:] - boxes[:, :2] > cfg.min_bbox_size).all(1).nonzero()[:, 0]
        keep = large[grouped_nms(boxes[large], scores[large], labels[large], cfg)]
        outputs = boxes[keep], scores[keep], labels[keep]
        if mask_feat is None:
            return outputs
        # One instance more, as mmdet branches on none, and some runtimes cannot compute on none.
        kernels, priors = (F.pad(each[keep], (0, 0, 0, 1), value=1.)
                           for each in (results.kernels, results.priors))
        with InstanceConvolutions():
            masks = self.head._mask_predict_by_feat_single(mask_feat, kernels, priors)
        return (*outputs, masks[:-1])


def _rebound(method: MethodType, **replaced: Any) -> MethodType:
    """Return a method in which global names have other values."""
    function = method.__func__
    return MethodType(FunctionType(
        function.__code__, {**function.__globals__, **replaced}, function.__name__,
        function.__defaults__, function.__closure__), method.__self__)


def _best_candidates(scores: Tensor, score_thr: float, topk: int,
                     results: Optional[Dict[str, Tensor]] = None) -> Tuple:
    """Compute mmdet's ``filter_scores_and_topk``: a slice has at most ``topk`` candidates."""
    rows, labels = (scores > score_thr).nonzero().unbind(1)
    scores, order = scores[rows, labels].sort(descending=True)
    order = order[:topk]
    rows = rows[order]
    chosen = {name: value[rows] for name, value in (results or {}).items()}
    return scores[:topk], labels[order], rows, chosen


def _decode(coder, priors: Tensor, deltas: Tensor, max_shape: Tensor) -> Tensor:
    """Return boxes (K, 4) as decoded by the coder, clipped to the image's H, W ``max_shape``."""
    boxes = coder.decode(priors, deltas)
    boxes = getattr(boxes, 'tensor', boxes)  # of HorizontalBoxes
    if not coder.clip_border:
        return boxes
    return torch.minimum(boxes.clamp(min=0), max_shape[[1, 0, 1, 0]].to(boxes))


class InstanceConvolutions(TorchFunctionMode):
    """Compute 1 x 1 convolutions as matrix products, one group for each instance.

    ONNX needs a fixed number of groups.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.conv2d:
            return _instance_conv2d(*args, **kwargs or {})
        return func(*args, **kwargs or {})


def _instance_conv2d(input: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int,
                     groups: int) -> Tensor:
    height, width = input.shape[2:]
    # (N, out, in) @ (N, in, H * W)
    output = (weight.reshape(groups, -1, weight.shape[1])
              @ input.reshape(groups, weight.shape[1], height * width))
    output = output + bias.reshape(groups, -1, 1)
    return output.reshape(1, -1, height, width)


def _settings(model: nn.Module) -> Iterator[Tuple[str, Any, Any]]:
    """Yield name, value and supported value of each setting."""
    from mmdet.models import SingleStageDetector, dense_heads

    def chosen(name: str, value: Any, supported: List) -> Tuple[str, str, str]:
        names = [each if isinstance(each, str) else each.__qualname__.split('.')[0]
                 for each in (value, *supported)]
        return name, names[0], names[0] if value in supported else ' or '.join(names[1:])

    head = model.bbox_head
    yield chosen('the class of predict', type(model).predict, [SingleStageDetector.predict])
    for name, classes in METHODS.items():
        if method := getattr(type(head), name, None):
            yield chosen(f"the class of the bbox_head's {name}", method,
                         [getattr(getattr(dense_heads, each), name) for each in classes])
    if hasattr(head, 'bbox_coder'):
        yield chosen('bbox_coder', type(head.bbox_coder).__name__, CODERS)
    yield from nms_settings(head.test_cfg)
