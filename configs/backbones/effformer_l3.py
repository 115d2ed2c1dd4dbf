# The backbone alone, with its published ImageNet weights:
# mmengine.hub.get_model('mmeffformer::backbones/effformer_l3.py', pretrained=True)
model = dict(type='mmeffformer.EfficientFormer', arch='l3', out_norm_cfg=None)
