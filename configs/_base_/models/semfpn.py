# Semantic FPN, as mmseg's fpn_r50 for ADE20K, except for the backbone and its channels.
width = 256  # channels of the neck's outputs

model = dict(
    _scope_='mmseg',  # for mmengine.hub.get_model, which builds in this package's scope
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        # Images smaller than a training crop are padded to it.
        size=(512, 512),
        pad_val=0,
        seg_pad_val=255),
    neck=dict(type='FPN', out_channels=width, num_outs=4),
    decode_head=dict(
        type='FPNHead',
        in_channels=[width] * 4,
        in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32],
        channels=128,
        dropout_ratio=0.1,
        num_classes=150,
        # Where there is one process, mmengine makes it BN.
        norm_cfg=dict(type='SyncBN'),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))

del width
