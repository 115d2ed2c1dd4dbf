# python tools/train.py configs/segmentation/semfpn_resnet50.py
# tools/dist_train.sh configs/segmentation/semfpn_resnet50.py 8
# The recipe of the other backbones; semfpn_resnet50_mmseg160k.py has mmseg's.
_base_ = [
    '../_base_/models/semfpn.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_40k.py',
    '../_base_/segmentation_runtime.py',
]

model = dict(
    backbone=dict(
        type='mmseg.ResNetV1c',
        depth=50,
        norm_cfg=dict(type='SyncBN'),
        init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://resnet50_v1c')),
    neck=dict(in_channels=[256, 512, 1024, 2048]))
