"""Configs with test-time augmentation."""
import pytest
from mmdet.models.test_time_augs import DetTTAModel
from mmengine.config import Config
from support.helpers import ROOT
from torch import nn

from mmeffformer.apis.tta import add_tta, check_tta

DETECTOR = 'configs/demo/maskrcnn_effformer_l1_shapes.py'
SEGMENTOR = 'tests/data/semfpn_tiny.py'


def test_defaults_of_a_segmentor_in_a_wrapped_data_set():
    cfg = Config.fromfile(ROOT / SEGMENTOR)
    module, inner = cfg.model.copy(), cfg.test_dataloader.dataset
    cfg.test_dataloader.dataset = dict(type='ConcatDataset', datasets=[inner, inner])
    add_tta(cfg)
    assert cfg.model.type == 'SegTTAModel' and cfg.model.module == module
    for dataset in cfg.test_dataloader.dataset.datasets:
        *load, augment = dataset.pipeline
        assert [step.type for step in load] == ['LoadImageFromFile', 'Resize', 'LoadAnnotations']
        flips, pack = augment.transforms
        assert [flip.prob for flip in flips] == [0, 1] and pack == [dict(type='PackSegInputs')]


def test_the_metainfo_of_flips_is_packed():
    cfg = Config.fromfile(ROOT / DETECTOR)
    cfg.test_dataloader.dataset.pipeline[-1].meta_keys = ('img_id', 'flip')
    add_tta(cfg)
    pack, = cfg.test_dataloader.dataset.pipeline[-1].transforms[-1]
    assert pack.meta_keys == ('img_id', 'flip', 'flip_direction')


def test_the_parts_of_a_config_are_used():
    cfg = Config.fromfile(ROOT / SEGMENTOR)
    cfg.tta_model = dict(type='mine', weight=2)
    cfg.tta_pipeline = [dict(type='LoadImageFromFile')]
    add_tta(cfg)
    assert cfg.model.type == 'mine' and cfg.model.weight == 2
    assert cfg.model.module.type == 'EncoderDecoder'
    assert cfg.test_dataloader.dataset.pipeline == cfg.tta_pipeline


@pytest.mark.parametrize('edits', [dict(default_scope='mmpretrain'), {
    'model.type': 'SegTTAModel', 'model.module': dict(type='EncoderDecoder')}])
def test_other_models_are_refused(edits):
    cfg = Config.fromfile(ROOT / SEGMENTOR)
    cfg.merge_from_dict(edits)
    with pytest.raises(ValueError, match=f'--tta: expected .* its model is {cfg.model.type}'):
        add_tta(cfg)


class Network(nn.Module):
    """A stand-in for a detector."""

    def __init__(self, with_mask):
        super().__init__()
        self.with_mask = with_mask

    def test_step(self, data):
        """Do nothing; DetTTAModel asks for this method."""


def test_masks_cannot_be_merged():
    check_tta(DetTTAModel(module=Network(with_mask=False)))
    with pytest.raises(ValueError, match='DetTTAModel merges boxes, but no masks'):
        check_tta(DetTTAModel(module=Network(with_mask=True)))
