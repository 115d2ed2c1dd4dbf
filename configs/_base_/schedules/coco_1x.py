# 12 epochs of AdamW, batch 8 GPUs x 2 images (paper, section 4.2; authors' code).
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=2e-4, weight_decay=1e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]

# `--auto-scale-lr` scales the learning rate with the batch: 16 = 8 GPUs x 2 images.
auto_scale_lr = dict(enable=False, base_batch_size=16)
