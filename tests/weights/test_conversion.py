"""Conversion of backbones and of the authors' detectors and segmentors."""
import hashlib
from pathlib import Path

import pytest
import timm
import torch
from support.official import CONFIGS, authors_checkpoint, build, official, parity_error

from mmeffformer import EfficientFormer, EfficientFormerV2
from mmeffformer.models import ARCHS, ARCHS_V2
from mmeffformer.models.attention import AttentionBias
from mmeffformer.weights import read_checkpoint
from mmeffformer.weights.compatibility import check_compatible
from mmeffformer.weights.conversion import save_checkpoint, transfer_backbone, transfer_model


@pytest.mark.parametrize('name', CONFIGS)
def test_models_of_the_authors_are_converted_bit_exactly(name, tmp_path):
    source = authors_checkpoint(name, tmp_path)
    model = build(CONFIGS[name])
    checkpoint = transfer_model(source, model)
    state = torch.load(source, weights_only=True)['state_dict']
    assert checkpoint['state_dict'].keys() == model.state_dict().keys()
    for key, value in checkpoint['state_dict'].items():
        if not key.startswith('backbone.'):
            assert torch.equal(value, state[key])
    fresh = build(CONFIGS[name])
    fresh.load_state_dict(checkpoint['state_dict'])
    assert parity_error(fresh.backbone, name) < 1e-4
    meta = checkpoint['meta']
    assert meta['bias_mode'] == 'legacy' and meta['layout'] == 'official-dense'
    assert meta['sha256'] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert meta['dataset_meta'] == dict(classes=('person', 'bicycle'))

    path = save_checkpoint(checkpoint, tmp_path / 'out', 'model')
    assert path.name == f'model-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth'
    assert [*path.parent.iterdir()] == [path]
    loaded = torch.load(path, weights_only=True)
    assert all(torch.equal(loaded['state_dict'][key], value)
               for key, value in checkpoint['state_dict'].items())
    check_compatible(fresh, path)
    for module in model.modules():
        if isinstance(module, AttentionBias):
            module.mode = 'offset'
    with pytest.raises(ValueError, match="trained with bias_mode='legacy', the config has "
                       "'offset'.*Add --cfg-options model.backbone.bias_mode=legacy"):
        check_compatible(model, path)
    again = transfer_model(path, fresh)  # converting twice is once
    assert all(torch.equal(again['state_dict'][key], value)
               for key, value in checkpoint['state_dict'].items())


def test_checkpoints_of_other_models_are_named(tmp_path):
    detector = CONFIGS['det_v1_l1']
    classifier = tmp_path / 'imagenet.pth'
    torch.save(official('official_cls_v1_l1'), classifier)
    with pytest.raises(ValueError, match='imagenet.pth is a backbone or an ImageNet classifier, '
                       'expected a detector, which has one of rpn_head, .* give --arch'):
        transfer_model(classifier, build(detector))
    segmentor = authors_checkpoint('seg_v1_l1', tmp_path)
    with pytest.raises(ValueError, match=r'is a segmentor \(it has decode_head\), the config is '
                       'of a detector'):
        transfer_model(segmentor, build(detector))
    with pytest.raises(ValueError, match=r'is a whole segmentor \(it has decode_head\), expected '
                       'a backbone or an ImageNet classifier.*--prefix backbone'):
        transfer_backbone(segmentor, ARCHS['l1'], 'timm')
    source = authors_checkpoint('det_v1_l1', tmp_path)
    with pytest.raises(ValueError, match='is 25 x 25 there and 7 x 7 in the config'):
        transfer_model(source, build(detector, bias_grid=7))
    with pytest.raises(ValueError, match='checkpoint is l1, backbone is l3'):
        transfer_model(source, build('detection/maskrcnn_effformer_l3'))
    with pytest.raises(ValueError, match='checkpoint is l1, backbone is s0'):
        transfer_model(source, build('detection/maskrcnn_effformerv2_s0'))
    broken = authors_checkpoint('det_v1_l1', tmp_path,
                    **{'roi_head.bbox_head.fc_cls.weight': torch.ones(3, 4)})
    with pytest.raises(ValueError, match=r'fc_cls.weight: \(3, 4\) instead of \(81, 1024\)'):
        transfer_model(broken, build(detector))


@pytest.mark.parametrize('arch, version', [('l1', ''), ('s0', 'v2')])
def test_a_backbone_goes_to_timm_and_back(arch, version, tmp_path):
    spec = {**ARCHS, **ARCHS_V2}[arch]
    source = tmp_path / 'official.pth'
    torch.save({'model': official(f'official_cls_{version or "v1"}_{arch}')}, source)
    checkpoint, report = transfer_backbone(source, spec, 'timm')
    assert report.layout == 'official'
    net = timm.create_model(f'efficientformer{version}_{arch}', num_classes=0)
    missing, unexpected = net.load_state_dict(checkpoint, strict=False)
    assert not unexpected and all(key.startswith('norm.') or 'idxs' in key for key in missing)
    there = save_checkpoint(checkpoint, tmp_path, 'timm')
    native, report = transfer_backbone(there, spec, 'mmeffformer')
    assert report.layout == 'timm' and native['meta']['layout'] == 'timm'
    back, _ = transfer_backbone(save_checkpoint(native, tmp_path, 'native'), spec, 'official')
    state = read_checkpoint(source)['model']
    assert all(torch.equal(value, state[key]) for key, value in back.items())
    assert {key.split('.')[0] for key in state.keys() - back.keys()
            if 'idxs' not in key} == {'norm', 'head', 'dist_head'}
    kind = EfficientFormerV2 if version else EfficientFormer
    assert native['state_dict'].keys() == kind(arch, out_norm_cfg=None).state_dict().keys()


def test_a_detectors_backbone_is_taken_by_its_prefix(tmp_path):
    source = authors_checkpoint('det_v1_l1', tmp_path)
    checkpoint, report = transfer_backbone(source, ARCHS['l1'], 'mmeffformer', prefix='backbone')
    assert report.prefix == 'state_dict.backbone.'
    table = checkpoint['state_dict']['stages.3.blocks.3.token_mixer.bias.table']
    assert table.shape == (8, 25, 25)  # as it is in the file


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(OSError, match='No space left'):
        save_checkpoint({}, tmp_path / 'out', 'model')
    assert [*(tmp_path / 'out').iterdir()] == []
