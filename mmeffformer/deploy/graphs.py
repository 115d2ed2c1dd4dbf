"""Models as traceable graphs.

Between its modules mmdet uses lists of results, branches on the number of detections, and
operators of its own, which cannot be traced. The classes here call the same modules, and take the
steps between them on tensors alone, for one image of any size.

Shapes: B batch, H rows, W columns, N detections, R regions of interest.
"""
import math
from typing import Any, Iterator, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.onnx.operators import shape_as_tensor
from torchvision.ops import nms, roi_align

PARTS = ('backbone', 'neck', 'model')


def traceable(model: nn.Module, what: str = 'model') -> 'Traceable':
    """Return a part of a detector or segmentor, or the whole, as a module that can be traced.

    It shares the modules of ``model`` and sets them to eval mode. It maps normalised float
    (B, 3, H, W) to a tuple of tensors, whose names are its ``output_names``.

    Args:
        model: A backbone, or an mmdet or mmseg model that has one.
        what: 'backbone', 'neck' (the backbone's outputs through the neck) or 'model'.

    Raises:
        ValueError: The model has no such part, or the part cannot be traced.
    """
    if what not in PARTS:
        raise ValueError(f'what={what!r}: expected one of {", ".join(PARTS)}')
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(f'{name} has track_running_stats=False: its output depends on '
                             'the batch, which cannot be exported. Train it with True')
    if what == 'backbone':
        return Features(getattr(model, 'backbone', model)).eval()
    if getattr(model, 'neck', None) is None:
        raise ValueError(f'{type(model).__name__} has no neck: export its backbone')
    if what == 'neck':
        return Features(model.backbone, model.neck).eval()
    if hasattr(model, 'rpn_head') and hasattr(model, 'roi_head'):
        return TwoStageDetector(model).eval()
    if hasattr(model, 'decode_head'):
        return Segmentor(model).eval()
    raise ValueError(f'{type(model).__name__} cannot be exported whole: expected a two-stage '
                     'detector such as MaskRCNN, or an EncoderDecoder. Export its backbone and '
                     'neck (what=\'neck\')')


class Traceable(nn.Module):
    """A module that maps an image to a tuple of tensors, named ``output_names``."""

    output_names: Tuple[str, ...] = ()


class Features(Traceable):
    """Feature maps of a backbone, or of a backbone and its neck, finest first."""

    def __init__(self, backbone: nn.Module, *neck: nn.Module):
        super().__init__()
        self.modules_in_order = nn.ModuleList([backbone, *neck])
        count = neck[0].num_outs if neck else len(backbone.out_indices)
        self.output_names = tuple(f'feature{i}' for i in range(count))

    def forward(self, image: Tensor) -> Tuple[Tensor, ...]:
        for module in self.modules_in_order:
            image = module(image)
        return tuple(image)


class Segmentor(Traceable):
    """Logits (B, classes, H, W) of an mmseg ``EncoderDecoder`` with test mode 'whole'."""

    output_names = ('logits', )

    def __init__(self, model: nn.Module):
        super().__init__()
        if model.test_cfg.get('mode') != 'whole':
            raise ValueError(f'test_cfg.mode is {model.test_cfg.get("mode")!r}: a whole segmentor '
                             "can be exported with 'whole' only")
        from mmseg.models.utils import Upsample
        self.backbone, self.neck, self.head = model.backbone, model.neck, model.decode_head
        for parent in [*self.head.modules()]:
            for name, child in parent.named_children():
                if type(child) is Upsample and not child.size:
                    # mmseg's Upsample computes the size as a number, which a trace would keep.
                    setattr(parent, name, nn.Upsample(
                        scale_factor=child.scale_factor, mode=child.mode,
                        align_corners=child.align_corners))

    def forward(self, image: Tensor) -> Tuple[Tensor, ...]:
        logits = self.head(self.neck(self.backbone(image)))
        return (nn.functional.interpolate(logits, size=image.shape[2:], mode='bilinear',
                                          align_corners=self.head.align_corners), )


class TwoStageDetector(Traceable):
    """Detections of an mmdet Faster or Mask R-CNN in one image (1, 3, H, W), best first.

    Outputs: boxes (N, 4) as x1, y1, x2, y2 in px of the image; scores (N); labels (N), the
    classes' indices; and, with a mask head, masks (N, 28, 28), the probability of each cell of
    a grid over the box.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.backbone, self.neck = model.backbone, model.neck
        self.rpn, self.roi = model.rpn_head, model.roi_head
        _check_detector(self.rpn, self.roi)
        self.output_names = ('boxes', 'scores', 'labels') + ('masks', ) * self.roi.with_mask
        for i, base in enumerate(self.rpn.anchor_generator.base_anchors):
            self.register_buffer(f'anchors{i}', base, persistent=False)

    def forward(self, image: Tensor) -> Tuple[Tensor, ...]:
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
        return boxes[_grouped_nms(boxes, scores, levels, cfg, size)]

    def _classify(self, features: Sequence[Tensor], regions: Tensor, size: Tensor
                  ) -> Tuple[Tensor, Tensor, Tensor]:
        """Return boxes (N, 4), scores (N) and labels (N) of the objects in the regions (R, 4)."""
        cfg, head = self.roi.test_cfg, self.roi.bbox_head
        logits, deltas = head(_pool(self.roi.bbox_roi_extractor, features, _one_more(regions)))
        scores = logits.softmax(1)[:-1, :-1]  # the last class is background
        region, labels = (scores > cfg.score_thr).nonzero().unbind(1)
        deltas = (deltas[region] if head.reg_class_agnostic
                  else deltas.unflatten(1, (-1, 4))[region, labels])
        boxes = _decode(head.bbox_coder, regions[region], deltas, size)
        scores = scores[region, labels]
        keep = _grouped_nms(boxes, scores, labels, cfg, size)
        return boxes[keep], scores[keep], labels[keep]

    def _segment(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Return the mask probabilities (N, 28, 28) of each box's class."""
        extractor = self.roi.mask_roi_extractor or self.roi.bbox_roi_extractor
        logits = self.roi.mask_head(_pool(extractor, features, _one_more(boxes)))[:-1]
        if self.roi.mask_head.class_agnostic:
            return logits[:, 0].sigmoid()
        return logits[torch.arange(labels.shape[0], device=labels.device), labels].sigmoid()


def _check_detector(rpn: nn.Module, roi: nn.Module) -> None:
    """Raise a ValueError where a part computes something else than TwoStageDetector does."""
    for name, value, expected in _settings(rpn, roi):
        if value != expected:
            raise ValueError(f'{name} is {value!r}: a whole detector can be exported with '
                             f"{expected!r} only. Export its neck (what='neck')")


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
        yield 'test_cfg.nms.type', cfg.nms.get('type', 'nms'), 'nms'
    masks = [roi.mask_roi_extractor] if roi.with_mask else []
    for extractor in [roi.bbox_roi_extractor, *masks]:
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


def _one_more(boxes: Tensor) -> Tensor:
    """Return boxes (R + 1, 4): some runtimes cannot run a head on zero regions."""
    return torch.cat([boxes, boxes.new_tensor([[0., 0., 1., 1.]])])


def _decode(coder, boxes: Tensor, deltas: Tensor, size: Tensor) -> Tensor:
    """Return boxes (R, 4) moved and scaled by deltas (R, 4), as ``DeltaXYWHBBoxCoder`` does."""
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    limit = abs(math.log(16 / 1000))
    extent = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + deltas[:, :2] * extent
    half = extent * deltas[:, 2:].clamp(-limit, limit).exp() / 2
    decoded = torch.cat([centre - half, centre + half], 1)
    return torch.minimum(decoded.clamp(min=0), size) if coder.clip_border else decoded


def _grouped_nms(boxes: Tensor, scores: Tensor, groups: Tensor, cfg, size: Tensor) -> Tensor:
    """Return the indices of the boxes that nms within each group keeps, best first."""
    if not cfg.nms.get('class_agnostic', False):
        # Offsets larger than the image keep boxes of different groups from overlapping.
        boxes = boxes + (groups.to(boxes) * (size.max() + 1))[:, None]
    keep = nms(boxes, scores, cfg.nms.iou_threshold)
    return keep[:cfg.max_per_img] if cfg.max_per_img > 0 else keep


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
