"""Models as graphs, and models that cannot be traced."""
import pytest
import torch
from support.helpers import image
from torch import nn

from mmeffformer import EfficientFormer
from mmeffformer.deploy.comparison import compare
from mmeffformer.deploy.graphs import AdaptivePooling, describe_part, input_channels, traceable


@pytest.mark.parametrize('size', [1, 2, (3, 5), (None, 6), 9])
def test_adaptive_pooling(size):
    x, pool = image(7, 10, dtype=torch.float64), nn.AdaptiveAvgPool2d(size)
    with AdaptivePooling():
        pooled = pool(x)
    torch.testing.assert_close(pooled, pool(x), rtol=0, atol=1e-12)


def test_input_channels_and_names_of_parts(build):
    model = build('semfpn', **{'model.backbone.in_channels': 5})
    assert input_channels(model) == 5
    assert describe_part(model, 'neck') == 'neck of type FPN'
    assert describe_part(model, 'model') == 'decode_head of type FPNHead'
    assert describe_part(model.backbone, 'backbone') == 'backbone of type EfficientFormer'
    model.decode_head, model.auxiliary_head = nn.ModuleList([nn.Identity(), nn.ReLU()]), nn.ELU()
    assert describe_part(model, 'model') == (
        'decode_head of type Identity, decode_head of type ReLU')


@pytest.mark.parametrize('name, options, message', [
    ('maskrcnn', {'model.test_cfg.rcnn.nms.type': 'soft_nms'},
     "nms.type is 'soft_nms'.*'nms' only. Export its neck"),
    ('maskrcnn', {'model.roi_head.mask_roi_extractor.roi_layer.sampling_ratio': -1},
     'sampling_ratio is -1.*0 only'),
    ('maskrcnn', {'model.roi_head.bbox_head.bbox_coder.add_ctr_clamp': True},
     'add_ctr_clamp is True'),
])
def test_models_that_cannot_be_exported_whole(name, options, message, build):
    with pytest.raises(ValueError, match=message):
        traceable(build(name, **options))


def test_detector_without_masks(build):
    model = build('maskrcnn', **{'model.roi_head.mask_head': None,
                                 'model.roi_head.mask_roi_extractor': None})
    part = traceable(model)
    assert part.output_names == ('boxes', 'scores', 'labels')
    with torch.no_grad():
        compared = compare(model, 'model', lambda x: dict(zip(part.output_names, part(x))),
                           [image(64, 96)])
    assert len(compared) == 4 and all(each.matches for each in compared)


def test_other_heads(build):
    model = build('maskrcnn')
    model.roi_head = nn.Identity()  # without the settings of a StandardRoIHead
    with pytest.raises(ValueError, match="roi_head is 'Identity'.*'StandardRoIHead' only"):
        traceable(model)


def test_parts_that_cannot_be_exported(arch):
    with pytest.raises(ValueError, match='EfficientFormer has no neck: export its backbone'):
        traceable(EfficientFormer(arch), 'neck')
    detector = nn.Module()
    detector.bbox_head = nn.ReLU()
    with pytest.raises(ValueError, match='bbox_head of type ReLU cannot be exported: expected'):
        traceable(detector)
    model = EfficientFormer(arch, norm_cfg=dict(type='BN', track_running_stats=False))
    with pytest.raises(ValueError, match='stem.0.norm has track_running_stats=False'):
        traceable(model, 'backbone')
