"""Fused networks against themselves before, with random statistics, scales and biases."""
import json
from copy import deepcopy

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from support.helpers import assert_close, image, run_tool
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmeffformer import EfficientFormer, EfficientFormerV2
from mmeffformer.datasets import write_ade20k
from mmeffformer.deploy import fuse
from mmeffformer.utils.registry import MODELS

EVERY = [(EfficientFormer, 'l1'), (EfficientFormer, 'l3'), (EfficientFormerV2, 's0'),
         (EfficientFormerV2, 's2')]
TINY = dict(widths=(8, 16, 16, 24), depths=(1, 1, 2, 3), attention_blocks=(0, 0, 1, 2))


@pytest.mark.parametrize('bias_mode', ['offset', 'legacy'])
@pytest.mark.parametrize('kind, arch', EVERY)
@torch.no_grad()
def test_a_backbone_stays_the_same(kind, arch, bias_mode, randomize):
    model = randomize(kind(arch, bias_mode=bias_mode)).double().eval()
    x = image(160, 97, dtype=torch.float64)
    expected = model(x)
    fused = deepcopy(model).switch_to_deploy()
    assert_close(fused(x), expected, 1e-9)
    assert not [m for m in fused.modules() if isinstance(m, _BatchNorm)]
    scales = [key for key in fused.state_dict() if 'layer_scale' in key]
    assert all(key.endswith('layer_scale1') for key in scales)  # of pooling, not linear before it
    assert bool(scales) == (kind is EfficientFormer)
    before = {key: value.clone() for key, value in fused.state_dict().items()}
    assert fused.switch_to_deploy() is fused
    assert all(torch.equal(value, before[key]) for key, value in fused.state_dict().items())
    assert_close([f.float() for f in fused.float()(x.float())], [e.float() for e in expected],
                 1e-4)


@pytest.mark.parametrize('kind', [EfficientFormer, EfficientFormerV2])
def test_fused_weights_load_into_a_fused_backbone(kind, randomize, tmp_path):
    fused = randomize(kind(TINY)).switch_to_deploy()
    torch.save(fused.state_dict(), tmp_path / 'fused.pth')
    again = kind(TINY).switch_to_deploy()
    again.load_state_dict(torch.load(tmp_path / 'fused.pth', weights_only=True))
    with torch.no_grad():
        assert all(map(torch.equal, again(image(64, 64)), fused(image(64, 64))))


@pytest.mark.parametrize('kind', [EfficientFormer, EfficientFormerV2])
def test_training_a_fused_backbone_raises(kind):
    fused = kind(TINY).switch_to_deploy()
    assert not fused.training and not any(p.requires_grad for p in fused.parameters())
    assert fused.eval() is fused
    with pytest.raises(RuntimeError, match='cannot be trained after switch_to_deploy'):
        fused.train()


def test_other_norms_and_what_is_behind_them_stay(randomize):
    norm = dict(type='GN', num_groups=2)
    model = randomize(EfficientFormer(TINY, norm_cfg=norm)).double().eval()
    with torch.no_grad():
        expected = model(image(64, 64, dtype=torch.float64))
        assert_close(model.switch_to_deploy()(image(64, 64, dtype=torch.float64)), expected, 1e-9)
    assert model.stages[0].blocks[0].layer_scale2 is not None
    assert model.stages[3].blocks[2].layer_scale2 is None  # MB3D has no norm there


@pytest.mark.parametrize('name', ['detection/maskrcnn_effformer_l1',
                                  'segmentation/semfpn_effformerv2_s0'])
@torch.no_grad()
def test_a_whole_model_stays_the_same(name, repo_root, randomize):
    cfg = Config.fromfile(repo_root / f'configs/{name}.py')
    cfg.model.backbone.update(arch=TINY, init_cfg=None)
    cfg.model.neck.update(in_channels=list(TINY['widths']), norm_cfg=dict(type='BN'))
    init_default_scope(cfg.default_scope)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    for part in (model.backbone, model.neck, getattr(model, 'decode_head', nn.Identity())):
        randomize(part)
    model = model.double().eval()
    outputs = []
    for _ in range(2):
        features = model.neck(model.backbone(image(96, 64, dtype=torch.float64)))
        outputs.append([*features, model.decode_head(features)] if 'seg' in name else features)
        assert fuse(model) is model
    assert_close(*outputs, 1e-9)
    assert not [m for m in model.modules() if isinstance(m, _BatchNorm)]
    with pytest.raises(RuntimeError, match='cannot be trained'):
        model.train()


def test_a_convolution_with_several_norms_stays():
    heads = nn.ModuleList(ConvModule(4, 4, 3, norm_cfg=dict(type='BN')) for _ in range(3))
    heads[1].conv = heads[0].conv
    fuse(heads)
    assert isinstance(heads[0].norm, nn.BatchNorm2d) and isinstance(heads[1].norm, nn.BatchNorm2d)
    assert isinstance(heads[2].norm, nn.Identity)


def test_metrics_stay_the_same(repo_root, randomize, tmp_path):
    config = 'tests/data/semfpn_tiny.py'
    write_ade20k(tmp_path / 'data', train=1, val=3, size=(64, 96), progress=False)
    cfg = Config.fromfile(repo_root / config)
    init_default_scope(cfg.default_scope)
    model = randomize(revert_sync_batchnorm(MODELS.build(cfg.model))).eval()
    with torch.no_grad():  # no class everywhere
        logits = model.decode_head(model.extract_feat(image(64, 96)))
        model.decode_head.conv_seg.bias -= logits.mean((0, 2, 3))
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'model.pth')
    measured = []
    for options in ([], ['--deploy']):
        work = tmp_path / f'work{len(measured)}'
        run_tool('tools/test.py', config, tmp_path / 'model.pth', '--work-dir', work,
                 '--data-root', tmp_path / 'data', *options)
        record, = work.glob('*/evaluation.json')
        measured.append(json.loads(record.read_text())['metrics'])
    assert measured[0] == pytest.approx(measured[1], abs=0.1)  # in percent
    assert 0 < measured[0]['mIoU'] < 100
    run_tool('tools/test.py', config, tmp_path / 'model.pth', '--work-dir', tmp_path / 'half',
             '--data-root', tmp_path / 'data', '--dtype', 'bf16',
             '--at-least', f'mIoU={measured[0]["mIoU"] - 2}')
    assert not [*(tmp_path / 'half').rglob('evaluation.json')]


@torch.no_grad()
def test_a_segmentor_resizes_only_where_the_size_changes(repo_root, randomize, monkeypatch):
    from mmseg.models.segmentors import base
    from mmseg.structures import SegDataSample
    sizes = []
    resize = base.resize
    monkeypatch.setattr(base, 'resize', recorder := lambda logits, size, *args, **kwargs: (
        sizes.append(size) or resize(logits, size, *args, **kwargs)))
    cfg = Config.fromfile(repo_root / 'tests/data/semfpn_tiny.py')
    init_default_scope(cfg.default_scope)
    model = randomize(revert_sync_batchnorm(MODELS.build(cfg.model))).double().eval()

    def predict():
        metas = [dict(img_shape=(64, 96), ori_shape=size, pad_shape=(64, 96), **options)
                 for size, options in [((64, 96), {}), ((33, 50), {}), (
                     (64, 96), dict(flip=True, flip_direction='horizontal')), (
                     (60, 96), dict(img_padding_size=(0, 0, 0, 4)))]]
        found = model.predict(image(64, 96, batch=4, dtype=torch.float64),
                              [SegDataSample(metainfo=meta) for meta in metas])
        return [sample.seg_logits.data for sample in found], [
            sample.pred_sem_seg.data for sample in found]

    expected = predict()
    assert sizes == [(64, 96), (33, 50), (64, 96), (60, 96)]
    for _ in range(2):
        sizes.clear()
        found = fuse(model) and predict()
        assert sizes == [(33, 50)] and base.resize is recorder
        assert_close(found[0], expected[0], 1e-9)
        assert all(map(torch.equal, found[1], expected[1]))
    assert deepcopy(model).postprocess_result.args[0] is not model
