"""Two-stage detectors of mmdet as traceable graphs.

Between its modules mmdet uses lists of results, branches on the number of detections, and
operators of its own, which cannot be traced. The class here calls the same modules, and takes the
steps between them on tensors alone.

Shapes: H rows, W columns, N detections, R regions of interest, A anchors of a cell.
"""
import math
from typing import Any, Iterator, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.onnx.operators import shape_as_tensor
from torchvision.ops import roi_align

from .tracing import Detector, check_settings, grouped_nms, nms_settings, one_more


class TwoStageDetector(Detector):
    """Detections of an mmdet Faster or Mask R-CNN in one image (1, C, H, W), best first.

    With a mask head, a further output is masks (N, 28, 28), the probability of each cell of a
    grid over the box.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.backbone, self.neck = model.backbone, model.neck
        self.rpn, self.roi = model.rpn_head, model.roi_head
        check_settings(_settings(self.rpn, self.roi))
        self.output_names += ('masks', ) * self.roi.with_mask
        for i, base in enumerate(self.rpn.anchor_generator.base_anchors):
            self.register_buffer(f'anchors{i}', base, persistent=False)

    def compute(self, image: Tensor) -> Tuple[Tensor, ...]:
        features = self.neck(self.backbone(image))
        size = shape_as_tensor(image)[[3, 2, 3, 2]].to(image)  # W, H, W, H
        boxes, scores, labels = self._classify(features, self._propose(features, size), size)
        if not self.roi.with_mask:
            return boxes, scores, labels
        return boxes, scores, labels, self._segment(features, boxes, labels)

    def _propose(self, features: Sequence[Tensor], size: Tensor) -> Tensor:
        """Return the best region proposals (R, 4)."""
        cfg, rpn = self.rpn.test_cfg, self.rpn
        boxes, scores, levels = [], [], []
        for i, (logits, deltas) in enumerate(zip(*rpn(features))):
            anchors = _shifted(getattr(self, f'anchors{i}'), logits,
                               rpn.anchor_generator.strides[i])
            deltas = deltas[0].permute(1, 2, 0).reshape(-1, 4)
            score = logits[0].permute(1, 2, 0).reshape(-1).sigmoid()
            if cfg.nms_pre > 0:
                # The number of scores is a node of the graph.
                score, best = score.topk(
                    torch.minimum(torch.tensor(cfg.nms_pre), shape_as_tensor(score)[0]))
                anchors, deltas = anchors[best], deltas[best]
            boxes.append(_decode(rpn.bbox_coder, anchors, deltas, size))
            scores.append(score)
            levels.append(torch.full_like(score, i))
        boxes, scores, levels = torch.cat(boxes), torch.cat(scores), torch.cat(levels)
        large = (boxes[:, 2:] - boxes[:, :2] > cfg.min_bbox_size).all(1).nonzero()[:, 0]
        boxes, scores, levels = boxes[large], scores[large], levels[large]
        return boxes[grouped_nms(boxes, scores, levels, cfg)]

    def _classify(self, features: Sequence[Tensor], regions: Tensor, size: Tensor
                  ) -> Tuple[Tensor, Tensor, Tensor]:
        """Return boxes (N, 4), scores (N) and labels (N) of the objects in the regions (R, 4)."""
        cfg, head = self.roi.test_cfg, self.roi.bbox_head
        logits, deltas = head(_pool(self.roi.bbox_roi_extractor, features, one_more(regions)))
        scores = logits.softmax(1)[:-1, :-1]  # the last class is background
        region, labels = (scores > cfg.score_thr).nonzero().unbind(1)
        deltas = (deltas[region] if head.reg_class_agnostic
                  else deltas.unflatten(1, (-1, 4))[region, labels])
        boxes = _decode(head.bbox_coder, regions[region], deltas, size)
        scores = scores[region, labels]
        keep = grouped_nms(boxes, scores, labels, cfg)
        return boxes[keep], scores[keep], labels[keep]

    def _segment(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Return the mask probabilities (N, 28, 28) of each box's class."""
        extractor = self.roi.mask_roi_extractor or self.roi.bbox_roi_extractor
        logits = self.roi.mask_head(_pool(extractor, features, one_more(boxes)))[:-1]
        if self.roi.mask_head.class_agnostic:
            return logits[:, 0].sigmoid()
        return logits[torch.arange(labels.shape[0], device=labels.device), labels].sigmoid()


def _settings(rpn: nn.Module, roi: nn.Module) -> Iterator[Tuple[str, Any, Any]]:
    """Yield name, value and supported value of each setting; types come first, as later settings
    exist in the supported types only."""
    from mmcv.ops import RoIAlign
    from mmdet.models.dense_heads import RPNHead
    from mmdet.models.roi_heads import StandardRoIHead
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
    from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder

    def kind(name: str, part: nn.Module, expected: type) -> Tuple[str, str, str]:
        return name, type(part).__name__, expected.__name__

    yield kind('rpn_head', rpn, RPNHead)
    yield kind('roi_head', roi, StandardRoIHead)
    yield kind('anchor_generator', rpn.anchor_generator, AnchorGenerator)
    yield 'rpn_head.use_sigmoid_cls', rpn.use_sigmoid_cls, True
    yield 'roi_head.shared_head', roi.with_shared_head, False
    yield 'bbox_head.custom_cls_channels', roi.bbox_head.custom_cls_channels, False
    for head in (rpn, roi.bbox_head):
        yield kind('bbox_coder', head.bbox_coder, DeltaXYWHBBoxCoder)
        yield 'bbox_coder.add_ctr_clamp', head.bbox_coder.add_ctr_clamp, False
    for cfg in (rpn.test_cfg, roi.test_cfg):
        yield from nms_settings(cfg)
    for extractor in filter(None, (roi.bbox_roi_extractor,
                                   getattr(roi, 'mask_roi_extractor', None))):
        yield kind('roi_extractor', extractor, SingleRoIExtractor)
        for layer in extractor.roi_layers:
            yield kind('roi_layer', layer, RoIAlign)
            yield 'roi_layer.pool_mode', layer.pool_mode, 'avg'
            # ONNX takes a negative ratio for 0, which samples by the size of the box.
            yield 'roi_layer.sampling_ratio', layer.sampling_ratio, max(layer.sampling_ratio, 0)


def _shifted(base: Tensor, like: Tensor, stride: Tuple[int, int]) -> Tensor:
    """Return anchors (H * W * A, 4) around every cell of ``like`` (1, _, H, W), from (A, 4)."""
    rows, cols = like.shape[2:]
    y, x = torch.meshgrid(torch.arange(rows, device=base.device) * stride[1],
                          torch.arange(cols, device=base.device) * stride[0], indexing='ij')
    shifts = torch.stack([x, y, x, y], -1).reshape(-1, 1, 4)
    return (base + shifts).reshape(-1, 4)


def _decode(coder, boxes: Tensor, deltas: Tensor, size: Tensor) -> Tensor:
    """Return boxes (R, 4) moved and scaled by deltas (R, 4), as ``DeltaXYWHBBoxCoder`` does."""
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    limit = abs(math.log(16 / 1000))
    extent = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + deltas[:, :2] * extent
    half = extent * deltas[:, 2:].clamp(-limit, limit).exp() / 2
    decoded = torch.cat([centre - half, centre + half], 1)
    return torch.minimum(decoded.clamp(min=0), size) if coder.clip_border else decoded


def _pool(extractor, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """Return features (R, C, rows, cols) of the boxes (R, 4), each from the level of its size."""
    layers, finest = extractor.roi_layers, extractor.finest_scale
    extent = boxes[:, 2:] - boxes[:, :2]
    scale = (extent[:, 0] * extent[:, 1]).sqrt() / finest
    level = (scale + 1e-6).log2().floor().clamp(0, len(layers) - 1)
    regions = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1)  # all in image 0
    pooled, places = [], []
    for i, (layer, feature) in enumerate(zip(layers, features)):
        place = (level == i).nonzero()[:, 0]
        pooled.append(roi_align(feature, regions[place], layer.output_size, layer.spatial_scale,
                                layer.sampling_ratio, layer.aligned))
        places.append(place)
    return torch.cat(pooled)[torch.cat(places).argsort()]
