"""tools/analysis_tools/latency_profile.py, run as a user runs it."""
import json

import cv2
from support.helpers import run_tool

TOOL = 'tools/analysis_tools/latency_profile.py'


def test_kinds_of_l1_in_two_runtimes(tmp_path):
    out = tmp_path / 'out'
    printed = run_tool(TOOL, 'l1', 'timm:efficientformer_l1:pytorch', '--runtimes', 'pytorch',
                       'onnx', '--shape', '64', '64', '--threads', '1', '--rounds', '1', '--out',
                       out)
    results = json.loads((out / 'results.json').read_text())
    found = {entry['name']: entry for entry in results['candidates']}
    failed = found.pop('timm:efficientformer_l1')  # accepts one image size only
    assert 'RuntimeError' in failed['error'] and not failed['samples_ms']
    assert [*found] == ['l1', 'l1:onnx']
    for name, entry in found.items():
        kinds, = entry['kinds']
        for kind in ('patch embedding', 'convolution', 'linear', 'pooling'):
            assert kinds[kind] > 0, (name, kind)
        assert kinds['convolution'] == max(kinds.values())
        assert f'| {name} |' in (out / 'results.md').read_text() and name in printed
        assert cv2.imread(str(out / f'{entry["runtime"]}.png')).shape[1] > 1000
