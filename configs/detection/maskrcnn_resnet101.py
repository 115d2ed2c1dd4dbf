# python tools/train.py configs/detection/maskrcnn_resnet101.py
# tools/dist_train.sh configs/detection/maskrcnn_resnet101.py 8
# mmdet's recipe, mask-rcnn_r101_fpn_1x_coco.
_base_ = 'maskrcnn_resnet50.py'

model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101')))
