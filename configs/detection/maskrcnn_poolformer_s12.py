# python tools/train.py configs/detection/maskrcnn_poolformer_s12.py
# tools/dist_train.sh configs/detection/maskrcnn_poolformer_s12.py 8
# PoolFormer's authors' recipe: AdamW 2e-4 with weight decay 1e-4, over mmdet's 1x schedule.
_base_ = [
    '../_base_/models/maskrcnn_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_1x.py',
    '../_base_/detection_runtime.py',
]

# mmpretrain comes after mmeffformer, since it needs mmcv's operators.
custom_imports = dict(imports=['mmeffformer', 'mmpretrain.models'])
model = dict(
    backbone=dict(
        type='mmpretrain.PoolFormer',
        arch='s12',
        # Of its seven parts, the stages; those between them are the embeddings.
        out_indices=(0, 2, 4, 6),
        frozen_stages=-1,  # its default, 0, freezes the first embedding
        init_cfg=dict(
            type='Pretrained',
            prefix='backbone',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/poolformer/'
            'poolformer-s12_3rdparty_32xb128_in1k_20220414-f8d83051.pth')),
    neck=dict(in_channels=[64, 128, 320, 512]))

param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
