# python tools/train.py configs/camvid/semfpn_poolformer_s12.py
_base_ = 'semfpn_effformer_l1.py'

custom_imports = dict(imports=['mmeffformer', 'mmpretrain.models'])
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.PoolFormer',
        # S12 with the layer scale of the other networks.
        arch=dict(
            layers=[2, 2, 6, 2], embed_dims=[64, 128, 320, 512], mlp_ratios=[4, 4, 4, 4],
            layer_scale_init_value=0.1),
        out_indices=(0, 2, 4, 6),
        frozen_stages=-1),
    neck=dict(in_channels=[64, 128, 320, 512]))
