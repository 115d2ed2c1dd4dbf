# What faster_rcnn.py and semfpn.py share, in mmengine's new style.
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.hooks import (
    CheckpointHook,
    DistSamplerSeedHook,
    IterTimerHook,
    LoggerHook,
    ParamSchedulerHook,
)
from mmengine.optim import OptimWrapper
from mmengine.runner import IterBasedTrainLoop, TestLoop, ValLoop
from mmengine.visualization import LocalVisBackend
from torch.optim import AdamW

from mmeffformer import EfficientFormer

default_scope = None  # as in mmdet's configs of this style
width = 16  # channels of neck and heads
channels = [16, 16, 24, 32]
backbone = dict(
    type=EfficientFormer,
    arch=dict(widths=channels, depths=(1, 1, 1, 2), attention_blocks=(0, 0, 0, 1)))
norm = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)

train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type=InfiniteSampler, shuffle=True))
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type=DefaultSampler, shuffle=False))
train_cfg = dict(type=IterBasedTrainLoop, max_iters=2, val_interval=2)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=AdamW, lr=1e-3))
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, interval=1, log_metric_by_epoch=False),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=2),
    sampler_seed=dict(type=DistSamplerSeedHook))
vis_backends = [dict(type=LocalVisBackend)]
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
