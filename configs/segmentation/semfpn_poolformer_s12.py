# python tools/train.py configs/segmentation/semfpn_poolformer_s12.py
# tools/dist_train.sh configs/segmentation/semfpn_poolformer_s12.py 8
# PoolFormer's authors' recipe, which is EfficientFormer's too.
_base_ = [
    '../_base_/models/semfpn.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_40k.py',
    '../_base_/segmentation_runtime.py',
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
