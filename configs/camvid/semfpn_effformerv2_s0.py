# python tools/train.py configs/camvid/semfpn_effformerv2_s0.py
_base_ = 'semfpn_effformer_l1.py'

model = dict(
    backbone=dict(type='mmeffformer.EfficientFormerV2', arch='s0', out_norm_cfg=None),
    neck=dict(in_channels=[32, 48, 96, 176]))
