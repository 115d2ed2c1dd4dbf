# The backbone alone, with its published ImageNet weights:
# mmengine.hub.get_model('mmeffformer::backbones/effformerv2_s1.py', pretrained=True)
model = dict(type='mmeffformer.EfficientFormerV2', arch='s1', out_norm_cfg=None)
