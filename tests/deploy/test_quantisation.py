"""int8 files against PyTorch, on small models and few images."""
import runpy
import sys
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from support.helpers import image

from mmeffformer import EfficientFormer, EfficientFormerV2
from mmeffformer.apis.options import set_data_root
from mmeffformer.datasets import write_ade20k
from mmeffformer.deploy import export as exporting
from mmeffformer.deploy.comparison import MismatchError
from mmeffformer.deploy.export import export
from mmeffformer.deploy.quantisation import TrainingImages
from mmeffformer.deploy.runtimes import ExportedFile, openvino_core
from mmeffformer.utils.registry import MODELS

IMAGES = [image(64, 90 + i) for i in range(6)]  # four to calibrate on, two to compare on


def int8_inputs(path):
    """Count a file's operators that have an input in int8, by type."""
    counts = {}
    for op in openvino_core().read_model(str(path)).get_ops():
        sources = [value.get_source_output().get_node().get_type_name() for value in op.inputs()]
        if 'FakeQuantize' in sources:
            counts[op.get_type_name()] = counts.get(op.get_type_name(), 0) + 1
    return counts


@pytest.mark.parametrize('kind, dynamic', [(EfficientFormer, True), (EfficientFormerV2, False)])
def test_backbone_in_int8(kind, dynamic, arch, randomize, tmp_path):
    model = randomize(kind(arch, bias_grid=(5, 3))).eval()
    for mixing in [m.talking_head2 for m in model.modules() if hasattr(m, 'talking_head2')]:
        mixing.bias.data.fill_(5)  # far from zero, as NNCF corrects no other bias
    compared = export(model, tmp_path / 'int8.xml', 'openvino', 'backbone', (64, 96), dynamic,
                      IMAGES[4:], dict(calibrated_on='noise'), IMAGES[:4])
    assert [each.output for each in compared] == [f'feature{i}' for i in range(4)]
    for each in compared:  # rounded, yet near
        assert each.inputs == (10 if dynamic else 2) and each.tolerance == 0.1
        assert 0.002 < each.error < 0.1, each
    counts = int8_inputs(tmp_path / 'int8.xml')
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)
                    and m.groups == 1 and m.in_channels > 8]
    assert counts['Convolution'] >= len(convolutions) > 5
    assert counts.get('MatMul', 0) == linear_layers(model)
    assert {*counts} <= {'Convolution', 'GroupConvolution', 'MatMul', 'ShapeOf', 'Reshape'}
    fp32 = sum(parameter.numel() for parameter in model.parameters()) * 4
    assert (tmp_path / 'int8.bin').stat().st_size < 0.5 * fp32
    meta = ExportedFile(tmp_path / 'int8.xml', 'openvino').meta
    assert meta['precision'] == 'int8' and meta['calibrated_on'] == 'noise'
    assert meta['dynamic'] is dynamic
    assert sorted(path.name for path in tmp_path.iterdir()) == ['int8.bin', 'int8.xml']


def linear_layers(model):
    return sum(isinstance(module, torch.nn.Linear) for module in model.modules())


def quantised(path):
    """Count the operators of an ONNX file whose two factors are in int8, by type."""
    import onnx
    nodes = onnx.load(str(path)).graph.node
    rounded = {node.output[0] for node in nodes if node.op_type == 'DequantizeLinear'}
    return Counter(node.op_type for node in nodes if {*node.input[:2]} <= rounded)


@pytest.mark.parametrize('kind, dynamic', [(EfficientFormer, True), (EfficientFormerV2, False)])
def test_backbone_in_int8_for_onnx(kind, dynamic, arch, randomize, tmp_path):
    model, path = randomize(kind(arch, bias_grid=(5, 3))).eval(), tmp_path / 'int8.onnx'
    compared = export(model, path, 'onnx', 'backbone', (64, 96), dynamic, IMAGES[4:],
                      dict(calibrated_on='noise'), IMAGES[:4])
    assert all(0.002 < each.error < 0.1 == each.tolerance for each in compared), compared
    counts = quantised(path)
    assert counts['MatMul'] == linear_layers(model)
    assert counts['Conv'] == sum(isinstance(m, torch.nn.Conv2d) and 'talking' not in name
                                 for name, m in model.named_modules())
    meta = ExportedFile(path, 'onnx').meta
    assert meta['precision'] == 'int8' and meta['calibrated_on'] == 'noise'


def test_mask_rcnn_in_int8(build, tmp_path):
    path = tmp_path / 'model.xml'
    compared = export(build('maskrcnn'), path, 'openvino', 'model', (64, 96), False, IMAGES[4:],
                      {}, IMAGES[:4])
    assert [each.output for each in compared] == ['detections', 'boxes', 'masks']
    assert all(each.matches and each.error > 0 for each in compared)
    counts = int8_inputs(path)
    assert {*counts} <= {'Convolution', 'ConvolutionBackpropData', 'MatMul', 'ShapeOf', 'Reshape'}
    assert counts['ConvolutionBackpropData'] == 1  # of the mask head


def test_int8_files_that_do_not_match_are_not_kept(arch, randomize, monkeypatch, tmp_path):
    model, other = (randomize(EfficientFormer(arch), seed).eval() for seed in (0, 1))
    monkeypatch.setattr(exporting, 'write_rounded', lambda source, target, *_: export(
        other, target, 'openvino', 'backbone', (64, 96)))
    with pytest.raises(MismatchError, match='int8.xml was not written: openvino in int8 does not'):
        export(model, tmp_path / 'int8.xml', 'openvino', 'backbone', (64, 96), False, IMAGES[4:],
               {}, IMAGES[:1])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def segmentor(repo_root, tmp_path):
    """A config, with a dataset of six training images of 48 x 90 px."""
    write_ade20k(tmp_path / 'data', train=6, val=1, size=(48, 90), progress=False)
    cfg = Config.fromfile(repo_root / 'tests/data/semfpn_tiny.py')
    set_data_root(cfg, str(tmp_path / 'data'))
    init_default_scope(cfg.default_scope)
    return cfg


def test_training_images_are_preprocessed_as_in_testing(segmentor, tmp_path):
    preprocessor = MODELS.build(segmentor.model.data_preprocessor)
    images = TrainingImages(segmentor, preprocessor)
    assert images.source == f'BaseSegDataset {tmp_path}/data/'
    files = sorted((tmp_path / 'data/images/training').iterdir())
    assert len(images) == len(files) == 6
    for file, actual in zip(files, images):
        pixels = cv2.resize(cv2.imread(str(file)), (96, 51))[..., ::-1].astype(np.float32)
        pixels = (pixels - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
        expected = torch.zeros(1, 3, 64, 96)  # padded to multiples of 32 px
        expected[..., :51, :] = torch.from_numpy(pixels.transpose(2, 0, 1))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    two, four = images.split(2)
    assert (len(two), len(four)) == (2, 4) and not {*two.indices} & {*four.indices}
    for count in (0, 3):
        with pytest.raises(ValueError, match=f'int8: {count} images.*of 6: expected 1 to 2'):
            images.split(count)
    set_data_root(segmentor, str(tmp_path / 'gone'))
    with pytest.raises(FileNotFoundError, match='data set of this config is not there'):
        TrainingImages(segmentor, preprocessor)
    segmentor.pop('train_dataloader')
    with pytest.raises(ValueError, match='int8: expected train_dataloader.dataset with'):
        TrainingImages(segmentor, preprocessor)


def test_tool(segmentor, repo_root, randomize, monkeypatch, capsys, tmp_path):
    model = randomize(revert_sync_batchnorm(MODELS.build(segmentor.model)))
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'model.pth')
    segmentor.dump(tmp_path / 'config.py')

    def run(*options):
        monkeypatch.setattr('sys.argv', ['export.py', *map(str, [
            tmp_path / 'config.py', tmp_path / 'model.pth', '--shape', 64, 96, '--int8',
            *options])])
        runpy.run_path(str(repo_root / 'tools/export.py'), run_name='__main__')
        return capsys.readouterr().out

    printed = run('--to', 'openvino', '--int8-images', 2, '--out', tmp_path / 'int8.xml')
    assert 'logits: error' in printed and 'tolerance 0.1, over 4 inputs' in printed
    meta = ExportedFile(tmp_path / 'int8.xml', 'openvino').meta
    assert meta['calibrated_on'] == f'2 images of BaseSegDataset {tmp_path}/data/'
    with pytest.raises(SystemExit, match='int8 with precision fp16: a file has one of them'):
        run('--to', 'onnx', '--precision', 'fp16', '--out', tmp_path / 'int8.onnx')
    monkeypatch.setitem(sys.modules, 'nncf', None)
    with pytest.raises(SystemExit, match='int8 needs the package nncf'):
        run('--to', 'openvino', '--out', tmp_path / 'int8.xml')
