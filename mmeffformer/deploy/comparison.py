"""Comparison of exported files with PyTorch, output by output.

Shapes: H rows, W columns, N detections.
"""
import math
from copy import copy
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from .graphs import input_channels, window_logits
from .inputs import MIN_SIZE

Outputs = Dict[str, Tensor]

# Largest error of an output. In fp32 relative to the largest value: rounding gives 1e-6 to 1e-4, a
# graph that computes something else is far beyond. In other precisions the norm of the errors
# relative to that of the values: see docs/guides/deploy.md for what rounding gives.
TOLERANCES = dict(fp32=1e-3, fp16=1e-2, bf16=5e-2, int8=0.1)
# Rounding decides whether a box is among the best 1000, or overlaps by just the threshold of
# nms, and then another box is kept. Trained detectors have few such detections. In less than fp32
# those near the threshold come and go, and where a box moves, its mask moves along.
DETECTIONS_TOLERANCES = dict(fp32=2e-2, fp16=2e-2, bf16=0.1, int8=0.2)
BOXES_AND_MASKS = ('boxes', 'masks', 'mask_logits')
ROUNDED_IOU = 0.5
FAR = 1e3  # a distance beyond any limit


class MismatchError(ValueError):
    """An exported file does not compute what PyTorch computes."""


class Comparison(NamedTuple):
    """The comparison of one output over all inputs.

    Attributes:
        output: Name of the output; 'detections' compares the sets of detections.
        error: Largest error relative to the largest value of PyTorch; in less than fp32 the
            Euclidean norm of errors relative to that of values. Of 'detections', the share of
            those of either that have no counterpart in the other; in less than fp32 the sum of
            differences in score, where a missing detection scores 0, relative to the sum of
            scores.
        tolerance: Largest ``error`` of a file that is kept.
        inputs: Number of inputs.
    """

    output: str
    error: float
    tolerance: float
    inputs: int

    @property
    def matches(self) -> bool:
        """Return whether the error is within the tolerance."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        return (f'{self.output}: error {self.error:.2g}, tolerance {self.tolerance:g}, over '
                f'{self.inputs} inputs')


def compare(model: nn.Module, what: str, run: Callable[[Tensor], Outputs],
            inputs: Sequence[Tensor], precision: str = 'fp32') -> List[Comparison]:
    """Compare the outputs of a model of mmdet or mmseg with those of an exported file.

    Detections may come in any order. The counterpart of a detection has the same label and,
    within the tolerance, the same box and score; in less than fp32 an overlapping box (IoU 0.5)
    and any score.

    Args:
        model: The model, not fused.
        what: The part exported, see :func:`mmeffformer.deploy.graphs.traceable`.
        run: Maps a float image (1, 3, H, W) to outputs by name.
        inputs: Images to compare on.
        precision: One of ``TOLERANCES``, in which ``run`` computes.

    Raises:
        MismatchError: An output has another shape.
    """
    rounded = precision != 'fp32'
    found: Dict[str, List[Tuple[float, float]]] = {}  # error and reference of each input
    for image in inputs:
        expected, actual = expected_outputs(model, what, image), run(image)
        if 'boxes' in expected:
            expected, actual, errors = _match(expected, actual, max(image.shape[2:]), rounded)
            found.setdefault('detections', []).append(errors)
        for name, value in expected.items():
            found.setdefault(name, []).append(_errors(name, value, actual[name], image, rounded))
    compared = []
    for name, pairs in found.items():
        tolerance = TOLERANCES[precision]
        if name == 'detections' or rounded and name in BOXES_AND_MASKS:
            tolerance = DETECTIONS_TOLERANCES[precision]
        if name == 'detections':
            error, reference = map(sum, zip(*pairs))
        else:
            error, reference = (math.hypot(*each) if rounded else max(each)
                                for each in zip(*pairs))
        compared.append(Comparison(name, error / max(reference, 1e-6), tolerance, len(inputs)))
    return compared


def check_matches(compared: Sequence[Comparison], subject: str) -> None:
    """Raise a MismatchError that lists the outputs which do not match, if there are any.

    Its message starts with ``subject``, what computed them.
    """
    wrong = [str(each) for each in compared if not each.matches]
    if wrong:
        raise MismatchError(f'{subject} does not compute what PyTorch computes.\n'
                            + '\n'.join(wrong))


def _errors(name: str, expected: Tensor, actual: Tensor, image: Tensor, rounded: bool
            ) -> Tuple[float, float]:
    """Return error and reference of one output for one image, see :class:`Comparison`."""
    if expected.shape != actual.shape:
        raise MismatchError(f'{name} for an image of {image.shape[2]} x {image.shape[3]} px has '
                            f'shape {tuple(actual.shape)}: expected {tuple(expected.shape)}')
    if not expected.numel():
        return 0., 0.
    expected = expected.double()
    # nan would lose every comparison, and so pass as no error.
    error = (actual.double() - expected).nan_to_num(nan=math.inf)
    return tuple((value.norm() if rounded else value.abs().max()).item()
                 for value in (error, expected))


def _match(expected: Outputs, actual: Outputs, side: int, rounded: bool
           ) -> Tuple[Outputs, Outputs, Tuple[float, float]]:
    """Return the detections that have a counterpart, in the same order, and error and reference
    of 'detections', see :class:`Comparison`."""
    from scipy.optimize import linear_sum_assignment
    if rounded:
        distance, limit = 1 - box_iou(expected['boxes'], actual['boxes']), 1 - ROUNDED_IOU
    else:
        distance = (expected['boxes'][:, None] - actual['boxes']).abs().amax(2) / side
        distance = torch.maximum(
            distance, (expected['scores'][:, None] - actual['scores']).abs())
        limit = TOLERANCES['fp32']
    distance = distance + FAR * (expected['labels'][:, None] != actual['labels'])
    # nan counts as a distance beyond the limit.
    distance = distance.double().nan_to_num(FAR).clamp(max=FAR)
    rows, columns = map(torch.as_tensor, linear_sum_assignment(distance.numpy()))
    near = distance[rows, columns] <= limit
    rows, columns = rows[near], columns[near]
    weights = [found['scores'] if rounded else torch.ones_like(found['scores'])
               for found in (expected, actual)]
    reference = sum(weight.sum().item() for weight in weights)
    error = reference - 2 * torch.minimum(weights[0][rows], weights[1][columns]).sum().item()
    names = [name for name in expected if not rounded or name in BOXES_AND_MASKS]
    return ({name: expected[name][rows] for name in names},
            {name: actual[name][columns] for name in names}, (error, reference))


@torch.no_grad()
def expected_outputs(model: nn.Module, what: str, image: Tensor) -> Outputs:
    """Return the outputs that mmdet or mmseg computes, under the names of the exported ones."""
    if what != 'model':
        features = getattr(model, 'backbone', model)(image)
        features = model.neck(features) if what == 'neck' else features
        return {f'feature{i}': feature for i, feature in enumerate(features)}
    if hasattr(model, 'encode_decode'):
        return dict(logits=window_logits(model, image))
    from mmdet.structures import DetDataSample
    size = tuple(image.shape[2:])
    sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size,
                                         batch_input_shape=size, scale_factor=(1., 1.)))
    compute = _two_stage_outputs if hasattr(model, 'roi_head') else _one_stage_outputs
    return compute(model, model.extract_feat(image), sample)


def size_divisor(model: nn.Module, what: str) -> int:
    """Return 32 if the sides of images for a part must be multiples of 32 px, else 1.

    Necks such as RTMDet's double the size of a coarse feature map to add it to a finer one, which
    fits only if no stage has rounded up.
    """
    try:
        expected_outputs(model, what, torch.zeros(1, input_channels(model), MIN_SIZE + 1,
                                                  3 * MIN_SIZE - 1))
    except Exception:  # if not because of the size, comparing raises it again
        return MIN_SIZE
    return 1


def _two_stage_outputs(model: nn.Module, features: Sequence[Tensor], sample) -> Outputs:
    from mmdet.structures.bbox import bbox2roi
    roi = model.roi_head
    proposals = model.rpn_head.predict(features, [sample], rescale=False)
    found, = roi.predict_bbox(features, [sample.metainfo], proposals, roi.test_cfg, rescale=False)
    outputs = dict(boxes=found.bboxes, scores=found.scores, labels=found.labels)
    if roi.with_mask:
        extractor, head = roi.mask_roi_extractor, roi.mask_head
        masks = head(extractor(features[:extractor.num_inputs], bbox2roi([found.bboxes])))
        classes = torch.zeros_like(found.labels) if head.class_agnostic else found.labels
        outputs['masks'] = masks[torch.arange(len(found)), classes].sigmoid()
    return outputs


def _one_stage_outputs(model: nn.Module, features: Sequence[Tensor], sample) -> Outputs:
    head, logits = copy(model.bbox_head), []
    if with_masks := hasattr(head, '_mask_predict_by_feat_single'):
        def record(*args: Tensor) -> Tensor:
            logits.append(model.bbox_head._mask_predict_by_feat_single(*args))
            return logits[0]

        head._mask_predict_by_feat_single = record
    found, = head.predict(features, [sample], rescale=False)
    outputs = dict(boxes=found.bboxes, scores=found.scores, labels=found.labels)
    if with_masks:  # mmdet computes no masks of no detections
        outputs['mask_logits'] = logits[0] if logits else features[0][0, :0]
    return outputs
