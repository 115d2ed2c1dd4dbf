"""tools/benchmark.py, run as a user runs it."""
import json

import cv2
import numpy as np
from support.helpers import run_tool
from support.wholes import SEGMENTOR

TOOL = 'tools/benchmark.py'
SMALL = ['--shape', '64', '64', '--rounds', '2', '--threads', '1']


def test_models_side_by_side(tmp_path):
    out = tmp_path / 'out'
    printed = run_tool(TOOL, 's0', 's0:legacy,unfused,nchw', 'timm:efficientformer_l1',
                       '--runtimes', 'pytorch', 'onnx', '--baseline', 'timm:resnet18', *SMALL,
                       '--out', out, '--accuracy', 'top1')
    results = json.loads((out / 'results.json').read_text())
    found = {entry['name']: entry for entry in results['candidates']}
    assert [*found] == ['s0', 's0:onnx', 's0:legacy,unfused,nchw', 'timm:efficientformer_l1',
                        'timm:efficientformer_l1:onnx', 'timm:resnet18']
    for name, entry in found.items():
        failed = name.startswith('timm:efficientformer_l1')  # accepts one image size only
        assert len(entry['samples_ms']) == (0 if failed else 2), name
        assert ('RuntimeError' in (entry['error'] or '')) == failed, name
    assert found['s0']['params'] == found['s0:legacy,unfused,nchw']['params']
    text = (out / 'results.md').read_text()
    for name in found:
        assert f'| {name} |' in text and name in printed
    assert '× timm:resnet18' in text
    assert cv2.imread(str(out / 'accuracy.png')).shape[1] > 900  # two panels

    (out / 'accuracy.png').unlink()
    (out / 'results.md').unlink()
    run_tool(TOOL, '--render', '--out', out)
    assert (out / 'results.md').read_text() == text and (out / 'accuracy.png').is_file()


def test_training_step(tmp_path):
    run_tool(TOOL, 's0', 's0:with_cp', '--mode', 'train', '--batch', '2', *SMALL,
             '--out', tmp_path)
    plain, saving = json.loads((tmp_path / 'results.json').read_text())['candidates']
    assert saving['kept_bytes'] < plain['kept_bytes'] / 2
    assert '| s0:with_cp |' in (tmp_path / 'results.md').read_text()
    assert not (tmp_path / 'accuracy.png').exists()


def test_whole_models_by_part(tmp_path):
    run_tool(TOOL, SEGMENTOR, f'{SEGMENTOR}:plain', *SMALL, '--out', tmp_path, '--accuracy',
             'miou')
    fast, plain = json.loads((tmp_path / 'results.json').read_text())['candidates']
    assert plain['variants'] == ['plain'] and plain['params'] == fast['params']
    assert [{*parts} for parts in fast['parts_ms']] == [
        {'backbone', 'neck', 'decode_head', 'post_processing', 'other'}] * 2
    text = (tmp_path / 'results.md').read_text()
    assert '| ms of | backbone | neck | decode_head | post_processing | other |' in text


def test_end_to_end(tmp_path):
    cv2.imwrite(str(tmp_path / 'image.jpg'), np.zeros((64, 96, 3), np.uint8))
    common = [TOOL, '--images', tmp_path, '--rounds', '2', '--threads', '1', '--end-to-end']
    out = tmp_path / 'out'
    printed = run_tool(*common, SEGMENTOR, '--batch', '2', '--out', out)
    found = json.loads((out / 'end_to_end.json').read_text())
    assert found['header']['images'] == 1 and found['header']['trained'] is False
    assert len(found['runtimes']['pytorch']['stages_ms']) == 2
    assert 'post-processing' in printed
    assert '| pytorch |' in (out / 'end_to_end.md').read_text()
    for more, message in ((['--runtimes', 'compile'], 'the runtimes pytorch, onnx, openvino'),
                          (['--dtype', 'bf16'], 'in fp32'), (['--streams', '0'], '1 or more')):
        assert message in run_tool(*common, SEGMENTOR, *more, expect=1)
    assert 'none.pth' in run_tool(*common, SEGMENTOR, 'none.pth', expect=1)


def test_exits_with_an_error_if_nothing_was_timed(tmp_path):
    printed = run_tool(TOOL, 'timm:efficientformer_l1', *SMALL, '--out', tmp_path, expect=1)
    assert 'nothing was timed' in printed and 'RuntimeError' in printed
