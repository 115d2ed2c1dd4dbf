# python tools/train.py configs/detection/maskrcnn_poolformer_s36.py
# tools/dist_train.sh configs/detection/maskrcnn_poolformer_s36.py 8
# PoolFormer's authors' recipe, as in maskrcnn_poolformer_s12.py.
_base_ = 'maskrcnn_poolformer_s12.py'

model = dict(
    backbone=dict(
        arch='s36',
        init_cfg=dict(
            checkpoint='https://download.openmmlab.com/mmclassification/v0/poolformer/'
            'poolformer-s36_3rdparty_32xb128_in1k_20220414-d78ff3e8.pth')))
