# python tools/train.py configs/segmentation/semfpn_effformer_l7.py
# tools/dist_train.sh configs/segmentation/semfpn_effformer_l7.py 8
_base_ = 'semfpn_effformer_l1.py'

model = dict(
    backbone=dict(
        arch='l7',
        # The authors' dense L7 starts its residual branches lower than their other archs.
        layer_scale_init_value=1e-6,
        init_cfg=dict(
            checkpoint='https://download.openmmlab.com/mmclassification/v0/efficientformer/'
            'efficientformer-l7_3rdparty_in1k_20220915-185e30af.pth')),
    neck=dict(in_channels=[96, 192, 384, 768]))
