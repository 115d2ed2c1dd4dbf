"""Models that cannot be traced."""
import pytest
from torch import nn

from mmeffformer import EfficientFormer
from mmeffformer.deploy.graphs import traceable


@pytest.mark.parametrize('name, options, message', [
    ('semfpn', {'model.test_cfg.mode': 'slide'}, "test_cfg.mode is 'slide'.*'whole' only"),
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


def test_other_heads(build):
    model = build('maskrcnn')
    model.roi_head = nn.Identity()  # without the settings of a StandardRoIHead
    with pytest.raises(ValueError, match="roi_head is 'Identity'.*'StandardRoIHead' only"):
        traceable(model)


def test_parts_that_cannot_be_exported(arch):
    with pytest.raises(ValueError, match='EfficientFormer has no neck: export its backbone'):
        traceable(EfficientFormer(arch))
    model = EfficientFormer(arch, norm_cfg=dict(type='BN', track_running_stats=False))
    with pytest.raises(ValueError, match='stem.0.norm has track_running_stats=False'):
        traceable(model, 'backbone')
