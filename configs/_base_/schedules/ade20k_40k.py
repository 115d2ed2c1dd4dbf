# 40,000 iterations of AdamW, batch 8 GPUs x 4 images (authors' code).
train_cfg = dict(type='IterBasedTrainLoop', max_iters=40000, val_interval=4000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=2e-4, weight_decay=1e-4))
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=0., by_epoch=False, begin=0, end=40000),
]

# `--auto-scale-lr` scales the learning rate with the batch: 32 = 8 GPUs x 4 images.
auto_scale_lr = dict(enable=False, base_batch_size=32)
