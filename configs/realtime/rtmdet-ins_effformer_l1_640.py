# python tools/train.py configs/realtime/rtmdet-ins_effformer_l1_640.py
# tools/dist_train.sh configs/realtime/rtmdet-ins_effformer_l1_640.py 8
_base_ = [
    '../_base_/models/rtmdet_ins_tiny.py',
    '../_base_/schedules/coco_300e_640.py',
    '../_base_/detection_runtime.py',
]

model = dict(
    backbone=dict(
        type='mmeffformer.EfficientFormer',
        arch='l1',
        out_indices=(1, 2, 3),
        # Tables for 20 x 20 tokens: a side of 640 px at stride 32.
        bias_grid=20,
        out_norm_cfg=dict(type='GN', num_groups=1),
        init_cfg=dict(
            type='Pretrained',
            # The network of 300 epochs, as in the paper; the L1 of mmpretrain and timm has 1000.
            checkpoint='hf-hub:snap-research/efficientformer-l1-300')),
    neck=dict(in_channels=[96, 224, 448]))
