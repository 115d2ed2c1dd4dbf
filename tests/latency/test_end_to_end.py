"""Time from image files to drawn predictions."""

import pytest
from support.wholes import SEGMENTOR, write_detector

from mmeffformer.apis.inference import init_scope, load_sample_drawer
from mmeffformer.engine.configs import read_config
from mmeffformer.latency import end_to_end
from mmeffformer.latency.candidates import Setting


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that times a config on drawn images, with one that reads its drawings."""
    monkeypatch.setattr(end_to_end, 'IMAGES', 3)
    monkeypatch.setattr(end_to_end, 'IMAGE_SIZE', (64, 96))

    def timed(config, runtimes, batch=1, **options):
        cfg = read_config(config)
        init_scope(cfg)
        drawn = []

        def make_drawer(metainfo, score):
            drawer = load_sample_drawer(cfg, metainfo, score)

            def draw(sample, image):
                found = sample.get('pred_instances')
                drawn.append((drawer(sample, image).shape,
                              None if found is None else int((found.scores >= score).sum())))

            return draw

        return drawn, end_to_end.run(cfg, None, make_drawer, end_to_end.draw_images(tmp_path),
                                     runtimes, Setting(batch=batch), **options)

    return timed


def test_stages_and_throughput_of_a_detector(run, tmp_path):
    drawn, results = run(write_detector(tmp_path), ['pytorch', 'onnx'], batch=2, rounds=2,
                         streams=2)
    for name, entry in results['runtimes'].items():
        assert entry['error'] is None and entry['at_once'] == 2 and entry['throughput'] > 0, name
        assert len(entry['stages_ms']) == 2
        for stages in entry['stages_ms']:
            assert [*stages] == [*end_to_end.STAGES] and min(stages.values()) > 0
    assert {shape for shape, _ in drawn} == {(64, 96, 3)}
    assert all(count >= end_to_end.DRAWN / 2 for _, count in drawn)
    assert results['header']['shapes'] == [(64, 96)] and results['header']['rounds_done'] == 2
    columns, rows = end_to_end.table(results)
    assert [len(row) for row in rows] == [len(columns)] * 2
    assert '(2 in a batch)' in rows[0][-1] and '(2 streams)' in rows[1][-1]
    assert '3 images, padded to 64 x 96 px; random weights' in end_to_end.notes(results)


def test_a_runtime_that_fails_is_listed(run, monkeypatch):
    exported = end_to_end.exported

    def fail(model, to, *args, **options):
        if to == 'onnx':
            raise ValueError('cannot be\nexported')
        return exported(model, to, *args, **options)

    monkeypatch.setattr(end_to_end, 'exported', fail)
    drawn, results = run(SEGMENTOR, ['openvino', 'onnx'], rounds=1)
    assert drawn[-1] == ((64, 96, 3), None)
    stages, = results['runtimes']['openvino']['stages_ms']
    assert stages['post-processing'] > 0 and stages['network'] > 0
    _, rows = end_to_end.table(results)
    assert rows[1][:2] == ['onnx', 'failed: ValueError: cannot be exported']
    assert rows[0][-1] == end_to_end.NONE


def test_percentiles():
    stages = [{name: ms if name == 'network' else 1. for name in end_to_end.STAGES}
              for ms in range(5, 106)]
    results = dict(runtimes=dict(pytorch=dict(error=None, stages_ms=stages, at_once=1,
                                              throughput=None)))
    columns, (row, ) = end_to_end.table(results)
    found = dict(zip(columns, row))
    assert (found['network'], found['decode']) == ('55', '1')
    assert [found[f'{p} %'] for p in (50, 90, 99)] == ['60', '100', '109']
    assert found['images/s'] == f'{1000 / 60:.3g}'
