"""One-stage detectors as graphs, against the predictions of mmdet."""
from functools import cache

import pytest
import torch
from support.helpers import image

from mmeffformer.deploy import export as exporting
from mmeffformer.deploy.comparison import MismatchError, compare
from mmeffformer.deploy.evaluation import ExportedModel
from mmeffformer.deploy.export import export
from mmeffformer.deploy.graphs import traceable
from mmeffformer.deploy.runtimes import SUFFIXES, ExportedFile, SizeError

RETINANET = 'retinanet/retinanet_r50_fpn_1x_coco.py'
RTMDET_INS = 'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py'
NONE = {'model.test_cfg.score_thr': 2.}  # finds nothing


@pytest.fixture(scope='module')
def exported(build_one_stage, tmp_path_factory):
    """A function that returns a detector and its file for any size."""

    @cache
    def make(name: str, to: str, **options):
        model = build_one_stage(name, **options)
        path = tmp_path_factory.mktemp('exported') / f'model{SUFFIXES[to]}'
        export(model, path, to, 'model', (64, 96), dynamic=True)
        return model, ExportedFile(path, to)

    return make


def assert_same(model, run, sizes, found=5):
    """Compare at the sizes, where each has ``found`` detections or more."""
    counts = []

    def counted(x):
        outputs = run(x)
        counts.append(len(outputs['boxes']))
        assert outputs['scores'].diff().max() <= 0  # best first
        return outputs

    for each in compare(model, 'model', counted, [image(*size) for size in sizes]):
        assert each.matches, each
    assert min(counts) >= found


@pytest.mark.parametrize('name, options', [
    (RETINANET, {'model.test_cfg.nms_pre': 30}),
    (RETINANET, {'model.bbox_head.loss_cls': dict(_delete_=True, type='CrossEntropyLoss'),
                 'model.test_cfg.min_bbox_size': 25, 'model.test_cfg.nms.class_agnostic': True}),
    ('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', {}),  # score factors, points
    ('gfl/gfl_r50_fpn_1x_coco.py', {}),  # distributions of distances
    ('fsaf/fsaf_r50_fpn_1x_coco.py', {}),  # another coder
    ('yolof/yolof_r50-c5_8xb8-1x_coco.py', {}),  # one level
    ('yolox/yolox_tiny_8xb8-300e_coco.py', {'model.test_cfg.score_thr': 0.2}),
    ('rtmdet/rtmdet_tiny_8xb32-300e_coco.py', {'model.test_cfg.nms_pre': 30}),
    (RTMDET_INS, {'model.test_cfg.min_bbox_size': 2})])
def test_heads(name, options, build_one_stage):
    model = build_one_stage(name, **options)
    part = traceable(model)
    with torch.no_grad():
        assert_same(model, lambda x: dict(zip(part.output_names, part(x))), [(64, 96), (96, 32)])


def test_retinanet_at_any_size(exported):
    model, file = exported(RETINANET, 'onnx')
    assert_same(model, file, [(96, 96), (33, 95)])


@pytest.mark.parametrize('to', ['onnx', pytest.param('openvino', marks=pytest.mark.slow)])
def test_rtmdet_ins_at_any_size(to, exported):
    model, file = exported(RTMDET_INS, to)
    assert_same(model, file, [(96, 96), (160, 32)])
    assert file.meta['size_divisor'] == 32  # its neck doubles sizes
    with pytest.raises(SizeError, match='sides are multiples of 32 px, the image has 64 x 95'):
        file(image(64, 95))


@pytest.mark.parametrize('to', [pytest.param('onnx', marks=pytest.mark.slow), 'openvino'])
def test_no_detections(to, build_one_stage, tmp_path):
    model, path = build_one_stage(RTMDET_INS, **NONE), tmp_path / f'model{SUFFIXES[to]}'
    export(model, path, to, 'model', (64, 96))
    outputs = ExportedFile(path, to)(image(64, 96))
    assert {key: tuple(value.shape) for key, value in outputs.items()} == dict(
        boxes=(0, 4), scores=(0,), labels=(0,), mask_logits=(0, 8, 12))


def predictions(model, file, rows):
    """Return the instances that a model, and its file, predict for an image of ROWS x 96 px,
    which was read at ROWS / 0.8 x 192 px."""
    from mmdet.structures import DetDataSample
    meta = dict(img_shape=(rows, 96), ori_shape=(rows * 5 // 4, 192), scale_factor=(0.5, 0.8))
    found = []
    for each in (model, ExportedModel(model, file)):
        with torch.no_grad():
            sample, = each(image(rows, 96), [DetDataSample(metainfo=meta)], mode='predict')
        found.append(sample.pred_instances)
    return found


@pytest.mark.parametrize('name', [RETINANET, RTMDET_INS])
def test_evaluation(name, exported):
    expected, actual = predictions(*exported(name, 'onnx'), 64)
    assert len(expected.bboxes) >= 20
    torch.testing.assert_close(actual.bboxes, expected.bboxes, rtol=0, atol=0.01)
    torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=1e-4)
    assert actual.labels.equal(expected.labels)
    if name == RTMDET_INS:
        assert actual.masks.shape == (len(actual), 80, 192)
        assert (actual.masks == expected.masks).double().mean() > 0.9999
        assert 0.1 < expected.masks.double().mean() < 0.9


def test_files_that_do_not_match_are_not_kept(build_one_stage, monkeypatch, tmp_path):
    write = exporting.WRITERS['onnx']

    def write_another(part, *args):
        if 'boxes' in part.output_names:
            part.head.bbox_coder.decode.args[0].clip_border = False
        write(part, *args)

    monkeypatch.setitem(exporting.WRITERS, 'onnx', write_another)
    with pytest.raises(MismatchError, match='model.onnx was not written: bbox_head of type '
                       'RetinaHead cannot be exported to onnx: (.|\n)*detections: error'):
        export(build_one_stage(RETINANET), tmp_path / 'model.onnx', 'onnx', 'model', (64, 96))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name, options, message', [
    ('paa/paa_r50_fpn_1x_coco.py', {},
     "bbox_head's predict_by_feat is 'PAAHead': .*BaseDenseHead or .*Export its neck"),
    ('foveabox/fovea_r50_fpn_4xb4-1x_coco.py', {},
     "_predict_by_feat_single is 'FoveaHead'"),
    (RETINANET, {'model.test_cfg.nms.type': 'soft_nms'}, "nms.type is 'soft_nms'"),
    (RETINANET, {'model.test_cfg.nms.max_num': 5}, r"keys of test_cfg.nms is \['max_num'\]"),
    (RETINANET, {'model.bbox_head.bbox_coder.type': 'LegacyDeltaXYWHBBoxCoder'},
     "bbox_coder is 'LegacyDeltaXYWHBBoxCoder'.*DeltaXYWHBBoxCoder or Dist"),
])
def test_detectors_that_cannot_be_exported_whole(name, options, message, build_one_stage):
    with pytest.raises(ValueError, match=message):
        traceable(build_one_stage(name, **options))
