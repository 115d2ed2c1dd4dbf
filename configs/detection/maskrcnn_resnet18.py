# python tools/train.py configs/detection/maskrcnn_resnet18.py
# tools/dist_train.sh configs/detection/maskrcnn_resnet18.py 8
# mmdet's recipe for ResNet-50, mask-rcnn_r50_fpn_1x_coco; it has none for ResNet-18.
_base_ = 'maskrcnn_resnet50.py'

model = dict(
    backbone=dict(depth=18, init_cfg=dict(checkpoint='torchvision://resnet18')),
    neck=dict(in_channels=[64, 128, 256, 512]))
