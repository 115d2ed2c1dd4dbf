# python tools/train.py configs/detection/maskrcnn_effformer_l1.py
# tools/dist_train.sh configs/detection/maskrcnn_effformer_l1.py 8
_base_ = [
    '../_base_/models/maskrcnn_effformer.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_1x.py',
    '../_base_/default_runtime.py',
]
