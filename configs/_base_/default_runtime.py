# What detection_runtime.py and segmentation_runtime.py share.
# Registers the backbones, and gives mmcv the operators it lacks.
custom_imports = dict(imports=['mmeffformer'])
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', max_keep_ckpts=3),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    # Neither changes what is computed; see docs/results/performance.md.
    speed=dict(type='mmeffformer.SpeedHook', channels_last=False, compile=False))
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))
log_processor = dict(type='LogProcessor', window_size=50)
log_level = 'INFO'
load_from = None
resume = False
