"""Whether a checkpoint is one of the model at hand, asked before it is half loaded."""
from typing import Mapping

import torch
from torch import Tensor, nn

from ..models.attention import AttentionBias
from ..utils.modules import unwrap_model
from .safe_loading import read_model


def check_compatible(model: nn.Module, path: str) -> None:
    """Raise unless a detector's or segmentor's checkpoint holds all weights of ``model``.

    mmengine loads what it can and logs the rest, so that with a wrong file it goes
    on with weights that are partly random. Bias tables of another grid do fit.

    Raises:
        FileNotFoundError, ConnectionError: The checkpoint is not there.
        ValueError: Tensors are missing, of another shape or type, or not finite, the
            weights were trained in another ``bias_mode``, or the file cannot be read
            (see :func:`read_model`).
    """
    _read_compatible(model, path)


def load_compatible(model: nn.Module, path: str) -> dict:
    """Load a checkpoint that :func:`check_compatible` does not refuse, and return its ``meta``.

    Raises:
        ValueError: As there.
    """
    state, meta = _read_compatible(model, path)
    unwrap_model(model).load_state_dict(state, strict=False)  # keys checked already
    return meta


def dataset_meta(meta: Mapping) -> dict:
    """Return ``classes`` and what else of the data set a checkpoint's ``meta`` tells, if any."""
    said = meta.get('dataset_meta') or {'classes': meta.get('CLASSES')}  # mmdet 2.x has the latter
    if not isinstance(said, dict):
        return {}
    said = {str(key).lower(): value for key, value in said.items()}
    names = said.get('classes')
    good = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return said if good else {}


def _read_compatible(model: nn.Module, path: str):
    """Return the weights and the ``meta`` of a checkpoint."""
    model = unwrap_model(model)
    checkpoint = read_model(path)
    state = checkpoint.get('state_dict', checkpoint)
    if not isinstance(state, Mapping):
        raise ValueError(f'checkpoint {path} has a {type(state).__name__} as its state_dict, '
                         'expected a dict of tensors')
    state = {key.removeprefix('module.'): value for key, value in state.items()
             if isinstance(key, str)}
    check_state(state, model.state_dict(), path)
    meta = checkpoint.get('meta')
    meta = meta if isinstance(meta, dict) else {}
    trained = meta.get('bias_mode')
    modes = {module.mode for module in model.modules() if isinstance(module, AttentionBias)}
    if trained and any(mode != trained for mode in modes):
        raise ValueError(f'checkpoint {path} was trained with bias_mode={trained!r}, the config '
                         f'has {modes.pop()!r}, which would give other results. Add --cfg-options '
                         f'model.backbone.bias_mode={trained}')
    return state, meta


def check_state(state: Mapping, model_state: Mapping, path: str) -> None:
    """Raise a ValueError unless ``state``, of the file ``path``, has all of ``model_state``.

    Names say little: that all tensors are there, of the model's shapes and kind of numbers,
    and finite, is what tells whose they are.
    """
    state = {key.removeprefix('module.'): value for key, value in state.items()}
    wanted = {key: value for key, value in model_state.items()
              if key in state or not key.endswith('.num_batches_tracked')}
    missing = [key for key in wanted if key not in state]

    def shape(key, value):
        return value.shape[:1] + (value.dim(),) if key.endswith('bias.table') else value.shape

    misshapen, of_kind, infinite = [], [], []
    for key, target in wanted.items():
        value = state.get(key)
        if key not in state:
            continue
        if not isinstance(value, Tensor):
            of_kind.append(f'{key}: {type(value).__name__} instead of a tensor')
        elif shape(key, value) != shape(key, target):
            misshapen.append(f'{key}: {tuple(value.shape)} instead of {tuple(target.shape)}')
        elif _kind(value) != _kind(target):
            of_kind.append(f'{key}: {value.dtype} instead of {target.dtype}')
        elif not value.isfinite().all():
            infinite.append(key)
    said = [f'{len(bad)} {what}, first {bad[0]}' for what, bad in (
        ('are missing', missing), ('have another shape', misshapen),
        ('are of another type', of_kind)) if bad]
    if said:
        raise ValueError(f'checkpoint {path} is not of this config: of {len(wanted)} tensors '
                         f'{"; ".join(said)}. Expected a file that tools/train.py saved for it '
                         '(weights to start from belong into model.backbone.init_cfg)')
    if infinite:
        raise ValueError(f'checkpoint {path} has {len(infinite)} tensors with values that are NaN '
                         f'or infinite, first {infinite[0]}')


def _kind(value: Tensor) -> str:
    """Numbers of one kind convert into each other: float16 is as good as float32."""
    if value.dtype == torch.bool:
        return 'bool'
    return 'complex' if value.is_complex() else ('real' if value.is_floating_point() else 'int')
