"""Fuse norms and layer scales of a whole model."""
from collections import Counter

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def fuse(model: nn.Module) -> nn.Module:
    """Fuse a detector, a segmentor or a backbone in place, and return it in eval mode.

    Every backbone with a ``switch_to_deploy`` method is fused by it, and each BatchNorm of an
    mmcv ``ConvModule``, as in necks and heads, is folded into its convolution. Results stay
    the same to rounding. Training a fused backbone raises. Fused weights load into a fused
    model. A second call changes nothing.
    """
    model.eval()
    for module in [*model.modules()]:
        if callable(switch := getattr(module, 'switch_to_deploy', None)):
            switch()
    try:
        from mmcv.cnn import ConvModule, fuse_conv_bn
    except ImportError:  # a backbone alone
        return model
    # Heads may share a convolution among levels with a norm each, as RTMDet's: it stays.
    uses = Counter(module for _, module in model.named_modules(remove_duplicate=False)
                   if isinstance(module, nn.Conv2d))
    for module in model.modules():
        if (isinstance(module, ConvModule) and module.with_norm
                and isinstance(module.norm, _BatchNorm) and type(module.conv) is nn.Conv2d
                and uses[module.conv] == 1
                and module.order.index('norm') == module.order.index('conv') + 1):
            fuse_conv_bn(module)
    return model
