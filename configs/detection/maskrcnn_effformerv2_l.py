# python tools/train.py configs/detection/maskrcnn_effformerv2_l.py
# tools/dist_train.sh configs/detection/maskrcnn_effformerv2_l.py 8
_base_ = 'maskrcnn_effformerv2_s0.py'

model = dict(
    backbone=dict(
        arch='l',
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint='hf-hub:timm/efficientformerv2_l.snap_dist_in1k')),
    neck=dict(in_channels=[40, 80, 192, 384]))
