# The network of ../segmentation/semfpn_effformer_l1.py, from scratch, on drawn shapes: minutes
# on two CPU cores. Everything smaller than there is smaller to save time.
#   python tools/make_shapes.py data/shapes_ade20k --layout ade20k --train 1440 --val 80 \
#       --size 192 192
#   python tools/train.py configs/demo/semfpn_effformer_l1_shapes.py
_base_ = '../segmentation/semfpn_effformer_l1.py'

width = 64  # channels of the neck and the head
crop_size = (128, 128)  # of 192 x 192 px
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(bias_grid=4, layer_scale_init_value=0.1, init_cfg=None),
    neck=dict(out_channels=width, norm_cfg=dict(type='GN', num_groups=8)),
    decode_head=dict(in_channels=[width] * 4, channels=width, num_classes=7))

data_root = 'data/shapes_ade20k'
# ADE20KDataset takes its own 150 classes only.
dataset_type = 'BaseSegDataset'
metainfo = dict(
    classes=('background', 'circle', 'rectangle', 'triangle', 'star', 'ring', 'cross'),
    palette=[(90, 90, 90), (230, 60, 60), (60, 120, 230), (240, 180, 30), (150, 70, 210),
             (40, 170, 90), (20, 190, 200)])
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    # As in the recipe, not too much of one class: more to learn from than whole images.
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        reduce_zero_label=True,
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        reduce_zero_label=True,
        pipeline=test_pipeline))
test_dataloader = val_dataloader

steps = 700
train_cfg = dict(max_iters=steps, val_interval=175)
optim_wrapper = dict(optimizer=dict(lr=2e-3, weight_decay=0.05))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=30, end=steps, T_max=steps - 30,
         eta_min=1e-6),
]
auto_scale_lr = dict(base_batch_size=8)
default_hooks = dict(
    speed=dict(channels_last=True),
    logger=dict(interval=10),
    checkpoint=dict(interval=175, max_keep_ckpts=1, save_best=None))
visualizer = dict(alpha=0.7)
randomness = dict(seed=0)
