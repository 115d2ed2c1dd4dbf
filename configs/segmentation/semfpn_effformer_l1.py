# python tools/train.py configs/segmentation/semfpn_effformer_l1.py
# tools/dist_train.sh configs/segmentation/semfpn_effformer_l1.py 8
_base_ = [
    '../_base_/models/semfpn.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_40k.py',
    '../_base_/segmentation_runtime.py',
]

model = dict(
    backbone=dict(
        type='mmeffformer.EfficientFormer',
        arch='l1',
        # Tables for 16 x 16 tokens: a crop of 512 px at stride 32.
        bias_grid=16,
        norm_cfg=dict(type='SyncBN'),
        out_norm_cfg=dict(type='GN', num_groups=1),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/efficientformer/'
            'efficientformer-l1_3rdparty_in1k_20220915-cc3e1ac6.pth')),
    neck=dict(in_channels=[48, 96, 224, 448]))
