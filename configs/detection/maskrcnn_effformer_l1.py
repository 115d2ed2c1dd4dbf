# python tools/train.py configs/detection/maskrcnn_effformer_l1.py
# tools/dist_train.sh configs/detection/maskrcnn_effformer_l1.py 8
_base_ = [
    '../_base_/models/maskrcnn_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_1x.py',
    '../_base_/detection_runtime.py',
]

model = dict(
    backbone=dict(
        type='mmeffformer.EfficientFormer',
        arch='l1',
        # Tables for 25 x 25 tokens: a side of 800 px at stride 32.
        bias_grid=25,
        out_norm_cfg=dict(type='GN', num_groups=1),
        init_cfg=dict(
            type='Pretrained',
            # The network of 300 epochs, as in the paper; the L1 of mmpretrain and timm has 1000.
            checkpoint='hf-hub:snap-research/efficientformer-l1-300')),
    neck=dict(in_channels=[48, 96, 224, 448]))
