"""Replacement of the backbone of any detector or segmentor of mmdet or mmseg.

The channels that neck and heads expect follow from the old backbone. It is built and run on the
meta device, which needs no memory and gives the channels and the stride of each of its outputs,
its *levels*. Each level is matched with a stage of EfficientFormer, whose channels
replace the old ones in the configs of neck and heads.

In this package the *target* is the model, or the part of it, that contains the backbone.
"""
from copy import deepcopy
from typing import Any, Tuple, Union

import torch
from mmengine.config import Config

from ...utils.config import find_scope, name_types
from ...utils.registry import MODELS
from .channels import adapt_channels, check_neck, check_swappable
from .config import (
    add_import,
    drop_old_weights,
    drop_optimizer_options,
    find_target,
    image_channels,
    load_model,
    log_change,
    other_images,
    set_preprocessor,
)
from .probe import probe_levels

__all__ = ['find_target', 'swap_backbone']


def swap_backbone(cfg: Config, arch: Union[str, dict], **options: Any) -> Config:
    """Return a config of mmdet or mmseg with an EfficientFormer as its backbone.

    The backbone is that of this project's config for the arch and library: ImageNet weights,
    bias grid (25 in mmdet, 16 in mmseg), norms. Neck and heads get its channels, the preprocessor
    ImageNet's mean and std in RGB and padding to a multiple of 32 px. Weights of the old model
    (``pretrained``, ``load_from``, the model's ``init_cfg``), optimizer options for parts of the
    old backbone and its layer decay are dropped. The backbone returns only the stages that neck
    and heads read (``out_indices``), so every parameter gets a gradient. The rest is unchanged,
    and so is ``cfg`` itself.

    In mmdet a level keeps its stride, on which anchors and RoI extractors depend. In mmseg the
    levels of a dilated or single-scale backbone are spread, the last at stride 32. For images of
    other than 3 channels, with values beyond 255 or normalised in the pipeline, ``in_channels``,
    mean and std stay, and the backbone starts from random weights. Log messages report both.

    Args:
        cfg: A config of mmdet or mmseg, also one that imports its types.
        arch: 'l1', 'l3', 'l7' for EfficientFormer, 's0', 's1', 's2', 'l' for EfficientFormerV2,
            or a dict (:class:`mmeffformer.models.Arch`), which starts from random weights.
        options: Further arguments of the backbone, as ``frozen_stages=1``. With a dict
            ``type='EfficientFormerV2'`` makes it a V2.

    Raises:
        ValueError: The arch is unknown, or a part of the config does not work with the backbone;
            the message names the part and the reason.
    """
    cfg = deepcopy(cfg)
    name_types(cfg)
    scope = find_scope(cfg)
    target = find_target(cfg)
    images = other_images(cfg, target)
    if images:
        log_change(f'the images have {images}, so the preprocessor keeps mean, std and the order '
                   'of channels, and the backbone starts from random weights')
        options = dict(in_channels=image_channels(target.backbone), init_cfg=None) | options
    new = load_model(arch, scope, options)
    widths = _widths(new.backbone)
    check_swappable(target)
    levels = probe_levels(target.backbone, scope)
    stages = adapt_channels(target, levels, widths, scope)
    check_neck(target, scope)
    target.backbone = new.backbone | dict(out_indices=stages)
    for part in (cfg, cfg.model, target):
        if part.get('data_preprocessor'):
            set_preprocessor(part.data_preprocessor, {} if images else new.data_preprocessor)
    drop_old_weights(cfg, target)
    drop_optimizer_options(cfg)
    add_import(cfg)
    return cfg


def _widths(backbone: dict) -> Tuple[int, ...]:
    """Return the channels of all stages of the new backbone."""
    try:
        with torch.device('meta'):
            return MODELS.build(backbone | dict(out_indices=(0, 1, 2, 3), init_cfg=None)
                                ).out_channels
    except TypeError as error:
        raise ValueError(f'the backbone does not take these options: {error}') from error
