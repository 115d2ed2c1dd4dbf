# ruff: noqa: F403, F405
# Semantic FPN on a tiny EfficientFormer; see runtime.py.
from mmengine.config import read_base

with read_base():
    from .runtime import *

from mmcv.transforms import LoadImageFromFile, RandomFlip, Resize
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations, PackSegInputs
from mmseg.engine import SegVisualizationHook
from mmseg.evaluation import IoUMetric
from mmseg.models import EncoderDecoder, FPNHead, SegDataPreProcessor
from mmseg.models.losses import CrossEntropyLoss
from mmseg.models.necks import FPN
from mmseg.visualization import SegLocalVisualizer

model = dict(
    type=EncoderDecoder,
    data_preprocessor=dict(
        type=SegDataPreProcessor, **norm, size_divisor=32, test_cfg=dict(size_divisor=32)),
    backbone=backbone,
    neck=dict(type=FPN, in_channels=channels, out_channels=width, num_outs=4),
    decode_head=dict(
        type=FPNHead, in_channels=[width] * 4, in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32], channels=width, num_classes=7,
        norm_cfg=dict(type='BN'), align_corners=False,
        loss_decode=dict(type=CrossEntropyLoss, use_sigmoid=False)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))

data_root = 'data/shapes_ade20k/'
metainfo = dict(
    classes=('background', 'circle', 'rectangle', 'triangle', 'star', 'ring', 'cross'))
train_dataloader.update(dict(dataset=dict(
    type=BaseSegDataset, data_root=data_root, metainfo=metainfo, reduce_zero_label=True,
    data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
    pipeline=[
        dict(type=LoadImageFromFile),
        dict(type=LoadAnnotations, reduce_zero_label=True),
        dict(type=RandomFlip, prob=0.5),
        dict(type=PackSegInputs)])))
val_dataloader.update(dict(dataset=dict(
    type=BaseSegDataset, data_root=data_root, metainfo=metainfo, reduce_zero_label=True,
    data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
    pipeline=[
        dict(type=LoadImageFromFile),
        dict(type=Resize, scale=(96, 64), keep_ratio=True),
        dict(type=LoadAnnotations, reduce_zero_label=True),
        dict(type=PackSegInputs)])))
test_dataloader = val_dataloader
val_evaluator = dict(type=IoUMetric, iou_metrics=['mIoU'])
test_evaluator = val_evaluator
default_hooks.update(dict(visualization=dict(type=SegVisualizationHook)))
visualizer = dict(type=SegLocalVisualizer, vis_backends=vis_backends, name='visualizer')
