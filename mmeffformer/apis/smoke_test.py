"""Smoke test of a config of mmdet or mmseg: a training step and a prediction on random images."""
from copy import deepcopy
from typing import Any, Dict, List, Sequence, Tuple

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import MODELS
from mmengine.structures import PixelData

from ..utils.config import class_name, iter_dicts, model_cfg, preprocessor_cfg
from .swap import find_target


def build_model(cfg: Config) -> BaseModel:
    """Build the model of a config (of a tracker the detector) with random weights.

    It pads images to multiples of 32 px rather than to the crop of the config.
    """
    cfg = deepcopy(cfg)
    cfg.model = model_cfg(cfg)
    target = find_target(cfg)
    for part in iter_dicts(target):
        part.pop('pretrained', None)
        if 'Pretrained' in str(part.get('init_cfg')):
            part['init_cfg'] = None
    if target is not cfg.model:  # the preprocessor of the tracker makes batches of videos
        target.data_preprocessor = dict(type='mmdet.DetDataPreprocessor', mean=[0.], std=[255.],
                                        pad_size_divisor=32, pad_mask=True)
    target.data_preprocessor.pop('batch_augments', None)
    if target.data_preprocessor.pop('size', None):
        target.data_preprocessor.size_divisor = 32
    with MODELS.switch_scope_and_registry(cfg.default_scope) as registry:
        model = revert_sync_batchnorm(registry.build(target))
        model.init_weights()
    return model


def train_and_predict(cfg: Config, model: BaseModel,
                      size: int = 128) -> Tuple[Dict[str, float], List[Any]]:
    """Train a step on two random images and predict on one.

    Args:
        cfg: The config of the model.
        model: The model that :func:`build_model` returned for it.
        size: Height and width of the images, px; the image to predict on is narrower.

    Returns:
        The losses by name, and the library's predictions.

    Raises:
        RuntimeError: A loss is not finite, or a parameter of the backbone that requires a
            gradient gets none.
    """
    with MODELS.switch_scope_and_registry(cfg.default_scope):
        make_batch = _detection if cfg.default_scope == 'mmdet' else _segmentation
        model.train()
        # Set by a runner; TOOD's losses depend on it.
        MessageHub.get_current_instance().update_info('epoch', 0)
        data = model.data_preprocessor(make_batch(cfg, [(size, size)] * 2), training=True)
        loss, losses = model.parse_losses(model(**data, mode='loss'))
        loss.backward()
        infinite = [name for name, value in losses.items() if not value.isfinite()]
        if infinite:
            raise RuntimeError(f'{", ".join(infinite)}: not finite')
        idle = [name for name, parameter in model.backbone.named_parameters()
                if parameter.requires_grad and parameter.grad is None]
        if idle:
            raise RuntimeError(f'{len(idle)} parameters of the backbone without a gradient: '
                               f'{", ".join(idle[:3])}')
        model.eval()
        with torch.no_grad():
            predictions = model.test_step(make_batch(cfg, [(size, size * 3 // 4)]))
    return {name: value.item() for name, value in losses.items()}, predictions


def _detection(cfg: Config, sizes: Sequence[Tuple[int, int]]) -> dict:
    from mmdet.testing import demo_mm_inputs, demo_mm_proposals, demo_track_inputs
    shapes = [[find_target(cfg).backbone.get('in_channels', 3), *size] for size in sizes]
    with_mask = any(part.get('with_mask', 'Panoptic' in class_name(part))
                    for part in iter_dicts(cfg.get('train_dataloader')))
    if find_target(cfg) is cfg.model and 'Track' in class_name(preprocessor_cfg(cfg) or {}):
        return demo_track_inputs(batch_size=1, num_frames=2, image_shapes=shapes[:1],
                                 num_classes=2, with_mask=with_mask)
    data = demo_mm_inputs(len(shapes), shapes, num_items=[3] * len(shapes), num_classes=2,
                          with_mask=with_mask, with_semantic=True)
    for sample in data['data_samples']:
        sample.gt_instances.labels %= _num_classes(cfg)
        sample.set_metainfo(dict(scale_factor=(1., 1.)))
    if class_name(cfg.model) == 'FastRCNN':
        for sample, proposals in zip(data['data_samples'], demo_mm_proposals(shapes, 100)):
            sample.proposals = proposals
    return data


def _segmentation(cfg: Config, sizes: Sequence[Tuple[int, int]]) -> dict:
    from mmseg.structures import SegDataSample
    generator = torch.Generator().manual_seed(0)
    images, samples, channels = [], [], find_target(cfg).backbone.get('in_channels', 3)
    for size in sizes:
        labels = torch.randint(_num_classes(cfg), (1, *size), generator=generator)
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=labels),
                                     metainfo=dict(img_shape=size, ori_shape=size)))
        images.append(torch.randint(256, (channels, *size), generator=generator,
                                    dtype=torch.uint8))
    return dict(inputs=images, data_samples=samples)


def _num_classes(cfg: Config) -> int:
    """Return a number of classes, at most 2, that every head of the model has."""
    return min([2, *(part['num_classes'] for part in iter_dicts(find_target(cfg))
                     if isinstance(part.get('num_classes'), int))])
