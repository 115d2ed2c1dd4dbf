"""tools/latency_profile.py, run as a user runs it."""
import json

import cv2
import pytest
from support.helpers import run_tool

TOOL = 'tools/latency_profile.py'


def test_where_the_time_of_l1_goes(tmp_path):
    out = tmp_path / 'out'
    printed = run_tool(TOOL, 'l1', 'timm:efficientformer_l1:pytorch', '--runtimes', 'pytorch',
                       'onnx', 'openvino', '--shape', '64', '64', '--threads', '1', '--rounds',
                       '1', '--out', out)
    results = json.loads((out / 'results.json').read_text())
    found = {entry['name']: entry for entry in results['candidates']}
    failed = found.pop('timm:efficientformer_l1')  # takes images of one size
    assert 'RuntimeError' in failed['error'] and not failed['kinds']
    assert [*found] == ['l1', 'l1:onnx', 'l1:openvino']
    cost = results['profiler_ms_per_operator']
    assert [*cost] == ['onnx'] and all(ms >= 0 for ms in cost['onnx'].values())
    for name, entry in found.items():
        assert [*entry['kinds']] == results['kinds']
        total = sum(samples[0] for samples in entry['kinds'].values())
        assert total + entry['taken_off_ms'] == pytest.approx(entry['profiled_ms'][0])
        assert entry['taken_off_ms'] == pytest.approx(
            len(entry['operators']) * sum(cost.get(entry['runtime'], {}).values()))
        kinds = [operator['kind'] for operator in entry['operators']]
        assert kinds.count('patch embedding') == 5  # two in the stem, three between stages
        assert kinds.count('convolution') == 28 and kinds.count('linear') == 4
        assert kinds.count('pooling') == 14
        assert f'| {name} |' in (out / 'results.md').read_text() and name in printed
        picture = cv2.imread(str(out / f'{entry["runtime"]}.png'))
        assert picture.shape[1] > 1000

    text = (out / 'results.md').read_text()
    (out / 'results.md').unlink()
    run_tool(TOOL, '--render', '--out', out)
    assert (out / 'results.md').read_text() == text


@pytest.mark.parametrize('options, message', [
    (['l9'], "latency_profile.py: model 'l9' is unknown"),
    (['l1:compile'], 'compile does not tell the time of each operator'),
    (['--render', '--out', 'nowhere'], 'nowhere/results.json does not exist'),
])
def test_faults_of_the_user_are_one_line(options, message):
    printed = run_tool(TOOL, *options, expect=1)
    assert message in printed and 'Traceback' not in printed
