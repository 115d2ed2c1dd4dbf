"""What a search leaves: the config of a network found, and weights to start its training from."""
from copy import deepcopy
from typing import Dict, List, Mapping, Sequence, Tuple

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from torch import Tensor, nn

from ..apis.swap import swap_backbone
from ..models.arch import ARCHS, Arch, get_arch
from ..utils.config import iter_dicts
from ..utils.files import atomic_write


def arch_dict(arch: Arch) -> Dict[str, list]:
    """Return an arch as a config writes it."""
    return dict(widths=list(arch.widths), depths=list(arch.depths),
                attention_blocks=list(arch.attention_blocks))


def network_config(cfg: Config, arch: Arch) -> Config:
    """Return the config of a supernet with a network of it in its place.

    Neck and heads get the network's channels (:func:`swap_backbone`); all else stays as it was
    for the supernet, the schedule too, but for what only a supernet needs.

    Args:
        cfg: Of a supernet inside a model of mmdet, mmseg or mmpretrain. It is not changed.
    """
    backbone = {key: value for key, value in cfg.model.backbone.items()
                if key not in ('arch', 'attention_stages', 'init_cfg')}
    backbone.update(type='mmeffformer.EfficientFormer', arch=arch_dict(arch))
    if cfg.get('default_scope') == 'mmpretrain':
        made, widths = deepcopy(cfg), get_arch(cfg.model.backbone.arch, ARCHS).widths
        for part in iter_dicts(made.model):
            if part.get('in_channels') == widths[-1]:
                part.in_channels = arch.widths[-1]
    else:
        made = swap_backbone(cfg, backbone['arch'])
        backbone['out_indices'] = tuple(made.model.backbone.out_indices)
        # That of the supernet was right.
        made.model.data_preprocessor = deepcopy(cfg.model.get('data_preprocessor'))
    made.model.backbone = backbone
    made.load_from, made.resume = None, False
    made.custom_hooks = [hook for hook in made.get('custom_hooks') or []
                         if not str(hook['type']).endswith('TemperatureHook')]
    made.pop('find_unused_parameters', None)
    options = made.get('optim_wrapper', {}).get('paramwise_cfg') or {}
    options.get('custom_keys', {}).pop('importance', None)
    return made


def network_state(model: nn.Module, wanted: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Return the weights of a model without what its cut backbone has made superfluous.

    Layers behind the backbone lose their weights for the channels that it has lost. Where their
    shapes do not tell which stage these are of, their new weights are ``wanted``'s, and that is
    logged.

    Args:
        model: With a network in its place (:class:`Widened`).
        wanted: State dict of the model to be: what it was initialised with.
    """
    widened = model.backbone
    cuts: Dict[Tuple[int, int], List[Tensor]] = {}  # by the channels before and after
    for kept, width in zip(widened.kept, widened.widths):
        cuts.setdefault((width, len(kept)), []).append(kept)
    made = {f'backbone.{key}': value for key, value in widened.backbone.state_dict().items()}
    old, anew = model.state_dict(), []
    for key, target in wanted.items():
        if key.startswith('backbone.'):
            continue
        value = _cut(old[key], target.shape, cuts) if key in old else None
        anew += [key] if value is None else []
        made[key] = target if value is None else value
    if anew:
        print_log(f'{len(anew)} tensors of the new model could not be cut out of the old one and '
                  f'start anew: {", ".join(anew)}', logger='current')
    return {key: value.detach().cpu().clone() for key, value in made.items()}


def _cut(value: Tensor, shape: Sequence[int], cuts: Mapping[Tuple[int, int], List[Tensor]]):
    """``value`` cut to ``shape``, None where it is not clear how."""
    if value.dim() != len(shape):
        return None
    for axis, sizes in enumerate(zip(value.shape, shape)):
        if sizes[0] != sizes[1]:
            choices = cuts.get(sizes, [])
            if len(choices) != 1:
                return None
            value = value.index_select(axis, choices[0].to(value.device))
    return value


def save_weights(state: Mapping[str, Tensor], path, **meta):
    """Save a checkpoint that ``load_from`` takes."""
    with atomic_write(path) as tmp_path:
        torch.save(dict(state_dict=dict(state), meta=meta), tmp_path)
