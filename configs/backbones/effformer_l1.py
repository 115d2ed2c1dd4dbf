# The backbone alone, with its published ImageNet weights:
# mmengine.hub.get_model('mmeffformer::backbones/effformer_l1.py', pretrained=True)
model = dict(type='mmeffformer.EfficientFormer', arch='l1', out_norm_cfg=None)
