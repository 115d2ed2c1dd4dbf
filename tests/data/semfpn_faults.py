# semfpn_tiny.py with everything in it that draws at random or keeps a state of its own.
_base_ = 'semfpn_tiny.py'

model = dict(backbone=dict(drop_path_rate=0.2, arch=dict(depths=(1, 1, 1, 1))))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomResize', scale=(96, 64), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(64, 64), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(num_workers=1, dataset=dict(pipeline=train_pipeline))
train_cfg = dict(max_iters=12, val_interval=6)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=4),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=4, end=12),
]
default_hooks = dict(checkpoint=dict(interval=2, max_keep_ckpts=2, save_best='mIoU'))
custom_hooks = [dict(type='EMAHook')]
