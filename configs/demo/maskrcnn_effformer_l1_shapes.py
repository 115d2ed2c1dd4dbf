# The network of ../detection/maskrcnn_effformer_l1.py, from scratch, on drawn shapes: minutes
# on two CPU cores. Everything smaller than there is smaller to save time.
#   python tools/make_shapes.py data/shapes --train 1440 --val 80 --size 192 192
#   python tools/train.py configs/demo/maskrcnn_effformer_l1_shapes.py
_base_ = '../detection/maskrcnn_effformer_l1.py'

width = 64  # channels of the neck and the heads
# Norms and convolutions in the heads, and boxes learnt for all classes at once, let a network
# without pretrained weights learn in hundreds of steps.
norm_cfg = dict(type='GN', num_groups=8)
model = dict(
    backbone=dict(bias_grid=6, layer_scale_init_value=0.1, init_cfg=None),
    neck=dict(out_channels=width, norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=width, feat_channels=width, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width, finest_scale=28),
        bbox_head=dict(
            type='ConvFCBBoxHead', num_shared_convs=2, num_shared_fcs=1, in_channels=width,
            conv_out_channels=width, fc_out_channels=256, num_classes=6, norm_cfg=norm_cfg,
            reg_class_agnostic=True, loss_bbox=dict(loss_weight=2.0)),
        mask_roi_extractor=dict(out_channels=width, finest_scale=28),
        mask_head=dict(
            num_convs=2, in_channels=width, conv_out_channels=width, num_classes=6,
            norm_cfg=norm_cfg)),
    train_cfg=dict(
        rpn=dict(assigner=dict(pos_iou_thr=0.5), sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=64, pos_fraction=0.5))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)))

data_root = 'data/shapes/'
metainfo = dict(
    classes=('circle', 'rectangle', 'triangle', 'star', 'ring', 'cross'),
    palette=[(230, 60, 60), (60, 120, 230), (240, 180, 30), (150, 70, 210), (40, 170, 90),
             (20, 190, 200)])
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(192, 192), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(192, 192), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    sampler=dict(type='InfiniteSampler'),
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=1,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val/'),
        pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator

steps = 360
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=steps, val_interval=120)
optim_wrapper = dict(
    optimizer=dict(lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=35.))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=30, end=steps, T_max=steps - 30,
         eta_min=1e-6),
]
auto_scale_lr = dict(base_batch_size=4)
default_hooks = dict(
    speed=dict(channels_last=True),
    logger=dict(interval=10, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=120, max_keep_ckpts=1, save_best=None))
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
