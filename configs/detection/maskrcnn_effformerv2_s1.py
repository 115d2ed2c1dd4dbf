# python tools/train.py configs/detection/maskrcnn_effformerv2_s1.py
# tools/dist_train.sh configs/detection/maskrcnn_effformerv2_s1.py 8
_base_ = 'maskrcnn_effformerv2_s0.py'

model = dict(
    backbone=dict(
        arch='s1',
        init_cfg=dict(checkpoint='hf-hub:timm/efficientformerv2_s1.snap_dist_in1k')),
    neck=dict(in_channels=[32, 48, 120, 224]))
