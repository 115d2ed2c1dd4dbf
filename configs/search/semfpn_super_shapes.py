# A small supernet on drawn shapes, to be searched by tools/slim.py: minutes on two CPU cores.
#   python tools/make_shapes.py data/shapes_ade20k --layout ade20k --train 1440 --val 80 \
#       --size 192 192
#   python tools/train.py configs/search/semfpn_super_shapes.py
_base_ = '../demo/semfpn_effformer_l1_shapes.py'

widths = (48, 96, 160, 256)
model = dict(
    backbone=dict(
        type='mmeffformer.SuperEfficientFormer',
        arch=dict(_delete_=True, widths=widths, depths=(2, 2, 5, 3))),
    neck=dict(in_channels=list(widths)))

# Importances of paths learn faster than weights, and without weight decay.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(importance=dict(lr_mult=5., decay_mult=0.))))
custom_hooks = [dict(type='mmeffformer.TemperatureHook', start=1., end=0.1)]
# At low temperatures some branches are not computed for every batch.
find_unused_parameters = True

steps = 500
train_cfg = dict(max_iters=steps, val_interval=250)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=30, end=steps, T_max=steps - 30,
         eta_min=1e-6),
]
default_hooks = dict(checkpoint=dict(interval=250))
