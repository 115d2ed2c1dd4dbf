# python tools/train.py configs/segmentation/semfpn_resnet18.py
# tools/dist_train.sh configs/segmentation/semfpn_resnet18.py 8
# The recipe of the other backbones; semfpn_resnet18_mmseg160k.py has mmseg's.
_base_ = 'semfpn_resnet50.py'

model = dict(
    backbone=dict(depth=18, init_cfg=dict(checkpoint='open-mmlab://resnet18_v1c')),
    neck=dict(in_channels=[64, 128, 256, 512]))
