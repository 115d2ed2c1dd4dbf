# Semantic FPN from scratch on CamVid, a short schedule for CPUs: docs/results/photographs.md.
#   python tools/train.py configs/camvid/semfpn_effformer_l1.py
_base_ = [
    '../_base_/models/semfpn.py',
    '../_base_/datasets/camvid.py',
    '../_base_/segmentation_runtime.py',
]

void = {{_base_.void}}
width = 64  # channels of the neck and the head
model = dict(
    data_preprocessor=dict(size={{_base_.crop_size}}, seg_pad_val=void),
    backbone=dict(
        type='mmeffformer.EfficientFormer',
        arch='l1',
        bias_grid=(5, 7),
        norm_cfg=dict(type='SyncBN'),
        layer_scale_init_value=0.1,
        out_norm_cfg=dict(type='GN', num_groups=1)),
    neck=dict(in_channels=[48, 96, 224, 448], out_channels=width),
    decode_head=dict(
        in_channels=[width] * 4, channels=width, num_classes=11, ignore_index=void))

steps = 200
train_cfg = dict(type='IterBasedTrainLoop', max_iters=steps, val_interval=steps)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=20, end=steps, T_max=steps - 20,
         eta_min=1e-6),
]
auto_scale_lr = dict(base_batch_size=4)
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=steps, max_keep_ckpts=1, save_best=None))
