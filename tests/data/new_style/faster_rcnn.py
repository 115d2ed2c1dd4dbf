# ruff: noqa: F403, F405
# Faster R-CNN on a tiny EfficientFormer; see runtime.py.
from mmengine.config import read_base

with read_base():
    from .runtime import *

from mmcv.ops import RoIAlign, nms
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, RandomFlip, Resize
from mmdet.engine.hooks import DetVisualizationHook
from mmdet.evaluation import CocoMetric
from mmdet.models import (
    FPN,
    DetDataPreprocessor,
    FasterRCNN,
    RPNHead,
    Shared2FCBBoxHead,
    SingleRoIExtractor,
    StandardRoIHead,
)
from mmdet.models.losses import CrossEntropyLoss, L1Loss
from mmdet.models.task_modules import (
    AnchorGenerator,
    DeltaXYWHBBoxCoder,
    MaxIoUAssigner,
    RandomSampler,
)
from mmdet.visualization import DetLocalVisualizer

coder = dict(type=DeltaXYWHBBoxCoder, target_means=[0.] * 4, target_stds=[1.] * 4)
model = dict(
    type=FasterRCNN,
    data_preprocessor=dict(type=DetDataPreprocessor, **norm, pad_size_divisor=32),
    backbone=backbone,
    neck=dict(type=FPN, in_channels=channels, out_channels=width, num_outs=5),
    rpn_head=dict(
        type=RPNHead, in_channels=width, feat_channels=width,
        anchor_generator=dict(
            type=AnchorGenerator, scales=[4], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]),
        bbox_coder=coder,
        loss_cls=dict(type=CrossEntropyLoss, use_sigmoid=True),
        loss_bbox=dict(type=L1Loss)),
    roi_head=dict(
        type=StandardRoIHead,
        bbox_roi_extractor=dict(
            type=SingleRoIExtractor, out_channels=width, featmap_strides=[4, 8, 16, 32],
            roi_layer=dict(type=RoIAlign, output_size=7, sampling_ratio=0)),
        bbox_head=dict(
            type=Shared2FCBBoxHead, in_channels=width, fc_out_channels=32, roi_feat_size=7,
            num_classes=6, bbox_coder=coder,
            loss_cls=dict(type=CrossEntropyLoss),
            loss_bbox=dict(type=L1Loss))),
    train_cfg=dict(
        rpn=dict(
            assigner=dict(
                type=MaxIoUAssigner, pos_iou_thr=0.5, neg_iou_thr=0.3, min_pos_iou=0.3,
                ignore_iof_thr=-1),
            sampler=dict(
                type=RandomSampler, num=64, pos_fraction=0.5, add_gt_as_proposals=False),
            allowed_border=-1, pos_weight=-1, debug=False),
        rpn_proposal=dict(
            nms_pre=100, max_per_img=50, nms=dict(type=nms, iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(
            assigner=dict(
                type=MaxIoUAssigner, pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5,
                ignore_iof_thr=-1),
            sampler=dict(type=RandomSampler, num=64, pos_fraction=0.25),
            pos_weight=-1, debug=False)),
    test_cfg=dict(
        rpn=dict(
            nms_pre=100, max_per_img=50, nms=dict(type=nms, iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(score_thr=0.0, nms=dict(type=nms, iou_threshold=0.5), max_per_img=20)))

data_root = 'data/shapes/'
metainfo = dict(classes=('circle', 'rectangle', 'triangle', 'star', 'ring', 'cross'))
train_dataloader.update(dict(dataset=dict(
    type=CocoDataset, data_root=data_root, metainfo=metainfo,
    ann_file='annotations/instances_train.json', data_prefix=dict(img='train/'),
    pipeline=[
        dict(type=LoadImageFromFile),
        dict(type=LoadAnnotations, with_bbox=True),
        dict(type=RandomFlip, prob=0.5),
        dict(type=PackDetInputs)])))
val_dataloader.update(dict(dataset=dict(
    type=CocoDataset, data_root=data_root, metainfo=metainfo, test_mode=True,
    ann_file='annotations/instances_val.json', data_prefix=dict(img='val/'),
    pipeline=[
        dict(type=LoadImageFromFile),
        dict(type=Resize, scale=(96, 64), keep_ratio=True),
        dict(type=LoadAnnotations, with_bbox=True),
        dict(type=PackDetInputs, meta_keys=(
            'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))])))
test_dataloader = val_dataloader
val_evaluator = dict(
    type=CocoMetric, ann_file=data_root + 'annotations/instances_val.json', metric='bbox')
test_evaluator = val_evaluator
default_hooks.update(dict(visualization=dict(type=DetVisualizationHook)))
visualizer = dict(type=DetLocalVisualizer, vis_backends=vis_backends, name='visualizer')
