"""Every config of the project against its source; each is built, trained a step and predicts."""
import ast
import inspect
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from mmeffformer import swap_backbone
from mmeffformer.datasets import CATEGORIES, SEG_CLASSES
from mmeffformer.utils.registry import MODELS

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'

# The dense recipes of the papers. Of the baselines, that of PoolFormer is its authors', that of
# ResNet is from mmdet (mask-rcnn_r50_fpn_1x_coco), in segmentation the one of all others, and once
# more mmseg's (fpn_r50_4xb4-160k_ade20k-512x512).
#   size: images in a step; length: epochs (detection) or iterations (segmentation)
#   edge: where the warm-up starts, relative to the learning rate (detection), or the lowest
#   learning rate (segmentation)
#   norm, grid, out, drop, scale: norm_cfg, bias_grid, out_norm_cfg, drop_path_rate and
#   layer_scale_init_value of the backbone; - is for none
TABLE = """
backbone           channels          optim lr   wd   size length edge norm   grid out drop scale
det.effformer_l1   48,96,224,448     AdamW 2e-4 1e-4 16   12     1e-6 BN     25   GN  0    1e-5
det.effformer_l3   64,128,320,512    AdamW 2e-4 1e-4 16   12     1e-6 BN     25   GN  0    1e-5
det.effformer_l7   96,192,384,768    AdamW 2e-4 1e-4 16   12     1e-6 BN     25   GN  0    1e-6
det.effformerv2_s0 32,48,96,176      AdamW 2e-4 5e-2 16   12     1e-6 SyncBN 25   -   0    1e-5
det.effformerv2_s1 32,48,120,224     AdamW 2e-4 5e-2 16   12     1e-6 SyncBN 25   -   0    1e-5
det.effformerv2_s2 32,64,144,288     AdamW 2e-4 5e-2 16   12     1e-6 SyncBN 25   -   0.02 1e-5
det.effformerv2_l  40,80,192,384     AdamW 2e-4 5e-2 16   12     1e-6 SyncBN 25   -   0.1  1e-5
det.resnet18       64,128,256,512    SGD   2e-2 1e-4 16   12     1e-3 BN     -    -   -    -
det.resnet50       256,512,1024,2048 SGD   2e-2 1e-4 16   12     1e-3 BN     -    -   -    -
det.resnet101      256,512,1024,2048 SGD   2e-2 1e-4 16   12     1e-3 BN     -    -   -    -
det.poolformer_s12 64,128,320,512    AdamW 2e-4 1e-4 16   12     1e-3 -      -    -   -    -
det.poolformer_s24 64,128,320,512    AdamW 2e-4 1e-4 16   12     1e-3 -      -    -   -    -
det.poolformer_s36 64,128,320,512    AdamW 2e-4 1e-4 16   12     1e-3 -      -    -   -    -
seg.effformer_l1   48,96,224,448     AdamW 2e-4 1e-4 32   40000  0    SyncBN 16   GN  0    1e-5
seg.effformer_l3   64,128,320,512    AdamW 2e-4 1e-4 32   40000  0    SyncBN 16   GN  0    1e-5
seg.effformer_l7   96,192,384,768    AdamW 2e-4 1e-4 32   40000  0    SyncBN 16   GN  0    1e-6
seg.effformerv2_s0 32,48,96,176      AdamW 2e-4 1e-4 32   40000  1e-6 SyncBN 16   -   0    1e-5
seg.effformerv2_s1 32,48,120,224     AdamW 2e-4 1e-4 32   40000  1e-6 SyncBN 16   -   0    1e-5
seg.effformerv2_s2 32,64,144,288     AdamW 2e-4 1e-4 32   40000  1e-6 SyncBN 16   -   0.02 1e-5
seg.effformerv2_l  40,80,192,384     AdamW 2e-4 1e-4 32   40000  1e-6 SyncBN 16   -   0.1  1e-5
seg.resnet18       64,128,256,512    AdamW 2e-4 1e-4 32   40000  0    SyncBN -    -   -    -
seg.resnet50       256,512,1024,2048 AdamW 2e-4 1e-4 32   40000  0    SyncBN -    -   -    -
seg.resnet101      256,512,1024,2048 AdamW 2e-4 1e-4 32   40000  0    SyncBN -    -   -    -
seg.resnet18_mmseg160k  64,128,256,512    SGD 1e-2 5e-4 16 160000 1e-4 SyncBN - - - -
seg.resnet50_mmseg160k  256,512,1024,2048 SGD 1e-2 5e-4 16 160000 1e-4 SyncBN - - - -
seg.resnet101_mmseg160k 256,512,1024,2048 SGD 1e-2 5e-4 16 160000 1e-4 SyncBN - - - -
seg.poolformer_s12 64,128,320,512    AdamW 2e-4 1e-4 32   40000  0    -      -    -   -    -
seg.poolformer_s24 64,128,320,512    AdamW 2e-4 1e-4 32   40000  0    -      -    -   -    -
seg.poolformer_s36 64,128,320,512    AdamW 2e-4 1e-4 32   40000  0    -      -    -   -    -
"""
HEADER, *LINES = (line.split() for line in TABLE.strip().splitlines())
RECIPES = {line[0]: dict(zip(HEADER[1:], line[1:])) for line in LINES}

# What builds the backbone, arch or depth, and the ImageNet weights to start from.
V1, V2 = 'mmeffformer.EfficientFormer', 'mmeffformer.EfficientFormerV2'
POOL = 'mmpretrain.PoolFormer'
OPENMMLAB = 'https://download.openmmlab.com/mmclassification/v0/'
BACKBONES = {
    'effformer_l1': (V1, 'l1', 'hf-hub:snap-research/efficientformer-l1-300'),
    'effformer_l3': (V1, 'l3', 'efficientformer-l3_3rdparty_in1k_20220915-466793d6.pth'),
    'effformer_l7': (V1, 'l7', 'efficientformer-l7_3rdparty_in1k_20220915-185e30af.pth'),
    'effformerv2_s0': (V2, 's0', 'hf-hub:timm/efficientformerv2_s0.snap_dist_in1k'),
    'effformerv2_s1': (V2, 's1', 'hf-hub:timm/efficientformerv2_s1.snap_dist_in1k'),
    'effformerv2_s2': (V2, 's2', 'hf-hub:timm/efficientformerv2_s2.snap_dist_in1k'),
    'effformerv2_l': (V2, 'l', 'hf-hub:timm/efficientformerv2_l.snap_dist_in1k'),
    'poolformer_s12': (POOL, 's12', 'poolformer-s12_3rdparty_32xb128_in1k_20220414-f8d83051.pth'),
    'poolformer_s24': (POOL, 's24', 'poolformer-s24_3rdparty_32xb128_in1k_20220414-d7055904.pth'),
    'poolformer_s36': (POOL, 's36', 'poolformer-s36_3rdparty_32xb128_in1k_20220414-d78ff3e8.pth'),
    'det.resnet18': ('mmdet.ResNet', 18, 'torchvision://resnet18'),
    'det.resnet50': ('mmdet.ResNet', 50, 'torchvision://resnet50'),
    'det.resnet101': ('mmdet.ResNet', 101, 'torchvision://resnet101'),
    'seg.resnet18': ('mmseg.ResNetV1c', 18, 'open-mmlab://resnet18_v1c'),
    'seg.resnet50': ('mmseg.ResNetV1c', 50, 'open-mmlab://resnet50_v1c'),
    'seg.resnet101': ('mmseg.ResNetV1c', 101, 'open-mmlab://resnet101_v1c'),
}
FOLDERS = {'det': 'detection/maskrcnn', 'seg': 'segmentation/semfpn'}
NAMES = {f'{FOLDERS[row[:3]]}_{row[4:]}.py': row for row in RECIPES}
DEMOS = ['demo/maskrcnn_effformer_l1_shapes.py', 'demo/semfpn_effformer_l1_shapes.py']
REALTIME = {f'realtime/rtmdet-ins_{name}_640.py': name
            for name in ('effformer_l1', 'effformerv2_s0')}
CAMVID = [f'camvid/semfpn_{name}.py'
          for name in ('effformer_l1', 'effformerv2_s0', 'poolformer_s12', 'resnet18')]
SUPERNETS = ['search/maskrcnn_super_l3.py', 'search/semfpn_super_l3.py',
             'search/imagenet_super_l3.py', 'search/semfpn_super_shapes.py']  # tests/search


def test_every_config_is_listed():
    found = [str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob('*.py')
             if not {'_base_', 'backbones'} & {*path.parts}]  # backbones: test_metafiles.py
    assert len(found) == 41
    assert sorted(found) == sorted([*NAMES, *REALTIME, *DEMOS, *CAMVID, *SUPERNETS])


@pytest.mark.parametrize('name', [*NAMES, *REALTIME, *DEMOS, *CAMVID, *SUPERNETS])
def test_header_has_the_launch_command(name):
    cfg, text = Config.fromfile(CONFIGS / name), (CONFIGS / name).read_text()
    assert f' python tools/train.py configs/{name}\n' in text
    gpus = 1 if name.endswith('_shapes.py') or name in CAMVID else int(
        re.search(rf'^# tools/dist_train.sh configs/{name} (\d)$', text, re.M)[1])
    # --auto-scale-lr compares with this.
    assert gpus * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size


@pytest.mark.parametrize('name', NAMES)
def test_recipe_matches_its_source(name):
    cfg, row = Config.fromfile(CONFIGS / name), NAMES[name]
    assert recipe(cfg) == {key: ast.literal_eval(cell) if cell[0].isdigit() else cell
                           for key, cell in RECIPES[row].items()}
    assert not cfg.optim_wrapper.get('clip_grad')
    kind, arch, weights = BACKBONES.get(row.partition('_mmseg')[0]) or BACKBONES[row[4:]]
    backbone = cfg.model.backbone
    assert (backbone.type, backbone.get('arch', backbone.get('depth'))) == (kind, arch)
    if ':' not in weights:
        weights = f'{OPENMMLAB}{weights.split("-")[0]}/{weights}'
    assert (backbone.init_cfg.type, backbone.init_cfg.checkpoint) == ('Pretrained', weights)


def recipe(cfg: Config) -> dict:
    """Return the row of the table for a config."""
    backbone, optimizer = cfg.model.backbone, cfg.optim_wrapper.optimizer
    schedule = cfg.param_scheduler[0]
    row = dict(
        channels=tuple(cfg.model.neck.in_channels), optim=optimizer.type, lr=optimizer.lr,
        wd=optimizer.weight_decay, size=cfg.auto_scale_lr.base_batch_size,
        length=cfg.train_cfg.get('max_epochs', cfg.train_cfg.get('max_iters')),
        edge=schedule.get('start_factor', schedule.get('eta_min')),
        norm='-' if backbone.type == POOL else backbone.get('norm_cfg', dict(type='BN'))['type'],
        grid='-', out='-', drop='-', scale='-')
    if backbone.type in (V1, V2):
        # Defaults of the backbone for what the config does not set.
        default = inspect.signature(MODELS.get(backbone.type)).parameters
        grid, out, drop, scale = (backbone.get(key, default[key].default) for key in (
            'bias_grid', 'out_norm_cfg', 'drop_path_rate', 'layer_scale_init_value'))
        assert out in (None, dict(type='GN', num_groups=1))
        row.update(grid=grid, out='GN' if out else '-', drop=drop, scale=scale)
    return row


@pytest.mark.parametrize('name', [name for name in NAMES if name.startswith('detection')])
def test_detection_is_1x_on_coco(name):
    cfg = Config.fromfile(CONFIGS / name)
    warmup, steps = cfg.param_scheduler
    assert (warmup.type, warmup.by_epoch, warmup.end) == ('LinearLR', False, 500)
    assert (steps.type, steps.milestones, steps.gamma) == ('MultiStepLR', [8, 11], 0.1)
    for pipeline in (cfg.train_pipeline, cfg.test_pipeline):
        resize, = (step for step in pipeline if step.type == 'Resize')
        assert resize.scale == (1333, 800) and resize.keep_ratio
    flip, = (step for step in cfg.train_pipeline if step.type == 'RandomFlip')
    assert flip.prob == 0.5
    assert cfg.model.data_preprocessor.pad_size_divisor == 32
    assert cfg.val_evaluator.metric == ['bbox', 'segm']


@pytest.mark.parametrize('name', [name for name in NAMES if name.startswith('segmentation')])
def test_segmentation_is_semantic_fpn_on_ade20k(name):
    cfg = Config.fromfile(CONFIGS / name)
    poly, = cfg.param_scheduler
    assert (poly.type, poly.power, poly.by_epoch) == ('PolyLR', 0.9, False)
    assert poly.end == cfg.train_cfg.max_iters
    assert [list(step.items())[1:] for step in cfg.train_pipeline if step.type in (
        'RandomResize', 'RandomCrop', 'RandomFlip', 'PhotoMetricDistortion')] == [
            [('scale', (2048, 512)), ('ratio_range', (0.5, 2.0)), ('keep_ratio', True)],
            [('crop_size', (512, 512)), ('cat_max_ratio', 0.75)], [('prob', 0.5)], []]
    assert cfg.model.data_preprocessor.size == (512, 512)
    neck, head = cfg.model.neck, cfg.model.decode_head
    assert (neck.type, neck.out_channels, neck.num_outs) == ('FPN', 256, 4)
    assert (head.type, head.channels, head.dropout_ratio, head.num_classes, head.norm_cfg.type) \
        == ('FPNHead', 128, 0.1, 150, 'SyncBN')
    assert cfg.default_hooks.checkpoint.by_epoch is cfg.log_processor.by_epoch is False


@pytest.mark.parametrize('name', REALTIME)
def test_realtime_is_mmdets_config_with_another_backbone(name):
    path = Path(find_spec('mmdet').origin).parent / '.mim/configs/rtmdet'
    source = Config.fromfile(path / 'rtmdet-ins_tiny_8xb32-300e_coco.py')
    expected = swap_backbone(source, REALTIME[name].partition('_')[2], bias_grid=20)
    cfg = Config.fromfile(CONFIGS / name)
    for key in ('model', 'train_dataloader', 'test_dataloader', 'train_cfg', 'optim_wrapper',
                'param_scheduler', 'custom_hooks'):
        assert plain(cfg[key]) == plain(expected[key]), key
    assert cfg.val_evaluator.metric == ['bbox', 'segm']


def plain(value):
    """Return a part of a config without keys that have their default in one of two configs."""
    if isinstance(value, dict):
        defaults = ('_scope_', 'backend_args', 'batch_augments', 'requires_grad')
        return {key: plain(item) for key, item in value.items() if key not in defaults}
    return [*map(plain, value)] if isinstance(value, (list, tuple)) else value


def detection_batch(classes: int, sizes=((64, 64), (60, 52))) -> dict:
    batch = demo_mm_inputs(len(sizes), [[3, *size] for size in sizes],
                           num_items=[2] * len(sizes), num_classes=classes, with_mask=True)
    for sample in batch['data_samples']:
        sample.set_metainfo(dict(scale_factor=(1., 1.)))  # as the shapes have it
    return batch


def segmentation_batch(classes: int, size=(64, 64), count=2) -> dict:
    """Return random images and labels; each original image was twice as wide."""
    samples = [SegDataSample(
        gt_sem_seg=PixelData(data=torch.randint(classes, (1, *size))),
        metainfo=dict(img_shape=size, ori_shape=(size[0], 2 * size[1]))) for _ in range(count)]
    return dict(inputs=[torch.randint(256, (3, *size), dtype=torch.uint8) for _ in samples],
                data_samples=samples)


def small_config(name: str):
    """Return a config with small images or few boxes, and its number of classes."""
    cfg = Config.fromfile(CONFIGS / name)
    if cfg.model.type == 'MaskRCNN':
        cfg.model.train_cfg.rpn_proposal.max_per_img = 40
        cfg.model.test_cfg.rpn.max_per_img = cfg.model.test_cfg.rcnn.max_per_img = 10
        cfg.model.test_cfg.rcnn.score_thr = 0.
        return cfg, cfg.model.roi_head.bbox_head.num_classes
    if cfg.model.type == 'RTMDet':
        cfg.model.test_cfg.update(max_per_img=10, score_thr=0.)
        return cfg, cfg.model.bbox_head.num_classes
    cfg.model.data_preprocessor.size = (64, 64)  # instead of a whole crop
    return cfg, cfg.model.decode_head.num_classes


LOSSES = {
    'MaskRCNN': {'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'loss_bbox', 'loss_mask'},
    'RTMDet': {'loss_cls', 'loss_bbox', 'loss_mask'},
    'EncoderDecoder': {'decode.loss_ce'},
}


@pytest.mark.parametrize('name', [*NAMES, *REALTIME, *DEMOS])
def test_config_trains_and_predicts(name):
    cfg, classes = small_config(name)
    detects = cfg.default_scope == 'mmdet'
    if name in DEMOS:
        names = cfg.train_dataloader.dataset.metainfo.classes
        assert tuple(names) == (CATEGORIES if detects else SEG_CLASSES)
    assert classes == (len(names) if name in DEMOS else 80 if detects else 150)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    frozen = {key.split('.')[1] for key, _ in model.named_parameters() if key not in trained}
    assert frozen == ({'conv1', 'bn1', 'layer1'} if cfg.model.backbone.type == 'mmdet.ResNet'
                      else set())

    # Training in several processes raises an error for a parameter without a gradient.
    missed = {*trained}
    for key, value in trained.items():
        value.register_hook(lambda grad, key=key: missed.discard(key))
    stem, neck = next(model.backbone.parameters()), next(model.neck.parameters())
    before = stem.detach().clone(), neck.detach().clone()
    if cfg.model.type == 'RTMDet':  # takes images of one size only
        batch = detection_batch(classes, sizes=[(64, 64)] * 2)
    else:
        batch = (detection_batch if detects else segmentation_batch)(classes)
    losses = model.train().train_step(batch, build_optim_wrapper(model, cfg.optim_wrapper))
    assert {*losses} > LOSSES[cfg.model.type]
    assert all(value.isfinite() for value in losses.values())
    assert not missed
    assert torch.equal(stem, before[0]) == bool(frozen)
    assert not torch.equal(neck, before[1])
    (check_detection if detects else check_segmentation)(model.eval(), classes)


def check_detection(model, classes: int):
    result, = model.test_step(detection_batch(classes, sizes=[(70, 96)]))
    found = result.pred_instances
    assert 0 < len(found) <= 10
    assert found.bboxes.isfinite().all() and found.labels.max() < classes
    assert found.masks.shape == (len(found), *result.ori_shape)


def check_segmentation(model, classes: int):
    result, = model.test_step(segmentation_batch(classes, size=(70, 96), count=1))
    assert result.seg_logits.data.shape == (classes, 70, 192)
    assert result.seg_logits.data.isfinite().all()
    assert result.pred_sem_seg.data.shape == (1, 70, 192)


@pytest.mark.parametrize('name', [name for name in NAMES if 'poolformer_s12' in name])
def test_poolformer_loads_the_weights_of_a_classifier(name, tmp_path):
    """The backbone has a norm on each output; a classifier has only the last."""
    cfg = Config.fromfile(CONFIGS / name)
    backbone = cfg.model.backbone
    torch.manual_seed(0)
    classifier = MODELS.build(dict(type=POOL, arch='s12'))
    weights = {f'backbone.{key}': torch.rand_like(value)
               for key, value in classifier.state_dict().items()}
    torch.save(dict(state_dict={**weights, 'head.fc.bias': torch.rand(1000)}), tmp_path / 'a.pth')
    backbone.init_cfg.checkpoint = str(tmp_path / 'a.pth')
    model = MODELS.build(backbone)
    model.init_weights()
    state = model.state_dict()
    for key, value in weights.items():
        assert torch.equal(state.pop(key[len('backbone.'):]), value)
    assert sorted(state) == sorted(f'norm{i}.{what}' for i in (0, 2, 4)
                                   for what in ('weight', 'bias'))
    assert [type(getattr(model, f'norm{i}')) for i in (0, 2, 4, 6)] == [torch.nn.GroupNorm] * 4
