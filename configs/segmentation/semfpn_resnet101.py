# python tools/train.py configs/segmentation/semfpn_resnet101.py
# tools/dist_train.sh configs/segmentation/semfpn_resnet101.py 8
# The recipe of the other backbones; semfpn_resnet101_mmseg160k.py has mmseg's.
_base_ = 'semfpn_resnet50.py'

model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint='open-mmlab://resnet101_v1c')))
