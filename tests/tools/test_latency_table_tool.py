"""tools/latency_table.py, run as a user runs it."""
import json

import cv2
import pytest
from support.helpers import run_tool

TOOL = 'tools/latency_table.py'
TINY = ['--max-widths', '16', '32', '32', '32', '--shape', '64', '64', '--threads', '1']


def test_a_table_is_measured_checked_and_resumed(tmp_path):
    out = tmp_path / 'deep' / 'table.json'
    command = [TOOL, *TINY, '--rounds', '2', '--check', '3', '--out', out]
    printed = run_tool(*command)
    table = json.loads(out.read_text())
    assert len(table['entries']) == 23 and '23 entries' in printed
    assert all(entry['ms'] > 0 for key, entry in table['entries'].items() if key != 'overhead')
    header = table['header']
    assert {key: header[key] for key in ('unit', 'runtime', 'precision', 'threads', 'batch',
                                         'shape', 'warm_ups', 'rounds', 'expansion',
                                         'bias_grid')} == dict(
        unit='ms', runtime='pytorch', precision='fp32', threads=1, batch=1, shape=[64, 64],
        warm_ups=2, rounds=2, expansion=4, bias_grid=25)
    assert header['device'] and header['cores'] >= 1 and header['reference_ms'] > 0
    assert len(table['check']['networks']) == 3
    for each in table['check']['networks']:
        assert f'{each["predicted_ms"]:.4g}' in printed and each['name'] in printed
    assert 'median absolute error' in printed and 'Spearman' in printed
    assert cv2.imread(str(out.with_suffix('.png'))) is not None

    # A missing entry is measured, and the check repeated; the other entries stay.
    taken = table['entries'].pop('MB4D stage2 32')
    out.write_text(json.dumps(table))
    run_tool(*command)
    again = json.loads(out.read_text())
    assert again['entries'].pop('MB4D stage2 32')['ms'] != taken['ms']
    # If the machine was faster this time, all entries are scaled.
    faster = again['header']['reference_ms'] / header['reference_ms']
    for key, entry in table['entries'].items():
        assert again['entries'][key]['ms'] == pytest.approx(faster * entry['ms'])
    assert again['entries'].keys() == table['entries'].keys()
    assert again['check'] != table['check']

    before = out.read_bytes()
    printed = run_tool(TOOL, *TINY, '--rounds', '4', '--check', '0', '--out', out, expect=1)
    assert 'rounds 2 there, 4 here' in printed and 'Traceback' not in printed
    assert out.read_bytes() == before
