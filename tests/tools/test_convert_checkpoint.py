"""tools/convert_checkpoint.py."""
import re
from pathlib import Path

import torch
from support.helpers import run_tool
from support.official import authors_checkpoint, official

from mmeffformer.datasets import write_ade20k

CONFIG = 'configs/segmentation/semfpn_effformer_l1.py'


def test_a_segmentor_is_converted_and_evaluated(tmp_path):
    source = authors_checkpoint('seg_v1_l1', tmp_path)
    printed = run_tool('tools/convert_checkpoint.py', source, '--config', CONFIG,
                       '--out', tmp_path / 'checkpoints')
    path, = (tmp_path / 'checkpoints').iterdir()
    assert re.fullmatch(r'semfpn_effformer_l1-[0-9a-f]{8}.pth', path.name)
    assert '--cfg-options model.backbone.bias_mode=legacy' in printed
    assert f'tools/test.py {CONFIG} {path}' in printed

    write_ade20k(tmp_path / 'ade', train=1, val=1, size=(64, 96), progress=False)
    evaluate = ['tools/test.py', CONFIG, path, '--data-root', tmp_path / 'ade',
                '--work-dir', tmp_path / 'work']
    printed = run_tool(*evaluate, expect=1)
    assert "trained with bias_mode='legacy', the config has 'offset'" in printed
    printed = run_tool(*evaluate, '--cfg-options', 'model.backbone.bias_mode=legacy')
    assert re.search(r'mIoU: \d', printed)


def test_backbone_to_timm(tmp_path):
    torch.save(official('official_cls_v2_s0'), tmp_path / 's0.pth')
    printed = run_tool('tools/convert_checkpoint.py', tmp_path / 's0.pth', '--arch', 's0',
                       '--to', 'timm', '--out', tmp_path / 'out')
    path, = (tmp_path / 'out').iterdir()
    assert path.name.startswith('efficientformerv2_s0_timm-')
    assert 'layout official' in printed and f'saved as {path} (layout timm)' in printed
    assert 'stages.3.downsample.attn.attention_biases' in torch.load(path, weights_only=True)


def test_errors_are_one_line(tmp_path):
    torch.save(official('official_cls_v1_l1'), tmp_path / 'l1.pth')
    printed = run_tool('tools/convert_checkpoint.py', tmp_path / 'l1.pth', '--config', CONFIG,
                       '--out', tmp_path / 'out', expect=1)
    assert 'is a backbone or an ImageNet classifier, expected a segmentor' in printed
    assert 'Traceback' not in printed and not Path(tmp_path / 'out').exists()
    printed = run_tool('tools/convert_checkpoint.py', tmp_path / 'l1.pth', '--arch', 'l1',
                       '--prefix', 'encoder', expect=1)
    assert "has no keys under prefix 'encoder.'" in printed
