"""Models and their parts as graphs, and models that cannot be traced."""
import pytest
from torch import nn

from mmeffformer import EfficientFormer
from mmeffformer.deploy.graphs import describe_part, input_channels, traceable


def test_input_channels_and_names_of_parts(build):
    model = build('semfpn', **{'model.backbone.in_channels': 5})
    assert input_channels(model) == 5
    assert describe_part(model, 'neck') == 'neck of type FPN'
    assert describe_part(model, 'model') == 'decode_head of type FPNHead'
    assert describe_part(model.backbone, 'backbone') == 'backbone of type EfficientFormer'
    model.decode_head, model.auxiliary_head = nn.ModuleList([nn.Identity(), nn.ReLU()]), nn.ELU()
    assert describe_part(model, 'model') == (
        'decode_head of type Identity, decode_head of type ReLU')


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
