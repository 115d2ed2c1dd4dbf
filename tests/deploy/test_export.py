"""Exported files against mmdet's and mmseg's own predictions, on small networks."""
import runpy
import sys

import pytest
import torch
from mmeffformer.deploy.serve import ExportedModel
from mmeffformer.deploy.traceable import traceable
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from support.helpers import image, run_code, run_tool

from mmeffformer import EfficientFormer, EfficientFormerV2
from mmeffformer.datasets import write_coco
from mmeffformer.deploy import export as exporting
from mmeffformer.deploy import fuse
from mmeffformer.deploy.export import MismatchError, compare, expected_outputs, export
from mmeffformer.deploy.runtimes import SUFFIXES, ExportedFile
from mmeffformer.utils.registry import MODELS

KINDS = ['EfficientFormer', 'EfficientFormerV2']
RUN_HERE = ['onnx', 'openvino']
PAIRS = [*zip(KINDS, reversed(RUN_HERE))]  # each of both, in half the time
TINY = dict(widths=(8, 16, 16, 24), depths=(1, 1, 2, 3), attention_blocks=(0, 0, 1, 2))
# Heads of a detector take most of the time.
NARROW = {f'model.{key}': 32 for key in (
    'neck.out_channels', 'rpn_head.in_channels', 'rpn_head.feat_channels',
    'roi_head.bbox_roi_extractor.out_channels', 'roi_head.mask_roi_extractor.out_channels',
    'roi_head.bbox_head.in_channels', 'roi_head.bbox_head.fc_out_channels',
    'roi_head.mask_head.in_channels', 'roi_head.mask_head.conv_out_channels')}
SIZES = [(96, 96), (33, 95)]  # beside those at which every export is compared


@pytest.fixture
def build(repo_root, randomize):
    """A function that returns a small Mask R-CNN or Semantic FPN with random weights."""

    def built(name: str, kind: str = 'EfficientFormer', **options):
        cfg = Config.fromfile(repo_root / f'configs/demo/{name}_effformer_l1_shapes.py')
        cfg.model.backbone.update(type=f'mmeffformer.{kind}', arch=TINY, bias_grid=3)
        cfg.model.neck.in_channels = list(TINY['widths'])
        if name == 'maskrcnn':
            cfg.merge_from_dict(NARROW)
        cfg.merge_from_dict(options)
        init_default_scope(cfg.default_scope)
        torch.manual_seed(0)
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
        randomize(model.backbone)
        if name == 'maskrcnn':
            # Scores and boxes apart from each other, that rounding decides nothing in nms.
            for part in (model.rpn_head.rpn_cls, model.roi_head.bbox_head.fc_cls,
                         model.roi_head.bbox_head.fc_reg):
                part.weight.data *= 9
        return model.eval()

    return built


def assert_same(model, what, file, sizes=SIZES):
    """Compare at the sizes and return how many detections there were."""
    inputs = [image(*size) for size in sizes]
    for each in compare(model, what, file, inputs):
        assert each.matches and each.inputs == len(sizes) and each.reference > 0, each
    return [len(expected_outputs(model, what, x).get('boxes', ())) for x in inputs]


@pytest.mark.parametrize('kind, to', [*zip(KINDS, RUN_HERE)])
def test_features_at_any_size(kind, to, build, tmp_path):
    model, path = build('maskrcnn', kind), tmp_path / f'neck{SUFFIXES[to]}'
    compared = export(model, path, to, 'neck', (64, 96), dynamic=True, images=[image(50, 70)])
    assert [each.output for each in compared] == [f'feature{i}' for i in range(5)]
    assert all(each.inputs == 10 for each in compared)  # five sizes, random and given
    assert_same(model, 'neck', ExportedFile(path, to))


@pytest.mark.parametrize('mode', ['offset', 'legacy'])
@pytest.mark.parametrize('kind', [EfficientFormer, EfficientFormerV2])
def test_a_backbone_alone_and_its_bias_at_any_size(kind, mode, randomize, tmp_path):
    model = randomize(kind(TINY, bias_grid=(5, 3), bias_mode=mode)).eval()
    export(model, tmp_path / 'any.onnx', 'onnx', 'backbone', (160, 96), dynamic=True)
    export(model, tmp_path / 'one.onnx', 'onnx', 'backbone', (160, 96))
    one, any_size = (ExportedFile(tmp_path / f'{name}.onnx', 'onnx') for name in ('one', 'any'))
    assert_same(model, 'backbone', any_size)
    assert_same(model, 'backbone', one, [(160, 96)])
    with pytest.raises(ValueError, match='takes images of 160 x 96 px.*has 96 x 96'):
        one(image(96, 96))
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, 'table'):
                module.table.copy_(module.table.flip(1))
    for file, size in ((one, (160, 96)), (any_size, (127, 130))):  # a wrong bias is seen
        assert not all(each.matches for each in compare(model, 'backbone', file, [image(*size)]))


@pytest.mark.parametrize('kind, to', PAIRS)
def test_semantic_fpn_at_any_size(kind, to, build, tmp_path):
    model, path = build('semfpn', kind), tmp_path / f'model{SUFFIXES[to]}'
    export(model, path, to, 'model', (64, 96), dynamic=True)
    file = ExportedFile(path, to)
    assert_same(model, 'model', file)
    assert file(image(33, 95))['logits'].shape == (1, 7, 33, 95)


@pytest.mark.parametrize('kind, to', PAIRS)
def test_mask_rcnn_at_any_size(kind, to, build, tmp_path):
    model, path = build('maskrcnn', kind), tmp_path / f'model{SUFFIXES[to]}'
    export(model, path, to, 'model', (64, 96), dynamic=True)
    assert min(assert_same(model, 'model', ExportedFile(path, to))) >= 50


@pytest.mark.parametrize('where', ['regions', 'detections'])
@pytest.mark.parametrize('to', RUN_HERE)
def test_mask_rcnn_that_finds_nothing(to, where, build, tmp_path):
    model, path = build('maskrcnn'), tmp_path / f'model{SUFFIXES[to]}'
    if where == 'regions':  # none of 64 px, but in the larger image that is traced
        model.rpn_head.test_cfg.min_bbox_size = 64
    else:
        model.roi_head.bbox_head.fc_cls.bias.data[-1] = 99  # background
    export(model, path, to, 'model', (32, 64), dynamic=where == 'regions')
    outputs = ExportedFile(path, to)(image(32, 64))
    assert {key: tuple(value.shape) for key, value in outputs.items()} == dict(
        boxes=(0, 4), scores=(0,), labels=(0,), masks=(0, 28, 28))


@pytest.mark.parametrize('name', ['maskrcnn', 'semfpn'])
def test_a_file_predicts_in_the_place_of_its_model(name, build, tmp_path):
    model, path = build(name), tmp_path / 'model.onnx'
    export(model, path, 'onnx', 'model', (64, 96), dynamic=True)
    served = ExportedModel(model, ExportedFile(path, 'onnx'))
    assert not served.state_dict()
    if name == 'maskrcnn':
        from mmdet.structures import DetDataSample as Sample
        kept = dict(scale_factor=(0.5, 0.8))
    else:
        from mmseg.structures import SegDataSample as Sample
        kept = {}
    pixels = (image(60, 96)[0] * 60 + 120).clamp(0, 255).byte()
    found = []
    for each in (model, served):
        sample = Sample(metainfo=dict(img_shape=(60, 96), ori_shape=(75, 192), **kept))
        with torch.no_grad():
            found += each.test_step(dict(inputs=[pixels], data_samples=[sample]))
    theirs, ours = found
    if name == 'semfpn':
        torch.testing.assert_close(ours.seg_logits.data, theirs.seg_logits.data, rtol=0, atol=1e-3)
        same = ours.pred_sem_seg.data == theirs.pred_sem_seg.data
        assert same.shape == (1, 75, 192) and same.double().mean() > 0.999
    else:
        # mmdet keeps boxes within 60 rows while it looks for them, the file within the 64
        # that it sees: both are cut in the end.
        ours, theirs = ours.pred_instances, theirs.pred_instances
        assert ours.bboxes.shape == theirs.bboxes.shape and ours.masks.shape[1:] == (75, 192)
        assert ours.bboxes[:, 1::2].max() <= 75 and ours.bboxes[:, 0::2].max() <= 192
        far = (ours.bboxes[:, None] - theirs.bboxes).abs().amax(2)
        far = far + 1e3 * (ours.labels[:, None] != theirs.labels)
        near, twin = far.min(1)
        assert (near < 0.1).double().mean() > 0.5
        same = ours.masks[near < 0.1] == theirs.masks[twin][near < 0.1]
        assert same.double().mean() > 0.999
    with pytest.raises(ValueError, match='predicts only'):
        served(image(64, 96), mode='loss')


def test_what_does_not_match_is_not_kept(build, monkeypatch, tmp_path):
    model, path = build('semfpn'), tmp_path / 'new' / 'model.onnx'
    write = exporting.WRITERS['onnx']

    def write_another(part, *args):
        part.backbone.stages[3].blocks[1].token_mixer.bias.table.mul_(-3)
        write(part, *args)

    monkeypatch.setitem(exporting.WRITERS, 'onnx', write_another)
    with pytest.raises(MismatchError, match='model.onnx was not written(.|\n)*logits: largest'):
        export(model, path, 'onnx', 'model', (64, 96))
    assert not list(path.parent.iterdir())
    path.write_text('as before')
    with pytest.raises(MismatchError):
        export(model, path, 'onnx', 'model', (64, 96))
    assert path.read_text() == 'as before' and list(path.parent.iterdir()) == [path]


def test_detections_without_counterpart_count(build):
    model = build('maskrcnn')
    part = traceable(model, 'model')

    def run(x):
        outputs = dict(zip(part.output_names, part(x)))
        outputs['boxes'][:3] += 5
        return {name: value.flip(0) for name, value in outputs.items()}  # in any order

    with torch.no_grad():
        strays, *others = compare(model, 'model', run, [image(64, 96)])
    assert strays.error == 6 and strays.reference == 200 and not strays.matches
    assert str(strays) == 'detections without counterpart: 6 of 200, over 1 inputs'
    assert [each.output for each in others] == ['boxes', 'scores', 'labels', 'masks']
    assert all(each.matches for each in others)


@pytest.mark.parametrize('int8', [False, True])
@pytest.mark.parametrize('wrong', [float('nan'), float('inf')])
def test_what_is_not_finite_does_not_match(wrong, int8):
    model, x = EfficientFormer(TINY).eval(), image(64, 64)

    def run(x):
        outputs = expected_outputs(model, 'backbone', x)
        outputs['feature2'][0, 0, 0, 0] = wrong
        return outputs

    compared = {each.output: each for each in compare(model, 'backbone', run, [x, x], int8)}
    assert [name for name, each in compared.items() if not each.matches] == ['feature2']


@pytest.mark.parametrize('options, message', [
    (dict(to='tflite'), "to='tflite': expected one of onnx"),
    (dict(path='model.xml'), 'a file for onnx ends in .onnx'),
    (dict(what='head'), "what='head': expected one of backbone"),
    (dict(shape=(16, 64)), 'shape of 16 x 64 px: both must be at least 32'),
    (dict(to='coreml', path='model.mlpackage', dynamic=True), 'Core ML: --dynamic'),
])
def test_wrong_arguments(options, message, build, tmp_path):
    options = {**dict(path='model.onnx', to='onnx', what='neck', shape=(64, 64)), **options}
    with pytest.raises(ValueError, match=message):
        export(build('semfpn'), tmp_path / options.pop('path'), **options)
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_exported_whole(build):
    with pytest.raises(ValueError, match="test_cfg.mode is 'slide'"):
        traceable(build('semfpn', **{'model.test_cfg.mode': 'slide'}))
    with pytest.raises(ValueError, match="nms.type is 'soft_nms'.*Export its neck"):
        traceable(build('maskrcnn', **{'model.test_cfg.rcnn.nms.type': 'soft_nms'}))
    with pytest.raises(ValueError, match='EfficientFormer has no neck; export its backbone'):
        traceable(EfficientFormer(TINY))
    with pytest.raises(ValueError, match='Core ML.*roi_align.*backbone and neck'):
        export(build('maskrcnn'), 'model.mlpackage', 'coreml', 'model', (64, 64))
    with pytest.raises(ValueError, match="Core ML: bias_mode='legacy' cannot be exported"):
        export(EfficientFormer(TINY, bias_mode='legacy'), 'model.mlpackage', 'coreml',
               'backbone', (64, 64))
    with pytest.raises(ValueError, match='fused already'):
        export(fuse(build('semfpn')), 'model.onnx', 'onnx', 'neck', (64, 64))


@pytest.mark.parametrize('to', ['onnx', 'openvino'])
@pytest.mark.parametrize('content', [b'', b'junk', b'<?xml version="1.0"?><net>', bytes(1000)])
def test_broken_files(to, content, tmp_path):
    path = tmp_path / f'broken{SUFFIXES[to]}'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf'broken\{SUFFIXES[to]}.*(is broken|was not written)'):
        ExportedFile(path, to)


def test_files_that_cannot_be_opened(build, monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="'none.onnx' does not exist"):
        ExportedFile('none.onnx', 'onnx')
    model, path = build('semfpn'), tmp_path / 'neck.onnx'
    export(model, path, 'onnx', 'neck', (64, 64))
    with pytest.raises(ValueError, match='no file for openvino: expected one that ends in .xml'):
        ExportedFile(path, 'openvino')
    with pytest.raises(ValueError, match='outputs feature0.*logits are needed'):
        ExportedModel(model, ExportedFile(path, 'onnx'))
    import onnx
    proto = onnx.load(str(path))
    del proto.metadata_props[:]
    onnx.save(proto, str(path))
    with pytest.raises(ValueError, match='was not written by tools/export.py'):
        ExportedFile(path, 'onnx')
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ValueError, match='onnx needs the package onnxruntime'):
        ExportedFile(path, 'onnx')


CLOSE = """
import faulthandler, gc, signal, sys
from mmeffformer.deploy.runtimes import ExportedFile
faulthandler.enable()  # sets a stack for signals too
signal.signal(signal.SIGCHLD, lambda *_: None)  # as a dataloader's
first, second = (ExportedFile(sys.argv[1], 'openvino') for _ in range(2))
del first
gc.collect()
del second
gc.collect()
signal.raise_signal(signal.SIGCHLD)
"""


def test_openvino_files_end_in_any_order(randomize, tmp_path):
    model, path = randomize(EfficientFormer(TINY)).eval(), tmp_path / 'backbone.xml'
    export(model, path, 'openvino', 'backbone', (32, 32))
    run_code(CLOSE, path)


@pytest.mark.parametrize('name, kind, what', [('maskrcnn', 'EfficientFormer', 'neck'),
                                              ('semfpn', 'EfficientFormerV2', 'model')])
def test_core_ml(name, kind, what, build, tmp_path):
    import coremltools
    model, path = build(name, kind), tmp_path / 'model.mlpackage'
    export(model, path, 'coreml', what, (64, 95))
    spec = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec().description
    shapes = {each.name: list(each.type.multiArrayType.shape)
              for each in [*spec.input, *spec.output]}
    expected = expected_outputs(model, what, image(64, 95))
    assert shapes.pop('image') == [1, 3, 64, 95]
    assert shapes == {key: list(value.shape) for key, value in expected.items()}


def test_the_tools(repo_root, build, monkeypatch, capsys, tmp_path):
    """Exported from a checkpoint, a file is evaluated as the checkpoint is."""
    config = repo_root / 'configs/demo/maskrcnn_effformer_l1_shapes.py'
    write_coco(tmp_path / 'data', train=1, val=3, size=(64, 64), progress=False)
    model = build('maskrcnn')
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'model.pth')
    cfg = Config.fromfile(config)
    cfg.model.backbone.update(arch=TINY, bias_grid=3)
    cfg.model.neck.in_channels = list(TINY['widths'])
    cfg.merge_from_dict(NARROW)
    cfg.dump(tmp_path / 'config.py')
    monkeypatch.setattr(sys, 'argv', ['export.py', *map(str, [
        tmp_path / 'config.py', tmp_path / 'model.pth', '--to', 'onnx', '--shape', 64, 64,
        '--dynamic', '--out', tmp_path / 'model.onnx'])])
    runpy.run_path(str(repo_root / 'tools/export.py'), run_name='__main__')
    out = capsys.readouterr().out
    assert 'masks: largest error' in out and f'saved as {tmp_path}/model.onnx' in out
    meta = ExportedFile(tmp_path / 'model.onnx', 'onnx').meta
    assert meta['channels'] == 'RGB' and meta['mean'] == [123.675, 116.28, 103.53]
    out = run_tool('tools/test.py', tmp_path / 'config.py', '--backend', 'onnx', '--model',
                   tmp_path / 'model.onnx', '--work-dir', tmp_path / 'work',
                   '--data-root', tmp_path / 'data')
    assert 'coco/segm_mAP' in out
