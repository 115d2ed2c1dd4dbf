# The backbone alone, with its published ImageNet weights:
# mmengine.hub.get_model('mmeffformer::backbones/effformerv2_l.py', pretrained=True)
model = dict(type='mmeffformer.EfficientFormerV2', arch='l', out_norm_cfg=None)
