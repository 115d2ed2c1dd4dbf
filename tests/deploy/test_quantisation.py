"""int8 files against PyTorch, on small networks and few images."""
import runpy
import sys

import cv2
import numpy as np
import pytest
import torch
from mmeffformer.deploy.quantise import TrainingImages
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from support.helpers import image

from mmeffformer import EfficientFormer, EfficientFormerV2
from mmeffformer.apis.options import set_data_root
from mmeffformer.datasets import write_ade20k
from mmeffformer.deploy.export import MismatchError, compare, export
from mmeffformer.deploy.runtimes import ExportedFile
from mmeffformer.utils.registry import MODELS

TINY = dict(widths=(8, 16, 16, 24), depths=(1, 1, 2, 3), attention_blocks=(0, 0, 1, 2))
CONFIG = 'tests/data/semfpn_tiny.py'
IMAGES = [image(64, 90 + i) for i in range(6)]  # four to calibrate on, two to compare on


def int8_inputs(path):
    """Count the operators of a file by type, those with an input that is rounded to int8."""
    import openvino
    counts = {}
    for op in openvino.Core().read_model(str(path)).get_ops():
        sources = [value.get_source_output().get_node().get_type_name() for value in op.inputs()]
        if 'FakeQuantize' in sources:
            counts[op.get_type_name()] = counts.get(op.get_type_name(), 0) + 1
    return counts


@pytest.mark.parametrize('kind, dynamic', [(EfficientFormer, True), (EfficientFormerV2, False)])
def test_a_backbone_in_int8(kind, dynamic, randomize, tmp_path):
    model = randomize(kind(TINY, bias_grid=(5, 3))).eval()
    for mixing in [m.talking_head2 for m in model.modules() if hasattr(m, 'talking_head2')]:
        mixing.bias.data.fill_(5)  # far from zero, as NNCF corrects no other bias
    export(model, tmp_path / 'fp32.xml', 'openvino', 'backbone', (64, 96), dynamic)
    compared = export(model, tmp_path / 'int8.xml', 'openvino', 'backbone', (64, 96), dynamic,
                      IMAGES[4:], dict(calibrated_on='noise'), IMAGES[:4])
    assert [each.output for each in compared] == [f'feature{i}' for i in range(4)]
    for each in compared:  # rounded, yet near
        assert each.int8 and each.inputs == (10 if dynamic else 2)
        assert 0.002 < each.error / each.reference < 0.1, each
    counts = int8_inputs(tmp_path / 'int8.xml')
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)
                    and m.groups == 1 and m.in_channels > 8]
    assert counts['Convolution'] >= len(convolutions) > 5 and counts['MatMul'] >= 4
    assert {*counts} <= {'Convolution', 'GroupConvolution', 'MatMul', 'ShapeOf', 'Reshape'}
    small, large = ((tmp_path / f'{name}.bin').stat().st_size for name in ('int8', 'fp32'))
    assert small < 0.5 * large
    file = ExportedFile(tmp_path / 'int8.xml', 'openvino')
    assert file.meta['precision'] == 'int8' and file.meta['calibrated_on'] == 'noise'
    assert file.meta['dynamic'] is dynamic
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'fp32.bin', 'fp32.xml', 'int8.bin', 'int8.xml']


@pytest.fixture
def detector(repo_root, randomize):
    """A small Mask R-CNN with random weights."""
    cfg = Config.fromfile(repo_root / 'configs/demo/maskrcnn_effformer_l1_shapes.py')
    cfg.model.backbone.update(arch=TINY, bias_grid=3)
    cfg.model.neck.in_channels = list(TINY['widths'])
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    randomize(model.backbone)
    for part in (model.rpn_head.rpn_cls, model.roi_head.bbox_head.fc_cls):
        part.weight.data *= 9
    return model


def test_mask_rcnn_in_int8(detector, tmp_path):
    path = tmp_path / 'model.xml'
    compared = export(detector, path, 'openvino', 'model', (64, 96), False, IMAGES[4:], {},
                      IMAGES[:4])
    assert [each.output for each in compared] == ['scores of detections', 'boxes', 'masks']
    assert all(each.matches and each.error > 0 for each in compared)
    counts = int8_inputs(path)
    assert {*counts} <= {'Convolution', 'ConvolutionBackpropData', 'MatMul', 'ShapeOf', 'Reshape'}
    assert counts['ConvolutionBackpropData'] == 1  # of the mask head


def test_detections_of_int8_weigh_as_much_as_they_score(detector, monkeypatch):
    boxes = torch.tensor([[0., 0., 40., 40.], [50., 0., 90., 40.], [0., 50., 40., 90.]])
    found = dict(boxes=boxes, scores=torch.tensor([0.9, 0.5, 0.1]), labels=torch.arange(3))
    other = dict(boxes=boxes.flip(0) + 2, scores=torch.tensor([0.1, 0.5, 0.8]),
                 labels=torch.tensor([2, 4, 0]))  # the second is none of the first's
    monkeypatch.setattr('mmeffformer.deploy.export.expected_outputs', lambda *_: found)
    scores, paired = compare(detector, 'model', lambda _: other, [image(96, 96)], int8=True)
    assert scores.error == pytest.approx(0.1 + 2 * 0.5) and not scores.matches
    assert scores.reference == pytest.approx(1.5 + 1.4)
    assert str(scores) == 'int8 scores of detections: error 38 %, over 1 inputs'
    assert paired.output == 'boxes' and paired.matches
    assert paired.error == pytest.approx(2 * 8 ** 0.5)


def test_what_is_far_off_is_not_kept(randomize, tmp_path):
    model = randomize(EfficientFormer(TINY)).eval()
    with pytest.raises(MismatchError, match='int8.xml was not written: openvino in int8 does not'):
        export(model, tmp_path / 'int8.xml', 'openvino', 'backbone', (64, 96), False, IMAGES[4:],
               {}, [IMAGES[0] * 0.01])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def segmentor(repo_root, tmp_path):
    """A config, and its data set of six training images of 48 x 90 px."""
    write_ade20k(tmp_path / 'data', train=6, val=1, size=(48, 90), progress=False)
    cfg = Config.fromfile(repo_root / CONFIG)
    set_data_root(cfg, str(tmp_path / 'data'))
    init_default_scope(cfg.default_scope)
    return cfg


def test_training_images_are_as_in_a_test(segmentor, tmp_path):
    preprocessor = MODELS.build(segmentor.model.data_preprocessor)
    images = TrainingImages(segmentor, preprocessor)
    assert images.source == f'BaseSegDataset {tmp_path}/data/'
    files = sorted((tmp_path / 'data/images/training').iterdir())
    assert len(images) == len(files) == 6
    for file, actual in zip(files, images):
        pixels = cv2.resize(cv2.imread(str(file)), (96, 51))[..., ::-1].astype(np.float32)
        pixels = (pixels - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
        expected = torch.zeros(1, 3, 64, 96)  # padded to whole cells of 32 px
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
    with pytest.raises(ValueError, match='int8: expected train_dataloader.dataset and test'):
        TrainingImages(segmentor, preprocessor)


def test_the_tool(segmentor, repo_root, randomize, monkeypatch, capsys, tmp_path):
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
    assert 'int8 logits: error' in printed and 'over 4 inputs' in printed
    meta = ExportedFile(tmp_path / 'int8.xml', 'openvino').meta
    assert meta['calibrated_on'] == f'2 images of BaseSegDataset {tmp_path}/data/'
    with pytest.raises(SystemExit, match='int8: made for openvino, not for onnx'):
        run('--to', 'onnx', '--out', tmp_path / 'int8.onnx')
    monkeypatch.setitem(sys.modules, 'nncf', None)
    with pytest.raises(SystemExit, match='int8 needs the package nncf'):
        run('--to', 'openvino', '--out', tmp_path / 'int8.xml')
