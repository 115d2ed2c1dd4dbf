"""Detectors and segmentors of mmdet and mmseg with an EfficientFormer as their backbone."""
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

from mmeffformer import swap_backbone
from mmeffformer.apis.smoke_test import build_model, train_and_predict
from mmeffformer.utils.config import iter_dicts

WIDTHS = 16, 24, 32, 48
TINY = dict(widths=WIDTHS, depths=(1, 1, 1, 2), attention_blocks=(0, 0, 0, 1))
RGB = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)

RETINANET = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
SWIN_MASK2FORMER = 'mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py'
PSPNET = 'mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'
DEEPLAB = 'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024.py'
SWIN_UPERNET = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'


def load(name: str) -> Config:
    library, path = name.split('::')
    return Config.fromfile(Path(find_spec(library).origin).parent / '.mim/configs' / path)


ANY_SCORE = {'model.test_cfg.score_thr': 0., 'model.test_cfg.min_bbox_size': -1,
             'model.test_cfg.max_per_img': 7}
ANY_ROI_SCORE = {'model.test_cfg.rcnn.score_thr': 0., 'model.test_cfg.rcnn.max_per_img': 7,
                 'model.test_cfg.rpn.max_per_img': 50,
                 'model.train_cfg.rpn_proposal.max_per_img': 50}

# Config: out_indices, some of its losses, and options that make it small or keep every detection.
TARGETS = {
    RETINANET: ((1, 2, 3), {'loss_cls', 'loss_bbox'}, ANY_SCORE),
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py': (
        (0, 1, 2, 3), {'loss_rpn_cls', 'loss_cls', 'loss_bbox'}, ANY_ROI_SCORE),
    'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py': (
        (0, 1, 2, 3), {'s0.loss_bbox', 's2.loss_mask'}, ANY_ROI_SCORE),
    'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py': (
        (1, 2, 3), {'loss_cls', 'loss_centerness'}, ANY_SCORE),
    'mmdet::atss/atss_r50_fpn_1x_coco.py': (
        (1, 2, 3), {'loss_cls', 'loss_centerness'}, ANY_SCORE),
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py': (
        (1, 2, 3), {'loss_cls', 'loss_bbox'}, ANY_SCORE),
    'mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py': (
        (1, 2, 3), {'loss_cls', 'loss_bbox', 'loss_mask'}, ANY_SCORE),
    SWIN_MASK2FORMER: (
        (0, 1, 2, 3), {'loss_cls', 'loss_mask', 'loss_dice', 'd0.loss_mask'},
        {'model.panoptic_head.num_queries': 10,
         'model.panoptic_head.transformer_decoder.num_layers': 1,
         'model.panoptic_head.pixel_decoder.encoder.num_layers': 1,
         'model.test_cfg.max_per_image': 7}),
    'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py': (
        (1, 2, 3), {'loss_cls', 'loss_bbox', 'loss_iou'},
        {'model.num_queries': 10, 'model.encoder.num_layers': 1, 'model.decoder.num_layers': 1,
         'model.test_cfg.max_per_img': 7}),
    'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py': (
        (1, 2, 3), {'loss_cls', 'enc_loss_cls', 'dn_loss_cls'},
        {'model.num_queries': 10, 'model.encoder.num_layers': 1, 'model.decoder.num_layers': 1,
         'model.dn_cfg.group_cfg.num_dn_queries': 5, 'model.test_cfg.max_per_img': 7}),
    SWIN_UPERNET: ((0, 1, 2, 3), {'decode.loss_ce', 'aux.loss_ce'},
                   {'model.decode_head.channels': 32}),
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py': (
        (0, 1, 2, 3), {'decode.loss_ce'}, {}),
    PSPNET: ((2, 3), {'decode.loss_ce', 'aux.loss_ce'}, {}),
    DEEPLAB: ((0, 2, 3), {'decode.loss_ce', 'aux.loss_ce'}, {}),
    'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py': (
        (0, 1, 2, 3), {'decode.loss_cls', 'decode.loss_mask'},
        {'model.decode_head.num_queries': 10,
         'model.decode_head.transformer_decoder.num_layers': 1,
         'model.decode_head.pixel_decoder.encoder.num_layers': 1}),
}


@pytest.mark.parametrize('name', TARGETS)
def test_target_trains_and_predicts(name):
    stages, names, smaller = TARGETS[name]
    kind = 'EfficientFormerV2' if list(TARGETS).index(name) % 2 else 'EfficientFormer'
    # Scales near one, so that a gradient shows in the weights.
    cfg = swap_backbone(load(name), TINY, type=kind, layer_scale_init_value=1.)
    assert cfg.model.backbone.type == f'mmeffformer.{kind}'
    assert tuple(cfg.model.backbone.out_indices) == stages
    cfg.merge_from_dict(smaller)

    torch.manual_seed(0)
    model = build_model(cfg)
    assert model.backbone.out_channels == tuple(WIDTHS[i] for i in stages)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    before = deepcopy(model.backbone.state_dict())
    losses, (found, *none) = train_and_predict(cfg, model, size=64)
    assert names < {*losses} and not none
    assert all(0 <= value < 1e4 for key, value in losses.items() if 'loss' in key)
    for key, parameter in model.backbone.named_parameters():
        assert parameter.requires_grad and parameter.grad.isfinite().all(), key
    optimizer.step()
    assert not torch.equal(before['stem.0.conv.weight'], model.backbone.stem[0].conv.weight)

    if cfg.default_scope == 'mmseg':
        labels = found.pred_sem_seg.data
        assert labels.shape == (1, 64, 48)
        assert 0 <= labels.min() and labels.max() < cfg.model.decode_head.num_classes
    else:
        boxes = found.pred_instances
        assert 0 < len(boxes) <= 7
        assert boxes.bboxes.isfinite().all() and boxes.scores.isfinite().all()
        assert 0 <= boxes.labels.min() and boxes.labels.max() < 80
        if 'masks' in boxes:
            assert boxes.masks.shape == (len(boxes), 64, 48)


def test_other_parts_are_unchanged():
    old = load(RETINANET)
    new = swap_backbone(old, 'l3')
    assert old.to_dict() == load(RETINANET).to_dict()
    assert new.model.backbone == dict(
        type='mmeffformer.EfficientFormer', arch='l3', out_indices=(1, 2, 3), bias_grid=25,
        out_norm_cfg=dict(type='GN', num_groups=1), init_cfg=dict(
            type='Pretrained', checkpoint='https://download.openmmlab.com/mmclassification/v0/'
            'efficientformer/efficientformer-l3_3rdparty_in1k_20220915-466793d6.pth'))
    # The neck ignores the first level, whose parameters would get no gradient.
    assert old.model.neck.in_channels == [256, 512, 1024, 2048]
    assert new.model.neck == dict(old.model.neck, in_channels=[128, 320, 512], start_level=0)
    assert new.custom_imports == dict(imports=['mmeffformer'])
    for part in 'backbone', 'neck':
        old.model.pop(part), new.model.pop(part)
    new.pop('custom_imports')
    assert new.to_dict() == old.to_dict()  # the preprocessor of ResNet is the same


def test_imports_are_kept():
    cfg = load(RETINANET)
    cfg.custom_imports = dict(imports=['torch'], allow_failed_imports=False)
    assert swap_backbone(cfg, 's0').custom_imports == dict(
        imports=['torch', 'mmeffformer'], allow_failed_imports=False)
    cfg.custom_imports = dict(imports='mmeffformer')
    assert swap_backbone(cfg, 's0').custom_imports == dict(imports=['mmeffformer'])


@pytest.mark.parametrize('name, arch, expected', [
    (RETINANET, 'l7', dict(bias_grid=25, layer_scale_init_value=1e-6)),
    (RETINANET, 'l', dict(bias_grid=25, drop_path_rate=.1, out_norm_cfg=None)),
    (SWIN_UPERNET, 'l1', dict(bias_grid=16, norm_cfg=dict(type='SyncBN'))),
    (SWIN_UPERNET, 's2', dict(bias_grid=16, drop_path_rate=.02, init_cfg=dict(
        type='Pretrained', checkpoint='hf-hub:timm/efficientformerv2_s2.snap_dist_in1k'))),
    (RETINANET, TINY, dict(type='mmeffformer.EfficientFormer', arch=TINY, init_cfg=None)),
])
def test_backbone_is_that_of_the_project_configs(name, arch, expected):
    backbone = swap_backbone(load(name), arch).model.backbone
    assert dict(backbone, **expected) == backbone


def test_options_reach_the_backbone():
    cfg = swap_backbone(load(RETINANET), TINY, type='EfficientFormerV2', frozen_stages=1,
                        out_norm_cfg=dict(type='BN'))
    assert cfg.model.backbone.type == 'mmeffformer.EfficientFormerV2'
    assert cfg.model.backbone.frozen_stages == 1
    assert cfg.model.backbone.out_norm_cfg == dict(type='BN')
    assert swap_backbone(load(RETINANET), 'l1', out_norm_cfg=dict(
        type='BN')).model.backbone.out_norm_cfg == dict(type='BN')
    assert cfg.model.neck.in_channels == [24, 32, 48]


@pytest.mark.parametrize('name, given, expected', [
    (RETINANET, dict(pad_size_divisor=128), dict(pad_size_divisor=128)),
    (RETINANET, dict(pad_size_divisor=1, mean=[0., 0., 0.], std=[255., 255., 255.]),
     dict(pad_size_divisor=32)),
    ('mmdet::yolox/yolox_s_8xb8-300e_coco.py', {}, dict(pad_size_divisor=32)),
    ('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', {}, dict(pad_size_divisor=32)),
    (PSPNET, {}, dict(size=(512, 1024), test_cfg=dict(size_divisor=32))),
    (PSPNET, dict(size=None, test_cfg=dict(size=(512, 512))),
     dict(size=None, size_divisor=32, test_cfg=dict(size=(512, 512)))),
])
def test_preprocessor(name, given, expected):
    cfg = load(name)
    cfg.model.data_preprocessor.update(given)
    kept = cfg.model.data_preprocessor.get('batch_augments')
    preprocessor = swap_backbone(cfg, 's0').model.data_preprocessor
    assert dict(preprocessor, **RGB, **expected) == preprocessor
    assert preprocessor.get('batch_augments') == kept


def test_optimizer_options_of_the_old_backbone_are_dropped():
    old, new = load(SWIN_MASK2FORMER), swap_backbone(load(SWIN_MASK2FORMER), 's0')
    assert 'backbone.patch_embed.norm' in old.optim_wrapper.paramwise_cfg.custom_keys
    keys = new.optim_wrapper.paramwise_cfg.pop('custom_keys')
    assert {*keys} == {'backbone', 'query_embed', 'query_feat', 'level_embed'}
    assert keys.backbone == dict(lr_mult=.1, decay_mult=1.)
    old.optim_wrapper.paramwise_cfg.pop('custom_keys')
    assert new.optim_wrapper == old.optim_wrapper

    new = swap_backbone(load(SWIN_UPERNET), 's0')
    assert new.optim_wrapper.paramwise_cfg == dict(custom_keys=dict(norm=dict(decay_mult=0.)))


def test_layer_decay_is_dropped():
    cfg = load(SWIN_UPERNET)
    cfg.optim_wrapper.constructor = 'LearningRateDecayOptimizerConstructor'
    cfg.optim_wrapper.pop('paramwise_cfg')
    cfg.optim_wrapper.paramwise_cfg = dict(
        decay_rate=.9, decay_type='stage_wise', num_layers=6, norm_decay_mult=0)
    wrapper = swap_backbone(cfg, 's0').optim_wrapper
    assert wrapper == dict(type='OptimWrapper', optimizer=cfg.optim_wrapper.optimizer,
                           paramwise_cfg=dict(norm_decay_mult=0))


def test_weights_of_the_old_model_are_dropped():
    cfg = load(PSPNET)
    assert cfg.model.pretrained == 'open-mmlab://resnet50_v1c'
    cfg.load_from = 'pspnet.pth'
    cfg.model.init_cfg = dict(type='Pretrained', checkpoint='pspnet.pth')
    cfg = swap_backbone(cfg, 'l1')
    assert not {'pretrained', 'init_cfg'} & {*cfg.model} and cfg.load_from is None


def test_heads_read_the_output_stages():
    cfg = swap_backbone(load(DEEPLAB), 'l1')
    assert cfg.model.backbone.out_indices == (0, 2, 3)
    head, auxiliary = cfg.model.decode_head, cfg.model.auxiliary_head
    assert (head.in_channels, head.in_index, head.c1_in_channels) == (448, 2, 48)
    assert (auxiliary.in_channels, auxiliary.in_index) == (224, 1)
    assert (head.channels, head.c1_channels, auxiliary.channels) == (512, 48, 256)
    # A head without convolutions has the channels of the backbone.
    segmenter = 'mmseg::segmenter/segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512.py'
    head = swap_backbone(load(segmenter), 'l1').model.decode_head
    assert (head.in_channels, head.channels, head.in_index) == (448, 448, 0)


@pytest.mark.parametrize('name, channels', [
    ('mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py', [48, 96, 224, 448]),
    ('mmseg::knet/knet-s3_r50-d8_fcn_8xb2-adamw-80k_ade20k-512x512.py', 448),
    ('mmseg::ocrnet/ocrnet_hr18_4xb2-40k_cityscapes-512x1024.py', [48, 96, 224, 448]),
    ('mmseg::encnet/encnet_r50-d8_4xb2-40k_cityscapes-512x1024.py', [448]),
])
def test_heads_of_other_kinds(name, channels):
    model = swap_backbone(load(name), 'l1').model
    assert not model.get('neck')
    head = model.decode_head[0] if isinstance(model.decode_head, list) else model.decode_head
    assert head.get('kernel_generate_head', head).in_channels == channels


@pytest.mark.parametrize('name, channels', [
    ('mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py', [448, 224, 96]),
    ('mmdet::yolof/yolof_r50-c5_8xb8-1x_coco.py', 448),
    ('mmdet::ssd/ssd300_coco.py', (96, 224)),
    ('mmseg::fastfcn/fastfcn_r50-d32_jpu_aspp_4xb2-80k_cityscapes-512x1024.py', (96, 224, 448)),
    ('mmdet::qdtrack/qdtrack_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval.py',
     [48, 96, 224, 448]),
])
def test_necks_of_other_kinds(name, channels):
    model = swap_backbone(load(name), 'l1').model
    model = model.get('detector', model)
    assert model.neck.in_channels == channels and type(model.neck.in_channels) is type(channels)
    if model.neck.type == 'SSDNeck':
        assert model.neck.out_channels == model.bbox_head.in_channels == (
            96, 224, 512, 256, 256, 256)
    if model.neck.type == 'JPU':  # its first outputs are the backbone's
        assert (model.auxiliary_head.in_channels, model.auxiliary_head.in_index) == (224, 1)


def test_single_level_keeps_the_stride_of_the_anchors():
    cfg = swap_backbone(load('mmdet::faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco.py'), 'l1')
    assert cfg.model.backbone.out_indices == (2,)
    assert cfg.model.rpn_head.anchor_generator.strides == [16]
    roi_head = cfg.model.roi_head
    assert (cfg.model.rpn_head.in_channels, roi_head.bbox_roi_extractor.out_channels,
            roi_head.bbox_head.in_channels) == (224, 224, 224)
    assert cfg.model.rpn_head.feat_channels == 2048  # the head's own


@pytest.mark.parametrize('name, message', [
    ('mmdet::faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py', 'roi_head.shared_head ResLayer'),
    ('mmdet::detectors/cascade-rcnn_r50-rfp_1x_coco.py', 'neck RFP .* feeds its outputs back'),
    ('mmdet::nas_fcos/nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco.py',
     'NASFCOS_FPN .* get no gradient'),
    ('mmdet::misc/d2_mask-rcnn_r50-caffe_fpn_ms-90k_coco.py', 'Detectron2Wrapper has no backbone'),
    ('mmdet::tridentnet/tridentnet_r50-caffe_1x_coco.py', 'TridentRoIHead takes the branches'),
    ('mmdet::cornernet/cornernet_hourglass104_8xb6-210e-mstest_coco.py', 'of strides 4, 4, '),
    ('mmdet::rtmdet/rtmdet_l_swin_b_4xb32-100e_coco.py', 'CSPNeXtPAFPN cannot be built with in_c'),
    ('mmseg::unet/unet-s5-d16_fcn_4xb4-40k_chase-db1-128x128.py', 'not a pyramid from fine to '),
    ('mmseg::bisenetv1/bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024.py', '256, 128, 128 ch'),
    ('mmseg::dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512.py', 'class token'),
    ('mmseg::ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024.py',
     'DDRNet has 2 outputs in training but 1 otherwise'),
    ('mmseg::ocrnet/ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024.py', 'two levels of one stride'),
    ('mmseg::setr/setr_vit-l-mla_8xb1-160k_ade20k-512x512.py', 'neck MLANeck .* of one stride'),
    ('mmseg::san/san-vit-b16_coco-stuff164k-640x640.py', 'has no backbone to replace'),
])
def test_unsupported_configs_raise(name, message):
    with pytest.raises(ValueError, match=message):
        swap_backbone(load(name), 'l1')


def test_wrong_arguments():
    cfg = load(RETINANET)
    with pytest.raises(ValueError, match="arch 'l2' is unknown; choose from l1, l3, l7, s0, s1,"):
        swap_backbone(cfg, 'l2')
    with pytest.raises(ValueError, match='arch dict lacks depths'):
        swap_backbone(cfg, dict(widths=WIDTHS))
    with pytest.raises(ValueError, match='expected EfficientFormer or EfficientFormerV2'):
        swap_backbone(cfg, TINY, type='ResNet')
    with pytest.raises(ValueError, match="unexpected keyword argument 'depth'"):
        swap_backbone(cfg, 'l1', depth=50)
    with pytest.raises(ValueError, match='out_indices follows from the stages that neck'):
        swap_backbone(cfg, 'l1', out_indices=(0, 1))
    with pytest.raises(ValueError, match="default_scope 'mmpretrain': expected mmdet or mmseg"):
        swap_backbone(Config(dict(cfg.to_dict(), default_scope='mmpretrain')), 'l1')
    cfg.model.neck.in_channels = [256, 512, 1024, 1024]
    with pytest.raises(ValueError, match=r'1024, 1024\], but the old backbone gives \[256, 512'):
        swap_backbone(cfg, 'l1')
    cfg.model.backbone.depth = 49
    with pytest.raises(ValueError, match='ResNet cannot be built .* KeyError: .*49'):
        swap_backbone(cfg, 'l1')


def test_pure_python_config(tmp_path):
    """Types are classes instead of names."""
    path = tmp_path / 'mine.py'
    path.write_text("""
from mmseg.models import CrossEntropyLoss, EncoderDecoder, FCNHead, ResNetV1c, SegDataPreProcessor
default_scope = 'mmseg'
norm_cfg = dict(type='BN')
model = dict(
    type=EncoderDecoder, data_preprocessor=dict(type=SegDataPreProcessor, size=(64, 64)),
    backbone=dict(type=ResNetV1c, depth=18, norm_cfg=norm_cfg),
    decode_head=dict(
        type=FCNHead, in_channels=512, in_index=3, channels=16, num_classes=3, norm_cfg=norm_cfg,
        loss_decode=dict(type=CrossEntropyLoss)),
    test_cfg=dict(mode='whole'))
""")
    cfg = swap_backbone(Config.fromfile(path), TINY)
    cfg.dump(path)
    cfg = Config.fromfile(path)
    assert (cfg.model.decode_head.in_channels, cfg.model.decode_head.in_index) == (48, 0)
    assert cfg.model.data_preprocessor.test_cfg.size_divisor == 32
    model = build_model(cfg)
    assert type(model.backbone).__name__ == 'EfficientFormer'
    assert model.backbone.out_indices == (3,)
    assert train_and_predict(cfg, model, size=64)[0]['loss'] > 0


def test_parameters_without_a_gradient_raise():
    cfg = swap_backbone(load(PSPNET), TINY)
    cfg.model.backbone.out_indices = (0, 1, 2, 3)
    cfg.model.decode_head.in_index, cfg.model.auxiliary_head.in_index = 3, 2
    with pytest.raises(RuntimeError, match='4 parameters of the backbone without a gradient: '
                                           'out_norms.0.weight'):
        train_and_predict(cfg, build_model(cfg), size=64)


def with_images(cfg: Config, channels: int, **norm) -> Config:
    cfg.model.backbone.in_channels = channels
    cfg.model.data_preprocessor.update(dict(norm, bgr_to_rgb=False))
    return cfg


@pytest.mark.parametrize('name, channels, norm', [
    (RETINANET, 4, dict(mean=None, std=None)),
    (RETINANET, 1, dict(mean=[100.], std=[50.])),
    (PSPNET, 8, dict(mean=None, std=None)),
    (PSPNET, 3, dict(mean=[31784., 29884., 26610.], std=[15007., 14680., 14745.]))])
def test_other_images_keep_channels_mean_and_std(name, channels, norm, caplog):
    cfg = swap_backbone(with_images(load(name), channels, **norm), TINY, type='EfficientFormerV2')
    published = swap_backbone(with_images(load(name), channels, **norm), 's0').model.backbone
    assert published.in_channels == channels and published.init_cfg is None
    preprocessor = cfg.model.data_preprocessor
    assert dict(preprocessor, **norm, bgr_to_rgb=False) == preprocessor
    assert 32 in (preprocessor.get('pad_size_divisor'),
                  (preprocessor.get('test_cfg') or {}).get('size_divisor'))
    model = build_model(cfg)
    assert model.backbone.stem[0].conv.weight.shape[1] == channels
    if channels == 8:
        train_and_predict(cfg, model, size=64)


def test_preprocessor_at_the_top_and_images_normalised_by_the_pipeline():
    cfg = load(RETINANET)
    cfg.data_preprocessor = dict(cfg.model.pop('data_preprocessor'), mean=[1., 2., 3.])
    new = swap_backbone(cfg, 's0')
    assert dict(new.data_preprocessor, **RGB) == new.data_preprocessor
    assert 'data_preprocessor' not in new.model and new.model.backbone.init_cfg
    cfg.train_dataloader.dataset.pipeline.insert(1, dict(type='Normalize', mean=[0.], std=[1.]))
    new = swap_backbone(cfg, 's0')
    assert new.data_preprocessor.mean == [1., 2., 3.] and new.model.backbone.init_cfg is None


@pytest.mark.parametrize('name', ['faster_rcnn', 'semfpn'])
def test_config_of_the_new_style_becomes_one_of_names(name, repo_root, tmp_path):
    cfg = Config.fromfile(repo_root / f'tests/data/new_style/{name}.py')
    cfg = swap_backbone(cfg, dict(TINY, widths=(8, 16, 24, 40)))
    cfg.dump(tmp_path / 'new.py')
    cfg = Config.fromfile(tmp_path / 'new.py')
    assert cfg.model.neck.in_channels == [8, 16, 24, 40]
    assert not any('.' in part['type'].removeprefix('mmeffformer.').removeprefix('mmengine.')
                   for part in iter_dicts(cfg.to_dict()) if 'type' in part)
    losses, _ = train_and_predict(cfg, build_model(cfg), size=64)
    assert losses['loss'] > 0
