"""Benchmark: rounds of all candidates, the table, and accuracy against time."""
import json
import time

import pytest
import torch
from torch import nn

from mmeffformer.latency import benchmark
from mmeffformer.latency import results as latency_results
from mmeffformer.latency.benchmark import LEGEND, parts_table, run, table, tradeoff
from mmeffformer.latency.building import Built, compiled
from mmeffformer.latency.candidates import Candidate, Setting
from mmeffformer.latency.results import load, markdown
from mmeffformer.utils.stopwatch import Stopwatch

SETTING = Setting((64, 64))
L1, S0 = Candidate('l1'), Candidate('s0', 'onnx')
BROKEN = Candidate('timm:efficientformer_l1')


@pytest.fixture
def built(monkeypatch):
    """Replace networks by calls that are listed; one candidate cannot be built."""
    calls = []

    def build(candidate, setting, folder):
        if candidate == BROKEN:
            raise RuntimeError('the size of a\nmust match b')
        return Built(lambda: calls.append(str(candidate)), 12_300_000, 2 * 10 ** 9, 3 * 2 ** 20,
                     remark='odd' if candidate == S0 else '')

    monkeypatch.setattr(benchmark, 'build', build)
    monkeypatch.setattr(benchmark, 'MATRIX_SIZE', dict(cpu=64))
    return calls


def timed(name, samples, **values):
    return dict(dict(name=name, model=name.partition(':')[0], runtime='pytorch', dtype='fp32',
                     variants=[], error=None, samples_ms=samples, params=12_300_000,
                     macs=10 ** 9, peak_bytes=3 * 2 ** 20, kept_bytes=None, remark=''), **values)


def results(*entries, **head):
    header = dict(latency_results.header(SETTING, 3, 0), rounds_done=3, cpu='CPU', **head)
    # 2 * 1000 ** 3 FLOP in 10 ms are 200 GFLOP/s.
    return dict(header=header, baselines=['l1'], candidates=[*entries],
                matrix_product=dict(fp32=dict(size=1000, samples_ms=[10., 10., 10.])))


def test_all_candidates_are_timed_in_every_round_and_failures_reported(built, tmp_path):
    steps = []
    found = run([L1, BROKEN], [S0], SETTING, 4, 0, tmp_path, lambda *args: steps.append(args))
    assert [len(entry['samples_ms']) for entry in found['candidates']] == [4, 0, 4]
    assert [entry['error'] for entry in found['candidates']] == [
        None, 'RuntimeError: the size of a\nmust match b', None]
    assert len(found['matrix_product']['fp32']['samples_ms']) == 4
    assert found['header']['rounds_done'] == 4 and found['baselines'] == ['s0:onnx']
    assert {'l1', 's0:onnx'} == {*built}
    assert load(tmp_path) == found
    columns, rows = table(found)
    assert [row[0] for row in rows] == ['l1', 'timm:efficientformer_l1', 's0:onnx']
    assert [len(row) for row in rows] == [len(columns)] * 3 and columns[3] == '× s0:onnx'
    assert rows[1][1:3] == ['failed', '–'] and 'the size of a must match b' in rows[1][-1]
    assert rows[2][-1] == 'odd'
    assert steps[0] == ('building l1', 0, 3) and steps[-1][1:] == (11, 12)


@pytest.mark.parametrize('stop', [KeyboardInterrupt, MemoryError])
def test_an_interrupted_run_keeps_its_complete_rounds(built, tmp_path, stop):
    def progress(text, done, steps):
        if text.startswith('round') and done == 3 * 3 + 1:  # in round 4 of 2 networks, 1 product
            raise stop

    if stop is KeyboardInterrupt:
        assert run([L1, S0], [L1], SETTING, 9, 0, tmp_path, progress)['header']['interrupted']
    else:
        with pytest.raises(stop):
            run([L1, S0], [L1], SETTING, 9, 0, tmp_path, progress)
    found = load(tmp_path)
    assert found['header']['rounds_done'] == 3
    assert [len(entry['samples_ms']) for entry in found['candidates']] == [3, 3]
    assert '3 of 9 rounds' in markdown(found)


def test_table():
    columns, rows = table(results(
        timed('l1', [20., 30., 40.]), timed('l1:legacy', [40., 60., 80.]),
        timed('s0', [5., 10., 8.], dtype='bf16', macs=None, peak_bytes=None)))
    assert columns == ['model', 'ms', 'quartiles', '× l1', 'GMACs', 'of matrix product',
                       'peak, MiB', 'params, M']
    # 2 GFLOP in 30 ms are 67 GFLOP/s, of 200.
    assert rows == [['l1', '30', '25–35', '1.00', '1.00', '33%', '3', '12.3'],
                    ['l1:legacy', '60', '50–70', '0.50', '1.00', '17%', '3', '12.3'],
                    ['s0', '8', '6.5–9', '4.00', '–', '–', '–', '12.3']]
    columns, rows = table(results(timed('l1', [20., 30., 40.], kept_bytes=5 * 2 ** 20),
                                  mode='train'))
    assert columns[4:] == ['kept for backward, MiB', 'peak, MiB', 'params, M']
    assert rows[0][4:] == ['5', '3', '12.3']


def test_markdown_has_machine_versions_and_rate():
    found = results(timed('l1', [20., 30., 40.]), timed('s0', [], error='ValueError: a | b'))
    text = markdown(found, (*table(found), LEGEND))
    assert '### Inference of 1 image of 64 x 64 px' in text
    assert f'torch {torch.__version__.partition("+")[0]}' in text
    assert '1000 x 1000: 200 GFLOP/s' in text
    assert '| s0 | failed | – | – | – | – | – | – | ValueError: a / b |' in text


def test_tradeoff_has_what_was_timed_and_published():
    resnet, pool, port = 'timm:resnet50.a1_in1k', 'timm:poolformer_s24', 'timm:efficientformerv2_l'
    accuracy = {'l7': '42.6 ?', 'l1': '37.9', resnet: '38.0', 's0': '', 'l3': '41.4',
                port: '44.7', pool: '40.1'}
    found = tradeoff(results(
        timed('l7', [20., 30., 40.]), timed('l1', [9.], variants=['legacy', 'nchw']),
        timed(resnet, [7.], model=resnet), timed('s0', [1.]), timed('l3', []),
        timed(pool, [6.], model=pool), timed(port, [5.], model=port, runtime='onnx')),
        accuracy, 'box AP, %')
    quality = 'box AP, %\npublished by the authors, not measured'
    assert found == {
        ('eager, fp32', quality): [
            ('L7 ?', 'EfficientFormer', 30, 42.6, None, (25, 35)),
            ('L1', 'EfficientFormer (legacy, nchw)', 9, 37.9, None, (9, 9)),
            ('50', 'resnet', 7, 38.0, None, (7, 7)),
            ('S24', 'poolformer', 6, 40.1, None, (6, 6))],
        ('ONNX Runtime, fp32', quality): [
            ('L', 'EfficientFormerV2 (timm)', 5, 44.7, None, (5, 5))]}


def test_tradeoff_of_whole_models_has_a_panel_of_its_own():
    ours, theirs = 'configs/detection/maskrcnn_effformerv2_s2.py', (
        'mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py')
    found = tradeoff(results(
        timed('l1', [9.]), timed(ours, [20.], model=ours),
        timed(f'{theirs}:plain', [7.], model=theirs, variants=['plain'])),
        {'l1': '35.4', ours: '39.5', theirs: '35.4'}, 'mask AP, %')
    quality = 'mask AP, %\npublished by the authors, not measured'
    assert found == {
        ('eager, fp32', quality): [('L1', 'EfficientFormer', 9, 35.4, None, (9, 9))],
        ('eager, fp32, whole models', quality): [
            ('S2', 'Mask R-CNN EfficientFormerV2', 20, 39.5, None, (20, 20)),
            ('tiny', 'mmdet rtmdet-ins (plain)', 7, 35.4, None, (7, 7))]}


def test_parts_of_whole_models():
    assert parts_table(results(timed('l1', [20., 30.]))) is None
    found = parts_table(results(
        timed('l1', [20.]), timed('a.py', [], parts_ms=[]),
        timed('b.py', [10., 20., 30.], parts_ms=[
            dict(other=1., neck=2., backbone=ms, roi_head=3.) for ms in (4., 14., 24.)]),
        timed('c.py', [10.], parts_ms=[dict(backbone=5., decode_head=4., post_processing=1.)])))
    assert found == (
        ['ms of', 'backbone', 'neck', 'decode_head', 'roi_head', 'post_processing', 'other'],
        [['b.py', '14', '2', '–', '3', '–', '1'], ['c.py', '5', '–', '4', '–', '1', '–']])


def test_parts_sum_to_the_sample(tmp_path, monkeypatch):
    watched = Stopwatch()

    def call():
        with watched.section('other'), watched.section('backbone'):
            time.sleep(.001)

    monkeypatch.setattr(benchmark, 'MATRIX_SIZE', dict(cpu=64))
    monkeypatch.setattr(benchmark.whole, 'build', lambda *args: Built(call, 1, 1,
                                                                      stopwatch=watched))
    entry, = run([Candidate('some.py')], [], SETTING, 3, 0, tmp_path)['candidates']
    assert [sum(parts.values()) for parts in entry['parts_ms']] == pytest.approx(
        entry['samples_ms'])
    assert all(parts['backbone'] > parts['other'] > 0 for parts in entry['parts_ms'])
    assert load(tmp_path)['candidates'] == [entry]


def test_results_of_another_tool_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'results\.json does not exist'):
        load(tmp_path)
    (tmp_path / 'results.json').write_text(json.dumps([1]))
    with pytest.raises(ValueError, match='was not written by tools/benchmark.py'):
        load(tmp_path)
    (tmp_path / 'results.json').write_text('{"header": 1, "candidates": []}')
    with pytest.raises(ValueError, match='was not written by'):
        load(tmp_path)


def test_many_networks_of_a_class_are_compiled(monkeypatch):
    """The ninth would run eagerly, and be timed as if compiled."""
    graphs = []
    original = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda net, **kw: original(
        net, backend=lambda graph, inputs, **_: graphs.append(graph) or graph, **kw))
    for width in range(1, 13):
        network = nn.Sequential(nn.Linear(4, width)).eval()
        assert compiled(network)(torch.ones(2, 4)).shape == (2, width)
    assert len(graphs) == 12
