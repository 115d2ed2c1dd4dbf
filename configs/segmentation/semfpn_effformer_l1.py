# python tools/train.py configs/segmentation/semfpn_effformer_l1.py
# tools/dist_train.sh configs/segmentation/semfpn_effformer_l1.py 8
_base_ = [
    '../_base_/models/semfpn.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_40k.py',
    '../_base_/segmentation_runtime.py',
]

model = dict(
    backbone=dict(
        type='mmeffformer.EfficientFormer',
        arch='l1',
        # Tables for 16 x 16 tokens: a crop of 512 px at stride 32.
        bias_grid=16,
        norm_cfg=dict(type='SyncBN'),
        out_norm_cfg=dict(type='GN', num_groups=1),
        init_cfg=dict(
            type='Pretrained',
            # The network of 300 epochs, as in the paper; the L1 of mmpretrain and timm has 1000.
            checkpoint='hf-hub:snap-research/efficientformer-l1-300')),
    neck=dict(in_channels=[48, 96, 224, 448]))
