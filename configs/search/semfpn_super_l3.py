# The supernet around L3 in Semantic FPN on ADE20K, to be searched by tools/slim.py.
# python tools/train.py configs/search/semfpn_super_l3.py
# tools/dist_train.sh configs/search/semfpn_super_l3.py 8
_base_ = '../segmentation/semfpn_effformer_l3.py'

model = dict(backbone=dict(type='mmeffformer.SuperEfficientFormer', with_cp=True))

# Importances of paths learn faster than weights, and without weight decay.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(importance=dict(lr_mult=5., decay_mult=0.))))
custom_hooks = [dict(type='mmeffformer.TemperatureHook', start=1., end=0.1)]
# At low temperatures some branches are not computed for every batch.
find_unused_parameters = True
