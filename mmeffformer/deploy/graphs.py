"""Models and their parts as traceable graphs, for images of any size.

Shapes: B batch, C channels, H rows, W columns.
"""
from typing import Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .one_stage import OneStageDetector, is_one_stage
from .tracing import Traceable
from .two_stage import TwoStageDetector

PARTS = ('backbone', 'neck', 'model')


def traceable(model: nn.Module, what: str = 'model') -> Traceable:
    """Return a part of a detector or segmentor, or the whole, as a module that can be traced.

    It shares the modules of ``model`` and sets them to eval mode. It maps normalised float
    (B, C, H, W) to a tuple of tensors, whose names are its ``output_names``.

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
    if what == 'neck':
        if getattr(model, 'neck', None) is None:
            raise ValueError(f'{type(model).__name__} has no neck: export its backbone')
        return Features(model.backbone, model.neck).eval()
    if hasattr(model, 'rpn_head') and hasattr(model, 'roi_head'):
        return TwoStageDetector(model).eval()
    if is_one_stage(model):
        return OneStageDetector(model).eval()
    if hasattr(model, 'encode_decode'):
        return Segmentor(model).eval()
    raise ValueError(f'{describe_part(model, "model")} cannot be exported: expected a '
                     'detector such as MaskRCNN, RetinaNet or RTMDet, or a segmentor. Export its '
                     "backbone or neck (what='backbone' or 'neck')")


def input_channels(model: nn.Module) -> int:
    """Return the channels of a model's input: those of its first convolution."""
    return next(module.in_channels for module in model.modules()
                if isinstance(module, nn.Conv2d))


def describe_part(model: nn.Module, what: str) -> str:
    """Return name and type of a part of PARTS, for 'model' those of the heads after the neck."""
    parts = [(name, part) for name, part in model.named_children()
             if name == what or what == 'model' and name.endswith('head')
             and not name.startswith('auxiliary')] or [(what, model)]
    return ', '.join(f'{name} of type {type(each).__name__}' for name, part in parts
                     for each in (part if isinstance(part, nn.ModuleList) else [part]))


class Features(Traceable):
    """Feature maps of a backbone, or of a backbone and its neck, finest first."""

    def __init__(self, backbone: nn.Module, *neck: nn.Module):
        super().__init__()
        self.modules_in_order = nn.ModuleList([backbone, *neck]).eval()
        last = neck[0] if neck else backbone
        if (count := getattr(last, 'num_outs', None)) is None:
            count = len(getattr(last, 'out_indices', ())) or len(self.compute(
                torch.zeros(1, input_channels(backbone), 320, 320)))  # necks of SSD and YOLOF
        self.output_names = tuple(f'feature{i}' for i in range(count))

    def compute(self, image: Tensor) -> Tuple[Tensor, ...]:
        for module in self.modules_in_order:
            image = module(image)
        return tuple(image)


class Segmentor(Traceable):
    """Logits (B, classes, H, W) of an mmseg segmentor, by its own ``encode_decode``.

    With test mode 'slide' they are those of one window.
    """

    output_names = ('logits', )

    def __init__(self, model: nn.Module):
        super().__init__()
        from mmseg.models.utils import Upsample
        self.model = model
        for parent in [*model.modules()]:
            for name, child in parent.named_children():
                if type(child) is Upsample and not child.size:
                    # mmseg's Upsample computes the size as a number, which a trace would keep.
                    setattr(parent, name, nn.Upsample(
                        scale_factor=child.scale_factor, mode=child.mode,
                        align_corners=child.align_corners))

    def compute(self, image: Tensor) -> Tuple[Tensor, ...]:
        return (window_logits(self.model, image), )


def window_logits(model: nn.Module, image: Tensor) -> Tensor:
    """Return the logits (B, classes, H, W) of an mmseg segmentor, not slid, without sigmoid."""
    return model.encode_decode(image, [dict(img_shape=image.shape[2:])] * image.shape[0])
