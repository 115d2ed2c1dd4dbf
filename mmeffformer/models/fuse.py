"""Fuse norms and layer scales of a whole model."""
from collections import Counter
from functools import partial
from typing import Any, Callable, Dict

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def fuse(model: nn.Module) -> nn.Module:
    """Fuse a detector, a segmentor or a backbone in place, and return it in eval mode.

    Every backbone with a ``switch_to_deploy`` method is fused by it, and each BatchNorm of an
    mmcv ``ConvModule``, as in necks and heads, is folded into its convolution. Results stay
    the same to rounding. Training a fused backbone raises. Fused weights load into a fused
    model. A segmentor no longer resizes logits to the size that they have. A second call changes
    nothing.
    """
    model.eval()
    keep_sizes(model)
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


def keep_sizes(model: nn.Module) -> None:
    """Let a segmentor of mmseg return logits as they are where the image was not resized.

    Its resizing to the size they have copies them, which takes longer than the choice of classes.
    """
    original = getattr(model, 'postprocess_result', None)
    if original and not isinstance(original, partial) and 'resize' in _scope(model):
        vars(model)['postprocess_result'] = partial(_postprocess, model, original)


def _scope(model: Any) -> Dict[str, Any]:
    """Return the names in mmseg's module of the method."""
    return type(model).postprocess_result.__globals__


def _postprocess(model: nn.Module, original: Callable, *args: Any, **kwargs: Any) -> Any:
    scope = _scope(model)
    resize = scope['resize']

    def resize_unless_same(logits: Tensor, size: Any, *args: Any, **kwargs: Any) -> Tensor:
        same = tuple(size) == tuple(logits.shape[2:])
        return logits if same else resize(logits, size, *args, **kwargs)

    scope['resize'] = resize_unless_same
    try:
        return original(*args, **kwargs)
    finally:
        scope['resize'] = resize
