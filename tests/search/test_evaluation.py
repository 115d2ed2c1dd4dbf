"""Evaluation of sub-networks: its metric, and models that it refuses."""
from types import SimpleNamespace

import pytest
from mmengine.config import Config
from torch import nn

from mmeffformer import EfficientFormer, SuperEfficientFormer
from mmeffformer.search.evaluation import Evaluation, _full_name

ARCH = dict(widths=(16, 16, 16, 16), depths=(1, 1, 1, 1))


@pytest.mark.parametrize('metrics', [{}, {'mIoU': float('nan')}])
def test_networks_without_a_metric_count_as_0(slimmed, monkeypatch, metrics):
    evaluation = slimmed[0].evaluation
    monkeypatch.setattr(evaluation.loop.evaluator, 'evaluate', lambda size: metrics)
    assert evaluation(slimmed[0].start) == 0 and evaluation.metric == 'mIoU'


@pytest.mark.parametrize('wanted, metrics, expected', [
    (None, dict(aAcc=1., mIoU=2.), 'mIoU'),
    (None, {'coco/segm_mAP': 1., 'coco/bbox_mAP': 2.}, 'coco/bbox_mAP'),
    ('mAP_s', {'coco/bbox_mAP': 1., 'coco/bbox_mAP_s': 2.}, 'coco/bbox_mAP_s'),
])
def test_metric_that_counts(wanted, metrics, expected):
    assert _full_name(metrics, wanted) == expected


def test_unknown_metric(slimmed, monkeypatch):
    evaluation = slimmed[0].evaluation
    monkeypatch.setattr(evaluation, 'metric', None)
    monkeypatch.setattr(evaluation, '_wanted', 'mAP')
    with pytest.raises(ValueError, match='metric mAP: .*measures aAcc, mIoU, mAcc'):
        evaluation(slimmed[0].start)


def test_wrong_models_are_refused():
    model, cfg = nn.Module(), Config(dict(train_dataloader=dict(batch_size=1)))
    runner = SimpleNamespace(model=model, cfg=cfg)
    model.backbone = EfficientFormer(ARCH)
    with pytest.raises(ValueError, match='is EfficientFormer: expected .*SuperEfficientFormer'):
        Evaluation(runner)
    model.backbone = SuperEfficientFormer(ARCH)
    with pytest.raises(ValueError, match='no val_dataloader and no val_evaluator'):
        Evaluation(runner)
    cfg.val_dataloader = cfg.val_evaluator = cfg.train_dataloader
    with pytest.raises(ValueError, match='batches 0: expected 1 or more'):
        Evaluation(runner, batches=0)
