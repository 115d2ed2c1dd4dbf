"""Rounds of all candidates, and what is told of them."""
import json

import pytest
import torch
from torch import nn

from mmeffformer.latency import benchmark
from mmeffformer.latency.benchmark import load, markdown, marks, published, run, table
from mmeffformer.latency.candidates import Built, Candidate, Setting

SETTING = Setting((64, 64))
L1, S0 = Candidate('l1'), Candidate('s0', 'onnx')
BROKEN = Candidate('timm:efficientformer_l1')


@pytest.fixture
def built(monkeypatch):
    """Stand-ins for networks, of which one cannot be built; the list of what was called."""
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
    header = dict(benchmark.header(SETTING, 3, 0), rounds_done=3, cpu='CPU', **head)
    # 2 * 1000 ** 3 FLOP in 10 ms are 200 GFLOP/s.
    return dict(header=header, baselines=['l1'], candidates=[*entries],
                matrix_product=dict(fp32=dict(size=1000, samples_ms=[10., 10., 10.])))


def test_all_are_timed_in_every_round_and_failures_are_told(built, tmp_path):
    told = []
    found = run([L1, BROKEN, S0], [L1], SETTING, 4, 0, tmp_path, lambda *args: told.append(args))
    assert [len(entry['samples_ms']) for entry in found['candidates']] == [4, 0, 4]
    assert [entry['error'] for entry in found['candidates']] == [
        None, 'RuntimeError: the size of a\nmust match b', None]
    assert len(found['matrix_product']['fp32']['samples_ms']) == 4
    assert found['header']['rounds_done'] == 4 and found['baselines'] == ['l1']
    assert {'l1', 's0:onnx'} == {*built}
    assert load(tmp_path) == found
    columns, rows = table(found)
    assert [row[0] for row in rows] == ['l1', 'timm:efficientformer_l1', 's0:onnx']
    assert [len(row) for row in rows] == [len(columns)] * 3
    assert rows[1][1:3] == ['failed', '–'] and 'the size of a must match b' in rows[1][-1]
    assert rows[2][-1] == 'odd'
    assert told[0] == ('building l1', 0, 3) and told[-1][1:] == (11, 12)


def test_a_baseline_is_timed_as_well(built, tmp_path):
    found = run([L1], [S0], SETTING, 1, 0, tmp_path)
    assert [entry['name'] for entry in found['candidates']] == ['l1', 's0:onnx']
    assert table(found)[0][3] == '× s0:onnx'


@pytest.mark.parametrize('stop', [KeyboardInterrupt, MemoryError])
def test_what_was_timed_before_the_end_is_kept(built, tmp_path, monkeypatch, stop):
    def timers(*args):
        for i, sample in enumerate(benchmark_interleave(*args)):
            if i == 3 * 3 + 1:  # in the fourth round, of two networks and the product
                raise stop
            yield sample

    benchmark_interleave = benchmark.interleave
    monkeypatch.setattr(benchmark, 'interleave', timers)
    if stop is KeyboardInterrupt:
        assert run([L1, S0], [L1], SETTING, 9, 0, tmp_path)['header']['interrupted']
    else:
        with pytest.raises(stop):
            run([L1, S0], [L1], SETTING, 9, 0, tmp_path)
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


def test_table_of_training():
    columns, rows = table(results(timed('l1', [20., 30., 40.], kept_bytes=5 * 2 ** 20),
                                  mode='train'))
    assert columns[4:] == ['kept for backward, MiB', 'peak, MiB', 'params, M']
    assert rows[0][4:] == ['5', '3', '12.3']


def test_markdown_says_on_what_and_how():
    text = markdown(results(timed('l1', [20., 30., 40.]),
                            timed('s0', [], error='ValueError: a | b')))
    assert '### Inference of 1 image of 64 x 64 px' in text
    assert f'torch {torch.__version__.partition("+")[0]}' in text
    assert '1000 x 1000: 200 GFLOP/s' in text
    assert '| s0 | failed | – | – | – | – | – | – | ValueError: a / b |' in text


@pytest.mark.parametrize('model, accuracy, figure', [
    ('l1', 'top1', '79.2'), ('l', 'top1', '83.3'), ('s0', 'top1', '75.7'),
    ('timm:resnet50', 'top1', ''), ('timm:convnext_tiny', 'box_ap', ''), ('s0', 'box_ap', ''),
    ('l3', 'box_ap', '41.4'), ('l7', 'box_ap', '42.6 ?'), ('timm:resnet50', 'box_ap', '38.0'),
    ('timm:resnet50.a1_in1k', 'miou', '36.7'), ('timm:poolformer_s24', 'miou', '40.3'),
    ('timm:efficientformer_l3', 'miou', '43.5'), ('timm:efficientformerv2_l', 'box_ap', '44.7'),
])
def test_published_figures(model, accuracy, figure):
    assert published(model, accuracy) == figure


def test_marks_are_of_what_was_timed_and_published():
    found = marks(results(
        timed('l7', [20., 30., 40.]), timed('l1', [9.], variants=['legacy', 'nchw']),
        timed('timm:resnet50', [7.], model='timm:resnet50'), timed('s0', [1.]), timed('l3', []),
        timed('timm:efficientformerv2_l', [5.], model='timm:efficientformerv2_l',
              runtime='onnx')), 'box_ap')
    what = 'Mask R-CNN 1x, COCO box AP, %\npublished by the authors, not measured'
    assert found == {
        ('eager, fp32', what): [
            ('L7 ?', 'EfficientFormer', 30, 42.6, None, (25, 35)),
            ('L1', 'EfficientFormer (legacy, nchw)', 9, 37.9, None, (9, 9)),
            ('50', 'ResNet', 7, 38.0, None, (7, 7))],
        ('ONNX Runtime, fp32', what): [
            ('L', 'EfficientFormerV2 (timm)', 5, 44.7, None, (5, 5))]}


def test_results_of_something_else_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'results\.json does not exist'):
        load(tmp_path)
    (tmp_path / 'results.json').write_text(json.dumps([1]))
    with pytest.raises(ValueError, match='was not written by tools/benchmark.py'):
        load(tmp_path)


def test_more_networks_of_a_class_than_dynamo_compiles_by_default():
    """From the ninth on it would run eagerly, and be timed as if compiled."""
    from mmeffformer.latency.candidates import compiled
    counts = []

    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.layer = nn.Linear(4, width)

        def forward(self, x):
            return self.layer(x)

    def count(graph, inputs):
        counts.append(graph)
        return graph

    with pytest.MonkeyPatch.context() as patch:
        original = torch.compile
        patch.setattr(torch, 'compile', lambda net, **kw: original(net, backend=count, **kw))
        for width in range(1, 13):
            assert compiled(Net(width))(torch.ones(2, 4)).shape == (2, width)
    assert len(counts) == 12
