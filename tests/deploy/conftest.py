"""Small models with random weights, and files exported from them."""
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from support.detectors import NARROW, narrow
from support.helpers import ROOT

from mmeffformer import swap_backbone
from mmeffformer.apis.smoke_test import build_model
from mmeffformer.deploy.export import export
from mmeffformer.deploy.runtimes import SUFFIXES, ExportedFile
from mmeffformer.utils.config import iter_dicts
from mmeffformer.utils.registry import MODELS

TINY = dict(widths=(8, 16, 16, 24), depths=(1, 1, 2, 3), attention_blocks=(0, 0, 1, 2))


def config_of(package: str, name: str) -> Config:
    return Config.fromfile(Path(find_spec(package).origin).parent / '.mim/configs' / name)


@pytest.fixture(scope='session')
def arch():
    return TINY


@pytest.fixture(scope='session')
def config():
    """A function that returns the config of a small Mask R-CNN or Semantic FPN."""

    def read(name: str, kind: str = 'EfficientFormer', **options) -> Config:
        cfg = Config.fromfile(ROOT / f'configs/demo/{name}_effformer_l1_shapes.py')
        cfg.model.backbone.update(type=f'mmeffformer.{kind}', arch=TINY, bias_grid=3)
        cfg.model.neck.in_channels = list(TINY['widths'])
        if name == 'maskrcnn':
            cfg.merge_from_dict(NARROW)
        cfg.merge_from_dict(options)
        return cfg

    return read


@pytest.fixture(scope='session')
def build(config, randomize):
    """A function that builds such a model with random weights."""

    def built(name: str, *args, **options):
        cfg = config(name, *args, **options)
        init_default_scope(cfg.default_scope)
        torch.manual_seed(1)
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
        randomize(model.backbone)
        if name == 'maskrcnn':
            # Scores and boxes far from each other, so that rounding decides nothing in nms.
            for part in (model.rpn_head.rpn_cls, model.roi_head.bbox_head.fc_cls,
                         model.roi_head.bbox_head.fc_reg):
                part.weight.data *= 9
        return model.eval()

    return built


@pytest.fixture(scope='session')
def build_swapped(arch, randomize):
    """A function that builds a segmentor of mmseg's with this backbone and random weights, its
    heads 16 channels wide."""

    def built(name: str) -> torch.nn.Module:
        cfg = config_of('mmseg', name)
        cfg = swap_backbone(cfg, arch)
        for head in iter_dicts(cfg.model.decode_head):
            if 'channels' in head:
                head['channels'] = 16
        model = build_model(cfg)
        for part in (model.backbone, model.decode_head):
            randomize(part)
        return model.eval()

    return built


@pytest.fixture(scope='session')
def build_one_stage(arch, randomize):
    """A function that builds a one-stage detector of mmdet's with this backbone and random
    weights, its neck and head 64 channels wide."""

    def built(name: str, **options) -> torch.nn.Module:
        cfg = swap_backbone(config_of('mmdet', name), arch)
        for part in (*iter_dicts(cfg.model.get('neck')), *iter_dicts(cfg.model.bbox_head)):
            narrow(part)
        cfg.merge_from_dict(options)
        init_default_scope(cfg.default_scope)
        return randomize(revert_sync_batchnorm(MODELS.build(cfg.model))).eval()

    return built


@pytest.fixture(scope='session')
def exported(build, tmp_path_factory):
    """A function that returns a whole model and its file for any size: of V1 for OpenVINO, of V2
    for ONNX Runtime. The detector proposes only regions of more than 33 x 33 px."""

    @cache
    def make(name: str, to: str):
        kind = 'EfficientFormer' if to == 'openvino' else 'EfficientFormerV2'
        options = {'model.test_cfg.rpn.min_bbox_size': 33} if name == 'maskrcnn' else {}
        model = build(name, kind, **options)
        path = tmp_path_factory.mktemp('exported') / f'model{SUFFIXES[to]}'
        export(model, path, to, 'model', (64, 96), dynamic=True)
        return model, ExportedFile(path, to)

    return make
