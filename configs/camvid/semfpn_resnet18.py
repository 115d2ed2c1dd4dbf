# python tools/train.py configs/camvid/semfpn_resnet18.py
_base_ = 'semfpn_effformer_l1.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='ResNetV1c',
        depth=18,
        norm_cfg=dict(type='SyncBN')),
    neck=dict(in_channels=[64, 128, 256, 512]))
