# python tools/train.py configs/segmentation/semfpn_resnet18_mmseg160k.py
# tools/dist_train.sh configs/segmentation/semfpn_resnet18_mmseg160k.py 4
# mmseg's recipe, fpn_r50_4xb4-160k_ade20k-512x512, which is for ResNet-50.
_base_ = 'semfpn_resnet50_mmseg160k.py'

model = dict(
    backbone=dict(depth=18, init_cfg=dict(checkpoint='open-mmlab://resnet18_v1c')),
    neck=dict(in_channels=[64, 128, 256, 512]))
