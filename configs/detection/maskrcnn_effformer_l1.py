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
            checkpoint='https://download.openmmlab.com/mmclassification/v0/efficientformer/'
            'efficientformer-l1_3rdparty_in1k_20220915-cc3e1ac6.pth')),
    neck=dict(in_channels=[48, 96, 224, 448]))
