# python tools/train.py configs/segmentation/semfpn_resnet101_mmseg160k.py
# tools/dist_train.sh configs/segmentation/semfpn_resnet101_mmseg160k.py 4
# mmseg's recipe, fpn_r101_4xb4-160k_ade20k-512x512.
_base_ = 'semfpn_resnet50_mmseg160k.py'

model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint='open-mmlab://resnet101_v1c')))
