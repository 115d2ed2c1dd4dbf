# python tools/train.py configs/segmentation/semfpn_resnet50_mmseg160k.py
# tools/dist_train.sh configs/segmentation/semfpn_resnet50_mmseg160k.py 4
# mmseg's recipe, fpn_r50_4xb4-160k_ade20k-512x512: twice the images of the paper's 40k x 32.
_base_ = 'semfpn_resnet50.py'

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='SGD', lr=0.01, momentum=0.9, weight_decay=5e-4))
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=1e-4, by_epoch=False, begin=0, end=160000),
]
train_cfg = dict(max_iters=160000, val_interval=16000)
default_hooks = dict(checkpoint=dict(interval=16000))
auto_scale_lr = dict(base_batch_size=16)  # 4 GPUs x 4 images
