"""Whole models in bfloat16: what is computed in it, what is not, and how far results are off."""
from copy import deepcopy
from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from support.detectors import NARROW
from support.helpers import image
from torch import nn

from mmeffformer import EfficientFormer, EfficientFormerV2, swap_backbone
from mmeffformer.apis.smoke_test import build_model
from mmeffformer.deploy import fuse, half_precision
from mmeffformer.models import precision

TINY = dict(widths=(8, 16, 16, 24), depths=(1, 1, 2, 3), attention_blocks=(0, 0, 1, 2))
KINDS = [EfficientFormer, EfficientFormerV2]
MMDET = Path(mmdet.__file__).parent / '.mim/configs'
META = dict(img_shape=(64, 96), ori_shape=(80, 120), pad_shape=(64, 96),
            batch_input_shape=(64, 96), scale_factor=(.8, .8))
pytestmark = pytest.mark.usefixtures('without_gradients')


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


def distance(found, expected) -> float:
    """Return the norm of the difference, relative to that of ``expected``."""
    return ((found - expected).norm() / expected.norm()).item()


def built(name, randomize, **edits):
    """Return a small model of one of this project's configs, or of mmdet's."""
    if 'effformer' in name:
        cfg = Config.fromfile(f'configs/{name}.py')
        cfg.model.backbone.update(arch=TINY, init_cfg=None)
        cfg.model.neck.in_channels = [*TINY['widths']]
    else:
        cfg = swap_backbone(Config.fromfile(MMDET / f'{name}.py'), TINY)
    cfg.merge_from_dict(edits)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = build_model(cfg)
    randomize(model.backbone, 1)
    return model.eval()


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_a_backbone_computes_as_under_autocast(kind, fused, randomize):
    model, x = randomize(kind(TINY), 1).eval(), image(96, 128)
    exact = model(x)
    if fused:
        fuse(model)
    with torch.autocast('cpu', torch.bfloat16):
        expected = model(x)
    half = half_precision(deepcopy(model))
    for _ in range(2):  # the second call finds expanded bias
        for found, each, precise in zip(half(x), expected, exact):
            assert found.dtype == torch.float32 and torch.equal(found, each.float())
            assert 1e-4 < distance(found, precise) < .02
    layers = [m for m in half.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert {p.dtype for m in layers for p in m.parameters()} == {torch.bfloat16}
    others = {p.dtype for name, p in half.named_parameters() if 'table' in name or 'norm' in name}
    assert others == {torch.float32}


def test_a_copy_and_a_second_call(randomize):
    half = half_precision(randomize(EfficientFormer(TINY)))
    copy = half_precision(deepcopy(half))
    expected = half(image(64, 64))
    assert all(map(torch.equal, copy(image(64, 64)), expected))
    copy.stem[0].conv.weight.zero_()
    assert not torch.equal(copy(image(64, 64))[0], expected[0])
    assert torch.equal(half(image(64, 64))[0], expected[0])


@pytest.mark.parametrize('fused', [False, True])
def test_a_segmentor(fused, randomize, repo_root, monkeypatch):
    monkeypatch.chdir(repo_root)
    model = built('segmentation/semfpn_effformer_l1', randomize)
    expected = model(image(64, 96, 2), mode='predict')
    dtypes = []
    model.decode_head.conv_seg.register_forward_hook(lambda *given: dtypes.append(given[2].dtype))
    if fused:
        fuse(model)
    for found, each in zip(half_precision(model)(image(64, 96, 2), mode='predict'), expected):
        assert found.seg_logits.data.dtype == torch.float32
        assert distance(found.seg_logits.data, each.seg_logits.data) < .02
        same = found.pred_sem_seg.data == each.pred_sem_seg.data
        assert same.float().mean() > .95
    assert dtypes == [torch.bfloat16]


def test_regions_keep_their_coordinates(randomize, repo_root, monkeypatch):
    monkeypatch.chdir(repo_root)
    model = built('detection/maskrcnn_effformer_l1', randomize, **NARROW, **{
        'model.test_cfg.rpn.max_per_img': 30, 'model.test_cfg.rcnn.score_thr': 0.})
    seen = []
    for part in model.modules():
        if isinstance(part, SingleRoIExtractor):
            part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    samples = [DetDataSample(metainfo=META)]
    half = half_precision(fuse(deepcopy(model)))
    expected, found = (each(image(64, 96), deepcopy(samples), mode='predict')[0].pred_instances
                       for each in (model, half))
    for features, regions in seen:
        assert {x.dtype for x in (*features, regions)} == {torch.float32}
        assert not torch.equal(regions, regions.bfloat16().float())  # which has 8 bits
    assert len(seen) == 4 and len(found) == len(expected) == 100
    assert found.scores.dtype == found.bboxes.dtype == torch.float32
    assert found.masks.shape == (100, 80, 120) and found.masks.any()
    assert abs(found.scores.sum() / expected.scores.sum() - 1) < .02


@pytest.fixture
def recorded(monkeypatch):
    """A function that returns what a model's head gives to ``predict_by_feat``, which is not
    computed further."""

    def predict(model):
        given = []
        monkeypatch.setattr(model.bbox_head, 'predict_by_feat', lambda *args, **_: given.extend(
            x for xs in args[:2] for x in xs) or [InstanceData()])
        model(image(64, 96), [DetDataSample(metainfo=META)], mode='predict')
        return given

    return predict


@pytest.mark.parametrize('name', ['retinanet/retinanet_r18_fpn_1x_coco',
                                  'rtmdet/rtmdet_tiny_8xb32-300e_coco'])
def test_one_stage_detectors(name, randomize, recorded):
    model = built(name, randomize, **{f'model.{key}': 16 for key in (
        'neck.out_channels', 'bbox_head.in_channels', 'bbox_head.feat_channels')})
    expected = recorded(model)
    half = half_precision(fuse(model))
    for found, each in zip(recorded(half), expected):
        assert found.dtype == torch.float32 and 0 < distance(found, each) < .02


def test_layers_that_are_called_outside_of_their_head(randomize, recorded):
    name = 'deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco'
    model = built(name, randomize, **{
        'model.num_queries': 10, 'model.encoder.num_layers': 1, 'model.decoder.num_layers': 1})
    scores, boxes = recorded(half_precision(model))
    assert scores.shape == (1, 10, 80) and boxes.shape == (1, 10, 4)
    # bfloat16 has no more than multiples of a sixteenth of them.
    assert (boxes != boxes.bfloat16()).double().mean() > .5


def test_the_warning_for_slow_cpus(monkeypatch):
    printed = []
    monkeypatch.setattr(precision, 'print_log', lambda text, **_: printed.append(text))
    for answer in (True, False):
        monkeypatch.setattr(precision, 'has_bf16', lambda answer=answer: answer)
        half_precision(EfficientFormer(TINY))
    assert printed == ['this CPU has no bfloat16 instructions: bf16 is slower here than fp32']


@pytest.mark.parametrize('dtype', ['fp16', 'int8'])
def test_other_types(dtype):
    with pytest.raises(ValueError, match=f"'{dtype}': expected bf16, or fp16 for a model on a"):
        half_precision(EfficientFormer(TINY), dtype)
