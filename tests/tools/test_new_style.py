"""Configs that import their types go through the tools."""
import re

import pytest
from support.helpers import run_tool as run
from support.helpers import scalars

from mmeffformer.datasets import write_ade20k, write_coco


def train(name, write, folder):
    """Train for two steps and return what was logged last."""
    write(folder / 'data', train=8, val=3, size=(64, 96), progress=False)
    run('tools/train.py', f'tests/data/new_style/{name}.py', '--data-root', folder / 'data',
        '--work-dir', folder / 'work')
    return scalars(folder / 'work')[-1]


def test_detector(tmp_path):
    validated = train('faster_rcnn', write_coco, tmp_path)['coco/bbox_mAP']
    config, checkpoint = tmp_path / 'work/faster_rcnn.py', tmp_path / 'work/iter_2.pth'
    # The config that training saved has data_root replaced.
    printed = run('tools/test.py', config, checkpoint, '--work-dir', tmp_path / 'test')
    tested = float(re.search(r'coco/bbox_mAP: (\S+)', printed)[1])
    assert tested == pytest.approx(validated, abs=.002) and tested >= 0
    printed = run('tools/infer.py', 'tests/data/new_style/faster_rcnn.py', checkpoint,
                  tmp_path / 'data/val', '--out-dir', tmp_path / 'drawn')
    assert '3 drawn files are in' in printed


def test_segmentor(tmp_path):
    assert 0 < train('semfpn', write_ade20k, tmp_path)['mIoU'] <= 100
    config = 'tests/data/new_style/semfpn.py'
    run('tools/export.py', config, tmp_path / 'work/iter_2.pth', '--to', 'onnx', '--shape', '64',
        '96', '--out', tmp_path / 'model.onnx')
    assert (tmp_path / 'model.onnx').stat().st_size > 1e5
    run('tools/check_data.py', config, '--data-root', tmp_path / 'data', '--workers', '1')
