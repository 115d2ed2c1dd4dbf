# The supernet around L3 as an ImageNet-1K classifier, as in the paper, to be searched by
# tools/slim.py. ImageNet is in data/imagenet (train/, val/, one folder per class).
# python tools/train.py configs/search/imagenet_super_l3.py
# tools/dist_train.sh configs/search/imagenet_super_l3.py 8
_base_ = '../_base_/default_runtime.py'
default_scope = 'mmpretrain'

model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(
        num_classes=1000, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375],
        to_rgb=True),
    backbone=dict(
        type='mmeffformer.SuperEfficientFormer', arch='l3', out_indices=(3,),
        norm_cfg=dict(type='SyncBN')),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead', num_classes=1000, in_channels=512,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')))

data_root = 'data/imagenet'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=224, backend='pillow', interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=256, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='ImageNet', data_root=data_root, split='train', pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='ImageNet', data_root=data_root, split='val', pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator

# 300 epochs of AdamW, batch 8 GPUs x 128 images (paper, section 5).
epochs = 300
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=5,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=5, end=epochs, T_max=epochs - 5,
         eta_min=1e-5),
]
auto_scale_lr = dict(enable=False, base_batch_size=1024)

# Importances of paths learn faster than weights, and without weight decay.
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.025),
    paramwise_cfg=dict(custom_keys=dict(importance=dict(lr_mult=5., decay_mult=0.))))
custom_hooks = [dict(type='mmeffformer.TemperatureHook', start=1., end=0.1)]
# At low temperatures some branches are not computed for every batch.
find_unused_parameters = True
