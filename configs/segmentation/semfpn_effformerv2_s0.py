# python tools/train.py configs/segmentation/semfpn_effformerv2_s0.py
# tools/dist_train.sh configs/segmentation/semfpn_effformerv2_s0.py 8
_base_ = [
    '../_base_/models/semfpn.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_40k.py',
    '../_base_/segmentation_runtime.py',
]

model = dict(
    backbone=dict(
        type='mmeffformer.EfficientFormerV2',
        arch='s0',
        # Tables for 16 x 16 tokens: a crop of 512 px at stride 32.
        bias_grid=16,
        norm_cfg=dict(type='SyncBN'),
        out_norm_cfg=None,
        init_cfg=dict(
            type='Pretrained', checkpoint='hf-hub:timm/efficientformerv2_s0.snap_dist_in1k')),
    neck=dict(in_channels=[32, 48, 96, 176]))

param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=1e-6, by_epoch=False, begin=0, end=40000),
]
