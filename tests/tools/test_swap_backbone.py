"""The tools that swap the backbone of configs of mmdet and mmseg."""
import json

import pytest
import torch
from mmengine.config import Config
from support.helpers import run_tool as run

from mmeffformer import swap_backbone
from mmeffformer.datasets import write_coco

RETINANET = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'


@pytest.fixture(scope='module')
def arch(tmp_path_factory):
    """A JSON file with a tiny V2."""
    path = tmp_path_factory.mktemp('arch') / 'tiny.json'
    path.write_text(json.dumps(dict(type='EfficientFormerV2', widths=[16, 16, 24, 32],
                                    depths=[1, 1, 1, 1], attention_blocks=[0, 0, 0, 1])))
    return path


def test_written_config_trains(arch, tmp_path):
    out, data = tmp_path / 'new' / 'retinanet.py', tmp_path / 'coco'
    printed = run('tools/swap_backbone.py', RETINANET, '--arch', arch, '--out', out,
                  '--options', 'drop_path_rate=0.1')
    assert f'{out} is written' in printed
    assert '_base_ =' not in out.read_text()
    cfg = Config.fromfile(out)
    assert cfg.default_scope == 'mmdet' and cfg.custom_imports.imports == ['mmeffformer']
    assert cfg.model.backbone.type == 'mmeffformer.EfficientFormerV2'
    assert cfg.model.backbone.drop_path_rate == .1
    assert cfg.model.neck.in_channels == [16, 24, 32]

    write_coco(data, train=2, val=1, size=(64, 64), coco2017=True, progress=False)
    options = [f'{split}_dataloader.{key}' for split in ('train', 'val') for key in (
        'num_workers=0', 'persistent_workers=False')]
    work_dir = tmp_path / 'work'
    run('tools/train.py', out, '--data-root', data, '--work-dir', work_dir, '--cfg-options',
        *options, 'train_cfg.max_epochs=1', 'train_dataloader.dataset.pipeline.2.scale=(64,64)',
        'val_dataloader.dataset.pipeline.1.scale=(64,64)')
    weights = torch.load(work_dir / 'epoch_1.pth', map_location='cpu', weights_only=False)
    assert weights['state_dict']['neck.lateral_convs.0.conv.weight'].shape == (256, 16, 1, 1)
    assert weights['state_dict']['backbone.stages.2.downsample.norm.bias'].shape == (24,)


def test_config_of_mmseg_and_of_a_path(tmp_path):
    first, second = tmp_path / 'first.py', tmp_path / 'second.py'
    run('tools/swap_backbone.py', 'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
        '--arch', 's1', '--out', first)
    cfg = Config.fromfile(first)
    assert cfg.default_scope == 'mmseg'
    assert cfg.model.decode_head.in_channels == [32, 48, 120, 224]
    run('tools/swap_backbone.py', first, '--arch', 'l1', '--out', second)
    assert Config.fromfile(second).to_dict() == swap_backbone(cfg, 'l1').to_dict()
    assert Config.fromfile(second).model.decode_head.in_channels == [48, 96, 224, 448]


def test_results_are_written_as_a_table(tmp_path):
    page = tmp_path / 'page.md'
    page.write_text('| mmdet/atss | `a`, `b` |  |\n| mmdet/yolof | none |  |\n')
    run('tools/dev/check_swaps.py', '--arch', 's0', '--only', 'mmdet/yolof', 'mmdet/cornernet',
        '--out', page)
    text, _, table = page.read_text().partition('|---|---|---|\n')
    assert text.startswith('# Swapped configs\n') and 'The\nbackbone becomes S0.' in text
    assert '\n4 configs: 3 train and predict, 1 refused, 0 fails, 0 no verdict.\nTried' in text
    rows = table.splitlines()
    assert rows[0] == '| mmdet/atss | `a`, `b` |  |'
    assert rows[1].startswith('| mmdet/cornernet |  | `cornernet_hourglass104_8xb6-210e-mstest_'
                              'coco` refused: the backbone HourglassNet has outputs of strides 4')
    assert rows[2] == '| mmdet/yolof | `yolof_r50-c5_8xb8-1x_coco` |  |'
