"""Errors of users end a tool with one message, no traceback and no output."""
from pathlib import Path

import pytest
from support.helpers import run_tool

DEMO = 'configs/demo/maskrcnn_effformer_l1_shapes.py'
NO_MODEL = 'configs/_base_/default_runtime.py'
RETINANET = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
C4 = 'mmdet::faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py'


# Messages of argparse, with exit code 2, begin with 'error: '. {out} does not exist.
@pytest.mark.parametrize('tool, options, message', [
    ('train', 'configs/nope.py', "config 'configs/nope.py' does not exist"),
    ('train', f'{DEMO} --resume nope.pth', "checkpoint 'nope.pth' does not exist"),
    ('train', NO_MODEL, 'has no model: expected'),
    ('train', f'{DEMO} --amp', 'error: --amp float16 needs a GPU'),
    ('train', 'configs/detection/maskrcnn_effformer_l1.py --data-root {out} --work-dir {out}',
     'instances_train2017.json ... cocodataset.org'),
    ('test', f'{DEMO} nope.pth', "checkpoint 'nope.pth' does not exist"),
    ('test', 'config.py --deploy --backend onnx --model model.onnx',
     'error: --deploy is for a checkpoint'),
    ('infer', f'{DEMO} nope.pth nope.jpg', 'input nope.jpg does not exist'),
    ('infer', f'{DEMO} nope.pth requirements', 'folder requirements has no files'),
    ('infer', f'{DEMO} nope.pth setup.py', "checkpoint 'nope.pth' does not exist"),
    ('infer', f'{DEMO} nope.pth a.jpg --limit 0', 'error: ... expected 1 or more'),
    ('model_stats', 'l1 --shape -5 224', 'expected a height and a width'),
    ('model_stats', 'l1 --shape 16 224', 'expected at least 32'),
    ('model_stats', NO_MODEL, 'has no model.backbone'),
    ('model_stats', 'l2', "arch 'l2' is unknown"),
    ('swap_backbone', 'mmdet::retinanet/none.py --arch l1 --out {out}', "none.py' does not exist"),
    ('swap_backbone', 'none::retinanet/none.py --arch l1 --out {out}',
     "the library 'none' is not installed"),
    ('swap_backbone', f'{RETINANET} --arch none.json --out {{out}}',
     "arch 'none.json' does not exist"),
    ('swap_backbone', f'{C4} --arch l1 --out {{out}}',
     'roi_head.shared_head ResLayer is the last stage'),
    ('slim', f'{DEMO} nope.pth --table none.json --target fast', "error: ... 'fast'"),
    ('benchmark', 'l9', "model 'l9' is unknown"),
    ('benchmark', 'l1 --rounds 0', 'rounds 0: expected 1 or more'),
    ('benchmark', '--render', '--render needs --out'),
    ('latency_table', '--step 24', 'max-widths 64 128 320 512: expected 4 multiples of 24'),
    ('analysis_tools/latency_profile', 'l9', "model 'l9' is unknown"),
    ('analysis_tools/latency_profile', 'l1:compile',
     'compile does not report the time of each operator; choose from pytorch'),
    ('analysis_tools/latency_profile', '', 'no model is given'),
    ('analysis_tools/learning_curve', 'configs', 'expected the work_dir'),
])
def test_user_errors_are_one_message(tool, options, message, tmp_path):
    out = tmp_path / 'out.py'
    printed = run_tool(f'tools/{tool}.py', *options.format(out=out).split(),
                       expect=2 if message.startswith('error: ') else 1,
                       env={'CUDA_VISIBLE_DEVICES': ''})
    assert f'{Path(tool).name}.py: ' in printed and 'Traceback' not in printed
    assert all(part in printed for part in message.split(' ... '))
    assert not out.exists()
