# python tools/train.py configs/detection/maskrcnn_effformerv2_s0.py
# tools/dist_train.sh configs/detection/maskrcnn_effformerv2_s0.py 8
_base_ = [
    '../_base_/models/maskrcnn_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_1x.py',
    '../_base_/detection_runtime.py',
]

model = dict(
    backbone=dict(
        type='mmeffformer.EfficientFormerV2',
        arch='s0',
        # Tables for 25 x 25 tokens: a side of 800 px at stride 32.
        bias_grid=25,
        # What the authors trained: their code meant to fix the statistics, and did not.
        norm_cfg=dict(type='SyncBN'),
        out_norm_cfg=None,
        init_cfg=dict(
            type='Pretrained', checkpoint='hf-hub:timm/efficientformerv2_s0.snap_dist_in1k')),
    neck=dict(in_channels=[32, 48, 96, 176]))

optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
