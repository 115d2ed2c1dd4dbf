# python tools/train.py configs/realtime/rtmdet-ins_effformerv2_s0_640.py
# tools/dist_train.sh configs/realtime/rtmdet-ins_effformerv2_s0_640.py 8
_base_ = [
    '../_base_/models/rtmdet_ins_tiny.py',
    '../_base_/schedules/coco_300e_640.py',
    '../_base_/detection_runtime.py',
]

model = dict(
    backbone=dict(
        type='mmeffformer.EfficientFormerV2',
        arch='s0',
        out_indices=(1, 2, 3),
        # Tables for 20 x 20 tokens: a side of 640 px at stride 32.
        bias_grid=20,
        norm_cfg=dict(type='SyncBN'),
        out_norm_cfg=None,
        init_cfg=dict(
            type='Pretrained', checkpoint='hf-hub:timm/efficientformerv2_s0.snap_dist_in1k')),
    neck=dict(in_channels=[48, 96, 176]))
