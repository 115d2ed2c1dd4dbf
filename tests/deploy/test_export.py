"""Exported files against the predictions of mmdet and mmseg, on small models."""
import runpy
import sys

import pytest
import torch
from support.helpers import image, run_tool

from mmeffformer import EfficientFormer, EfficientFormerV2
from mmeffformer.datasets import write_coco
from mmeffformer.deploy import export as exporting
from mmeffformer.deploy import fuse
from mmeffformer.deploy.comparison import MismatchError, compare, expected_outputs
from mmeffformer.deploy.export import export
from mmeffformer.deploy.runtimes import ExportedFile

RUNTIMES = ['onnx', 'openvino']


def assert_same(model, what, file, sizes):
    """Compare at the sizes; return the outputs of the model."""
    inputs = [image(*size) for size in sizes]
    for each in compare(model, what, file, inputs):
        assert each.matches and each.inputs == len(sizes), each
    return [expected_outputs(model, what, x) for x in inputs]


def test_neck_at_any_size(build, tmp_path):
    model, path = build('maskrcnn'), tmp_path / 'neck.onnx'
    compared = export(model, path, 'onnx', 'neck', (64, 96), dynamic=True, images=[image(50, 70)])
    assert [each.output for each in compared] == [f'feature{i}' for i in range(5)]
    assert all(each.inputs == 10 for each in compared)  # five sizes, random and given
    outputs = assert_same(model, 'neck', ExportedFile(path, 'onnx'), [(96, 96), (33, 95)])
    assert all(value.abs().max() > 0.1 for each in outputs for value in each.values())


@pytest.mark.parametrize('kind, mode', [
    (EfficientFormer, 'offset'), (EfficientFormerV2, 'offset'), (EfficientFormerV2, 'legacy')])
def test_backbone_and_its_bias_at_any_size(kind, mode, arch, randomize, tmp_path):
    model = randomize(kind(arch, bias_grid=(5, 3), bias_mode=mode)).eval()
    export(model, tmp_path / 'any.onnx', 'onnx', 'backbone', (160, 96), dynamic=True)
    export(model, tmp_path / 'one.onnx', 'onnx', 'backbone', (160, 96))
    one, any_size = (ExportedFile(tmp_path / f'{name}.onnx', 'onnx') for name in ('one', 'any'))
    assert_same(model, 'backbone', any_size, [(96, 96), (33, 95)])
    assert_same(model, 'backbone', one, [(160, 96)])
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, 'table'):
                module.table.copy_(module.table.flip(1))
    for file, size in ((one, (160, 96)), (any_size, (127, 130))):  # a wrong bias is detected
        assert not all(each.matches for each in compare(model, 'backbone', file, [image(*size)]))


@pytest.mark.parametrize('to', RUNTIMES)
def test_semantic_fpn_at_any_size(to, exported):
    model, file = exported('semfpn', to)
    assert_same(model, 'model', file, [(96, 96), (33, 95)])
    assert file(image(33, 95))['logits'].shape == (1, 7, 33, 95)


@pytest.mark.parametrize('name', [
    'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
    'swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    'pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py',
    'deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024.py',
    'ocrnet/ocrnet_hr18_4xb2-40k_cityscapes-512x1024.py',
    'apcnet/apcnet_r50-d8_4xb2-40k_cityscapes-512x1024.py',
    'fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py'])
def test_heads_without_a_neck_at_any_size(name, build_swapped, tmp_path):
    model, path = build_swapped(name), tmp_path / 'model.onnx'
    assert not model.with_neck
    export(model, path, 'onnx', 'model', (64, 96), dynamic=True)
    x = image(75, 130)
    with torch.no_grad():
        expected, = model.predict(x)
    actual = ExportedFile(path, 'onnx')(x)['logits'][0]
    limit = 1e-4 * expected.seg_logits.data.abs().max().item()
    torch.testing.assert_close(actual, expected.seg_logits.data, rtol=0, atol=limit)


@pytest.mark.parametrize('to', RUNTIMES)
def test_mask_rcnn_at_any_size(to, exported):
    model, file = exported('maskrcnn', to)
    outputs = assert_same(model, 'model', file, [(96, 96), (61, 95)])
    assert all(len(each['boxes']) >= 15 for each in outputs)
    # No region is large enough.
    assert {key: tuple(value.shape) for key, value in file(image(32, 64)).items()} == dict(
        boxes=(0, 4), scores=(0,), labels=(0,), masks=(0, 28, 28))


def test_mask_rcnn_without_detections_at_one_size(build, tmp_path):
    model, path = build('maskrcnn'), tmp_path / 'model.onnx'
    model.roi_head.bbox_head.fc_cls.bias.data[-1] = 99  # background
    export(model, path, 'onnx', 'model', (32, 64))
    assert ExportedFile(path, 'onnx')(image(32, 64))['masks'].shape == (0, 28, 28)


def test_files_that_do_not_match_are_not_kept(build, monkeypatch, tmp_path):
    model, path = build('semfpn'), tmp_path / 'model.onnx'
    path.write_text('as before')
    write = exporting.WRITERS['onnx']

    def write_another(part, *args):
        if part.output_names == ('logits', ):
            part.model.backbone.stages[3].blocks[1].token_mixer.bias.table.mul_(-3)
        write(part, *args)

    monkeypatch.setitem(exporting.WRITERS, 'onnx', write_another)
    with pytest.raises(MismatchError, match='model.onnx was not written: decode_head of type '
                       'FPNHead cannot be exported to onnx: onnx does not (.|\n)*logits: error'):
        export(model, path, 'onnx', 'model', (64, 96))
    assert path.read_text() == 'as before' and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize('options, message', [
    (dict(to='tflite'), "to='tflite': expected one of onnx"),
    (dict(path='model.xml'), 'a name that ends in .onnx for onnx'),
    (dict(what='head'), "what='head': expected one of backbone"),
    (dict(precision='bf16'), "precision 'bf16' for onnx: expected one of fp32, fp16, int8$"),
    (dict(precision='int8'), 'precision int8: expected images to calibrate on'),
    (dict(precision='fp16', calibration=[image(64, 64)]),
     'int8 with precision fp16: a file has one of them'),
    (dict(shape=(16, 64)), 'shape 16 x 64 px: expected 32 px or more'),
    (dict(to='coreml', path='model.mlpackage', dynamic=True), 'Core ML: --dynamic'),
    (dict(to='coreml', path='model.mlpackage', what='model'),
     'Core ML.*roi_align.*backbone and neck'),
])
def test_wrong_arguments(options, message, build, tmp_path):
    options = {**dict(path='model.onnx', to='onnx', what='neck', shape=(64, 64)), **options}
    with pytest.raises(ValueError, match=message):
        export(build('maskrcnn'), tmp_path / options.pop('path'), **options)
    assert not list(tmp_path.iterdir())


def test_wrong_models(arch):
    with pytest.raises(ValueError, match="Core ML: bias_mode='legacy' cannot be exported"):
        export(EfficientFormer(arch, bias_mode='legacy'), 'model.mlpackage', 'coreml', 'backbone',
               (64, 64))
    with pytest.raises(ValueError, match='the model is fused'):
        export(fuse(EfficientFormer(arch)), 'model.onnx', 'onnx', 'backbone', (64, 64))


def assert_refused(model, message, folder):
    with pytest.raises(ValueError, match=f'^model.onnx was not written: {message}'):
        export(model, folder / 'model.onnx', 'onnx', 'model', (64, 96))
    assert not list(folder.iterdir())


def test_parts_that_cannot_be_exported_are_named(build, build_swapped, monkeypatch, tmp_path):
    model = build_swapped('ccnet/ccnet_r50-d8_4xb2-40k_cityscapes-512x1024.py')
    assert_refused(model, "decode_head of type CCHead cannot be exported to onnx: .*'aten::diag'",
                   tmp_path)
    model = build('semfpn')
    forward = type(model.decode_head).forward
    monkeypatch.setattr(type(model.decode_head), 'forward',
                        lambda *args: forward(*args) + torch.rand(()))
    assert_refused(model, 'decode_head of type FPNHead cannot be exported to onnx: PyTorch '
                   'computes other values at each run', tmp_path)
    monkeypatch.setattr(type(model.neck), 'forward', lambda _, features: features[0].unknown)
    assert_refused(model, "neck of type FPN cannot be exported to onnx: .*'unknown'", tmp_path)


def test_windows(build, tmp_path):
    model = build('semfpn', **{'model.test_cfg': dict(
        mode='slide', crop_size=(64, 96), stride=(40, 60))})
    with pytest.raises(ValueError, match='shape 64 x 64 px: the model slides windows of 64 x 96'):
        export(model, tmp_path / 'model.onnx', 'onnx', 'model', (64, 64))


def test_tools(repo_root, config, build, monkeypatch, capsys, tmp_path):
    """Exported from a checkpoint, a file is evaluated by tools/test.py."""
    write_coco(tmp_path / 'data', train=1, val=3, size=(64, 64), progress=False)
    torch.save(dict(state_dict=build('maskrcnn').state_dict(), meta={}), tmp_path / 'model.pth')
    config('maskrcnn').dump(tmp_path / 'config.py')
    monkeypatch.setattr(sys, 'argv', ['export.py', *map(str, [
        tmp_path / 'config.py', tmp_path / 'model.pth', '--to', 'onnx', '--shape', 64, 64,
        '--dynamic', '--out', tmp_path / 'model.onnx'])])
    runpy.run_path(str(repo_root / 'tools/export.py'), run_name='__main__')
    printed = capsys.readouterr().out
    assert 'masks: error' in printed and f'saved as {tmp_path}/model.onnx' in printed
    meta = ExportedFile(tmp_path / 'model.onnx', 'onnx').meta
    assert meta['channels'] == 'RGB' and meta['mean'] == [123.675, 116.28, 103.53]
    printed = run_tool('tools/test.py', tmp_path / 'config.py', '--backend', 'onnx', '--model',
                       tmp_path / 'model.onnx', '--work-dir', tmp_path / 'work',
                       '--data-root', tmp_path / 'data')
    assert 'coco/segm_mAP' in printed
