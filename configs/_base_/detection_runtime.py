_base_ = 'default_runtime.py'

default_scope = 'mmdet'
default_hooks = dict(
    checkpoint=dict(interval=1, save_best='auto'),
    visualization=dict(type='DetVisualizationHook'))
visualizer = dict(
    type='mmeffformer.DetVisualizer', vis_backends=[dict(type='LocalVisBackend')],
    name='visualizer')
log_processor = dict(by_epoch=True)
