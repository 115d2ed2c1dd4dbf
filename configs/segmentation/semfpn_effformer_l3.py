# python tools/train.py configs/segmentation/semfpn_effformer_l3.py
# tools/dist_train.sh configs/segmentation/semfpn_effformer_l3.py 8
_base_ = 'semfpn_effformer_l1.py'

model = dict(
    backbone=dict(
        arch='l3',
        init_cfg=dict(
            checkpoint='https://download.openmmlab.com/mmclassification/v0/efficientformer/'
            'efficientformer-l3_3rdparty_in1k_20220915-466793d6.pth')),
    neck=dict(in_channels=[64, 128, 320, 512]))
