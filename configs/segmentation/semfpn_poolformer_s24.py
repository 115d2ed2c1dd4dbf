# python tools/train.py configs/segmentation/semfpn_poolformer_s24.py
# tools/dist_train.sh configs/segmentation/semfpn_poolformer_s24.py 8
# PoolFormer's authors' recipe, as in semfpn_poolformer_s12.py.
_base_ = 'semfpn_poolformer_s12.py'

model = dict(
    backbone=dict(
        arch='s24',
        init_cfg=dict(
            checkpoint='https://download.openmmlab.com/mmclassification/v0/poolformer/'
            'poolformer-s24_3rdparty_32xb128_in1k_20220414-d7055904.pth')))
