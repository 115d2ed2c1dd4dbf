"""Every config of the project: composed, as the paper says, built, stepped and predicting."""
from pathlib import Path

import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

from mmeffformer.registry import MODELS

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
OPENMMLAB = 'https://download.openmmlab.com/mmclassification/v0/efficientformer/'

# arch: channels of the neck's inputs, ImageNet weights, initial layer scale
DETECTION = {
    'l1': ([48, 96, 224, 448], 'efficientformer-l1_3rdparty_in1k_20220915-cc3e1ac6.pth', 1e-5),
    'l3': ([64, 128, 320, 512], 'efficientformer-l3_3rdparty_in1k_20220915-466793d6.pth', 1e-5),
    'l7': ([96, 192, 384, 768], 'efficientformer-l7_3rdparty_in1k_20220915-185e30af.pth', 1e-6),
}
EXPECTED = {f'detection/maskrcnn_effformer_{arch}.py' for arch in DETECTION} | {
    'demo/maskrcnn_effformer_l1_shapes.py'}


def test_every_config_is_known_to_the_tests():
    found = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob('*.py')
             if '_base_' not in path.parts}
    assert found == EXPECTED


@pytest.mark.parametrize('name', sorted(EXPECTED))
def test_config_trains_and_predicts(name):
    cfg = Config.fromfile(CONFIGS / name)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    classes = cfg.model.roi_head.bbox_head.num_classes
    assert classes == len(cfg.train_dataloader.dataset.get('metainfo', {}).get(
        'classes', range(80)))
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    torch.manual_seed(0)
    batch = demo_mm_inputs(2, [[3, 70, 96], [3, 96, 64]], num_items=[3, 2], num_classes=classes,
                           with_mask=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    losses = model.train().train_step(batch, optimizer)
    assert {'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'loss_bbox', 'loss_mask'} < {*losses}
    assert all(value.isfinite() for value in losses.values())
    changed = {key for key, value in model.state_dict().items()
               if not torch.equal(value, before[key])}
    assert {'backbone.stem.0.conv.weight', 'backbone.stages.3.blocks.0.layer_scale1',
            'backbone.out_norms.0.weight', 'neck.lateral_convs.0.conv.weight'} < changed

    model.test_cfg.rcnn.score_thr = 0.
    torch.manual_seed(0)
    batch = demo_mm_inputs(1, [[3, 70, 96]], num_classes=classes)
    result, = model.eval().test_step(batch)
    found = result.pred_instances
    assert 0 < len(found) <= 100
    assert found.bboxes.isfinite().all() and found.labels.max() < classes
    assert found.masks.shape == (len(found), *result.ori_shape)


@pytest.mark.parametrize('arch', DETECTION)
def test_detection_recipe_is_the_papers(arch):
    cfg = Config.fromfile(CONFIGS / f'detection/maskrcnn_effformer_{arch}.py')
    channels, weights, layer_scale = DETECTION[arch]
    backbone = cfg.model.backbone
    assert (backbone.type, backbone.arch) == ('mmeffformer.EfficientFormer', arch)
    assert backbone.bias_grid == 25
    assert backbone.out_norm_cfg == dict(type='GN', num_groups=1)
    assert backbone.init_cfg == dict(type='Pretrained', checkpoint=OPENMMLAB + weights)
    assert backbone.get('layer_scale_init_value', 1e-5) == layer_scale
    assert cfg.model.neck.in_channels == channels
    assert tuple(channels) == MODELS.build(backbone).out_channels

    assert cfg.optim_wrapper == dict(
        type='OptimWrapper', optimizer=dict(type='AdamW', lr=2e-4, weight_decay=1e-4))
    warmup, steps = cfg.param_scheduler
    assert (warmup.type, warmup.start_factor, warmup.end) == ('LinearLR', 1e-6, 500)
    assert (steps.milestones, steps.gamma) == ([8, 11], 0.1)
    assert cfg.train_cfg.max_epochs == 12
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
    for pipeline in (cfg.train_pipeline, cfg.test_pipeline):
        resize, = (step for step in pipeline if step.type == 'Resize')
        assert resize.scale == (1333, 800) and resize.keep_ratio
    flip, = (step for step in cfg.train_pipeline if step.type == 'RandomFlip')
    assert flip.prob == 0.5
    assert cfg.model.data_preprocessor.pad_size_divisor == 32
    assert cfg.val_evaluator.metric == ['bbox', 'segm']
