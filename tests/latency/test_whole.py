"""Whole detectors and segmentors with random weights as candidates."""
from importlib import import_module

import pytest
import torch
from support.wholes import DETECTIONS, SEGMENTOR, write_detector
from torchvision.ops import box_iou

from mmeffformer.latency import whole
from mmeffformer.latency.candidates import Candidate, Setting

SETTING = Setting((64, 96))
TRAIN = Setting((64, 96), batch=2, train=True)
RTMDET = 'mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py'


@pytest.fixture
def models(monkeypatch):
    """Return the list of the models that are built."""
    built, original = [], whole.random_model
    monkeypatch.setattr(whole, 'random_model',
                        lambda cfg: built.append(original(cfg)) or built[-1])
    return built


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    return write_detector(tmp_path_factory.mktemp('config'))


def test_a_detector_finds_the_same_in_all_variants_and_runtimes(detector, tmp_path):
    built = [whole.build(Candidate(detector, *options), SETTING, tmp_path)
             for options in (('pytorch', ), ('pytorch', 'fp32', ('plain', )), ('onnx', ))]
    first, *others = built
    expected = first.call()[0].pred_instances
    assert len(expected) == DETECTIONS and expected.masks.shape == (DETECTIONS, 64, 96)
    for each in built:
        assert (each.params, each.macs) == (first.params, first.macs)
        assert each.remark == f'{DETECTIONS} detections'
    assert first.macs > 10 ** 7 and first.peak_bytes > 10 ** 6
    for each in others:  # scores are alike, so rounding may exchange a few
        found = each.call()[0].pred_instances
        overlaps = box_iou(found.bboxes, expected.bboxes)
        assert (overlaps.amax(1) > .999).sum() >= .8 * DETECTIONS
    first.stopwatch.take()
    first.call()
    parts = first.stopwatch.take()
    assert {*parts} == {'backbone', 'neck', 'rpn_head', 'roi_head', 'post_processing', 'other'}
    assert min(parts.values()) > 0 and others[-1].stopwatch is None


@pytest.mark.parametrize('variants, fused, channels_last, faster', [
    ((), True, True, True), (('unfused', ), False, True, True), (('nchw', ), True, False, True),
    (('plain', ), False, False, False)])
def test_variants(variants, fused, channels_last, faster, models, tmp_path):
    common = import_module('mmcv._ext.common')
    call = whole.build(Candidate(SEGMENTOR, variants=variants), SETTING, tmp_path).call
    seen = []
    model, = models
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append((
        args[0].is_contiguous(memory_format=torch.channels_last), common.FASTER)))
    sample, = call()
    assert seen == [(channels_last, faster)] and common.FASTER
    assert any(getattr(module, 'deployed', False) for module in model.modules()) == fused
    assert sample.pred_sem_seg.data.shape == (1, 64, 96)


def test_a_file_of_a_segmentor_gives_its_map(tmp_path):
    maps = [whole.build(Candidate(SEGMENTOR, runtime), SETTING, tmp_path).call()[0]
            .pred_sem_seg.data for runtime in ('pytorch', 'openvino')]
    assert (maps[0] == maps[1]).float().mean() > .99


@pytest.mark.parametrize('kind, heads', [
    ('detector', ('rpn_head', 'roi_head')), ('segmentor', ('decode_head', ))])
def test_a_training_step_reaches_all_heads(kind, heads, detector, models, tmp_path):
    candidate = Candidate(detector if kind == 'detector' else SEGMENTOR)
    built = whole.build(candidate, TRAIN, tmp_path)
    assert built.macs is None and 0 < built.kept_bytes < built.peak_bytes
    assert built.call() is None
    model, = models
    for name in ('backbone', 'neck', *heads):
        gradients = [p.grad for p in getattr(model, name).parameters() if p.requires_grad]
        assert any(grad is not None and grad.abs().sum() > 0 for grad in gradients), name


@pytest.mark.slow
def test_an_int8_file_of_a_detector_runs(detector, tmp_path):
    built = whole.build(Candidate(detector, 'openvino', 'int8'), SETTING, tmp_path)
    assert built.call()[0].pred_instances.masks.shape[1:] == (64, 96)
    assert {path.name for path in tmp_path.glob('*.xml')} == {'0.xml', 'fp32-0.xml'}


def test_ground_truth_is_of_objects():
    from mmdet.structures import DetDataSample
    samples = [DetDataSample(), DetDataSample()]
    whole.add_ground_truth(samples, (64, 96), 3)
    for sample in samples:
        objects = sample.gt_instances
        assert whole.OBJECTS <= len(objects) < 2 * whole.OBJECTS
        x1, y1, x2, y2 = objects.bboxes.T
        assert (x2 > x1).all() and (y2 > y1).all() and x2.max() <= 96 and y2.max() <= 64
        areas = torch.from_numpy(objects.masks.to_ndarray()).sum((1, 2))
        assert (areas <= (x2 - x1) * (y2 - y1)).all() and areas.min() >= 16
        assert {*objects.labels.tolist()} <= {0, 1, 2}


def test_the_threshold_of_a_one_stage_detector_leaves_as_many_as_a_trained_one():
    model = whole.random_model(whole.read_config(RTMDET))
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = model.bbox_head.test_cfg.score_thr
    whole.set_score_threshold(model, image)
    assert model.bbox_head.test_cfg.score_thr != before
    with torch.no_grad():
        sample, = model.predict(image, whole.make_samples(model, (64, 64), 1))
    assert len(sample.pred_instances) == whole.DETECTIONS
    assert sample.pred_instances.masks.shape == (whole.DETECTIONS, 64, 64)
