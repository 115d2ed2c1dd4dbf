"""Outputs of a backbone, found by running it on the meta device."""
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from mmengine.config import ConfigDict
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...models.backbone import STRIDES
from ...utils.config import class_name
from ...utils.registry import MODELS
from .config import image_channels, log_change


class Level(NamedTuple):
    """An output of the old backbone, and the stage (from 0) of EfficientFormer for it."""
    channels: int
    stride: int
    stage: int


class MetaAllocation(TorchFunctionMode):
    """Puts what layers allocate (``torch.empty``) on the meta device, and nothing else.

    Some backbones compute their arguments with tensors and read the values back, which
    ``torch.device('meta')`` does not allow.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (),
                           kwargs: Optional[dict] = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs['device'] = 'meta'
        return func(*args, **kwargs)


def probe_levels(backbone: ConfigDict, scope: str) -> List[Level]:
    """Return the outputs of a backbone with their stages of EfficientFormer.

    Raises:
        ValueError: The backbone does not run, or EfficientFormer has no outputs like its own.
    """
    name = class_name(backbone)
    size = backbone.get('img_size', 512)
    size = size if isinstance(size, (tuple, list)) else (size, size)
    try:
        in_training, outputs = _run(backbone, scope, size)
    except Exception as error:  # a backbone of any library can fail in any way
        raise ValueError(f'the backbone {name} cannot be built and run to find its outputs: '
                         f'{type(error).__name__}: {error}') from error
    if len(in_training) != len(outputs):
        raise ValueError(f'the backbone {name} has {len(in_training)} outputs in training but '
                         f'{len(outputs)} otherwise, on which its heads depend')
    if not all(isinstance(out, Tensor) and out.dim() == 4 for out in outputs):
        raise ValueError(f'the backbone {name} returns more than feature maps (B, C, H, W), such '
                         'as a class token, which EfficientFormer lacks')
    channels = [out.shape[1] for out in outputs]
    strides = [round(size[0] / out.shape[2]) for out in outputs]
    stages = _match_stages(name, channels, strides, scope)
    return [Level(*level) for level in zip(channels, strides, stages)]


def _run(backbone: ConfigDict, scope: str, size: Sequence[int]) -> Tuple[List[Any], List[Any]]:
    """Return the outputs of a backbone in training and in evaluation mode."""
    without_weights = {key: value for key, value in backbone.items()
                       if key not in ('init_cfg', 'pretrained')}
    with MODELS.switch_scope_and_registry(scope) as registry, MetaAllocation():
        network = registry.build(without_weights).to('meta')
    image = torch.empty(2, image_channels(backbone), *size, device='meta')
    results = []
    for training in (True, False):
        network.train(training)  # returns None in some backbones
        with torch.no_grad():
            result = network(image)
        results.append([result] if isinstance(result, Tensor) else list(result))
    return results[0], results[1]


def _match_stages(name: str, channels: Sequence[int], strides: Sequence[int],
                  scope: str) -> List[int]:
    """Return the stage of EfficientFormer for each output of the old backbone."""
    old = f'the backbone {name} has outputs of strides {", ".join(map(str, strides))}'
    new = f'EfficientFormer has {", ".join(map(str, STRIDES))}'
    if list(strides) == sorted({*strides} & {*STRIDES}) and (scope == 'mmdet' or len(strides) > 1):
        return [STRIDES.index(stride) for stride in strides]
    if scope == 'mmdet':
        raise ValueError(f'{old}, on which the heads depend; {new}')
    if (min(strides) < STRIDES[0] or len(strides) > len(STRIDES)
            or list(strides) != sorted(strides) or list(channels) != sorted(channels)):
        raise ValueError(f'{old} and {", ".join(map(str, channels))} channels, which is not a '
                         f'pyramid from fine to coarse; {new}')
    stages = list(range(len(STRIDES) - len(strides), len(STRIDES)))
    if [STRIDES[i] for i in stages] != list(strides):
        log_change(f'{old}; they become {", ".join(str(STRIDES[i]) for i in stages)}')
    return stages
