# 300 epochs of AdamW, batch 8 GPUs x 32 images, the last 20 epochs without mosaics and mix-up, as
# mmdet's rtmdet-ins_tiny.
_base_ = '../datasets/coco_instance_640.py'

train_cfg = dict(
    type='EpochBasedTrainLoop', max_epochs=300, val_interval=10, dynamic_intervals=[(280, 1)])
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0, bypass_duplicate=True))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-5, by_epoch=False, begin=0, end=1000),
    dict(
        type='CosineAnnealingLR', eta_min=2e-4, begin=150, end=300, T_max=150, by_epoch=True,
        convert_to_iter_based=True),
]
custom_hooks = [
    dict(
        type='EMAHook', ema_type='ExpMomentumEMA', momentum=2e-4, update_buffers=True,
        priority=49),
    dict(
        type='PipelineSwitchHook', switch_epoch=280,
        switch_pipeline={{_base_.train_pipeline_stage2}}),
]

# `--auto-scale-lr` scales the learning rate with the batch: 256 = 8 GPUs x 32 images.
auto_scale_lr = dict(enable=False, base_batch_size=256)
