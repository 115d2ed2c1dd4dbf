# The backbone alone, with its published ImageNet weights:
# mmengine.hub.get_model('mmeffformer::backbones/effformerv2_s2.py', pretrained=True)
model = dict(type='mmeffformer.EfficientFormerV2', arch='s2', out_norm_cfg=None)
