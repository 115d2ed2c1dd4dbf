"""Two-stage detectors as graphs, and those that cannot be traced."""
import pytest
import torch
from support.helpers import image
from torch import nn

from mmeffformer.deploy.comparison import compare
from mmeffformer.deploy.graphs import traceable


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
