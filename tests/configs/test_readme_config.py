"""The README's code for an existing config, used in detectors of mmdet."""
import re

import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

from mmeffformer.utils.registry import MODELS


@pytest.fixture
def readme(repo_root):
    """Return the first Python code below the README's heading."""
    text = (repo_root / 'README.md').read_text()
    return re.search(r'^## In your own config$.*?^```python\n(.*?)^```', text, re.M | re.S)[1]


def test_channels_in_the_readme(readme):
    cfg = Config.fromstring(readme, '.py')
    cfg.model.backbone.init_cfg = None
    cfg.model.backbone.pop('_delete_')
    assert list(MODELS.build(cfg.model.backbone).out_channels) == cfg.model.neck.in_channels


@pytest.mark.parametrize('base, loss_names', [
    ('retinanet/retinanet_r50_fpn_1x_coco.py', {'loss_cls', 'loss_bbox'}),
    ('faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
     {'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'loss_bbox'})])
def test_detector_with_the_readmes_backbone(base, loss_names, readme, tmp_path):
    config = tmp_path / 'mine.py'
    config.write_text(f"_base_ = 'mmdet::{base}'\n{readme}")
    cfg = Config.fromfile(config)
    assert cfg.model.backbone.type == 'mmeffformer.EfficientFormer'
    assert not {'depth', 'style', '_delete_'} & {*cfg.model.backbone}
    assert cfg.model.neck.type == 'FPN' and cfg.model.neck.out_channels == 256
    assert cfg.model.backbone.init_cfg.type == 'Pretrained'
    cfg.model.backbone.init_cfg = None  # tests download nothing

    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {key: value.clone() for key, value in model.named_parameters()}
    batch = demo_mm_inputs(2, [[3, 64, 96], [3, 70, 90]], num_items=[3, 2], num_classes=80)
    losses = model.train().train_step(batch, optimizer)
    assert loss_names < {*losses}
    assert all(value.isfinite() for value in losses.values())
    assert losses['loss'] > 0
    changed = {key for key, value in model.named_parameters()
               if not torch.equal(value, before[key])}
    assert {'backbone.stem.0.conv.weight', 'backbone.stages.3.blocks.0.layer_scale1',
            'backbone.out_norms.3.weight', 'neck.lateral_convs.0.conv.weight'} < changed
