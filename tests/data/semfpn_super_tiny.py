# A tiny supernet in semfpn_tiny.py, to be searched in seconds.
_base_ = 'semfpn_tiny.py'

widths = (16, 32, 48, 48)
model = dict(
    backbone=dict(
        type='mmeffformer.SuperEfficientFormer', layer_scale_init_value=.1,
        arch=dict(_delete_=True, widths=widths, depths=(1, 1, 2, 2))),
    neck=dict(in_channels=list(widths)))
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(importance=dict(lr_mult=5., decay_mult=0.))))
custom_hooks = [dict(type='mmeffformer.TemperatureHook', start=1., end=0.1)]
find_unused_parameters = True
