"""Checks that a checkpoint is of a given model, before anything is loaded from it."""
from typing import Any, Dict, Mapping, Tuple

import torch
from torch import Tensor, nn

from ..models.attention import AttentionBias
from ..utils.modules import unwrap_model
from .safe_loading import Source, check_finite, read_model


def check_compatible(model: nn.Module, path: Source) -> None:
    """Raise unless a detector's or segmentor's checkpoint holds all weights of ``model``.

    mmengine loads what it can and logs the rest, so that after a wrong file some weights are
    still random. Bias tables of another grid are accepted.

    Raises:
        FileNotFoundError, ConnectionError: The checkpoint is not there.
        ValueError: Tensors are missing, of another shape or type, or weights are not finite;
            they were trained in another ``bias_mode``; or the file cannot be read (see
            :func:`read_model`).
    """
    _read_compatible(model, path)


def load_compatible(model: nn.Module, path: Source) -> Dict[str, Any]:
    """Load a checkpoint into ``model`` and return its ``meta``.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: As :func:`check_compatible`; the model
            is then unchanged.
    """
    state, meta = _read_compatible(model, path)
    unwrap_model(model).load_state_dict(state, strict=False)  # keys are checked already
    return meta


def _read_compatible(model: nn.Module, path: Source) -> Tuple[Dict[str, Tensor], Dict[str, Any]]:
    """Return the weights and the ``meta`` of a checkpoint of ``model``."""
    model = unwrap_model(model)
    checkpoint = read_model(path)
    state = checkpoint.get('state_dict', checkpoint)
    if not isinstance(state, Mapping):
        raise ValueError(f'checkpoint {path} has a {type(state).__name__} as its state_dict, '
                         'expected a dict of tensors')
    state = {key.removeprefix('module.'): value for key, value in state.items()
             if isinstance(key, str)}
    check_state(state, model, path)
    meta = checkpoint.get('meta')
    meta = meta if isinstance(meta, dict) else {}
    trained = meta.get('bias_mode')
    others = {module.mode for module in model.modules() if isinstance(module, AttentionBias)
              and module.mode != trained}
    if trained and others:
        raise ValueError(f'checkpoint {path} was trained with bias_mode={trained!r}, the config '
                         f'has {others.pop()!r}, which would give other results. Add '
                         f'--cfg-options model.backbone.bias_mode={trained}')
    return state, meta


def check_state(state: Mapping[str, Any], model: nn.Module, path: Source) -> None:
    """Raise a ValueError unless ``state``, of the file ``path``, has all tensors of ``model``."""
    targets = {key: target for key, target in model.state_dict().items()
               if key in state or not key.endswith('.num_batches_tracked')}
    missing = [key for key in targets if key not in state]
    misshapen, mistyped = [], []
    for key, target in targets.items():
        value = state.get(key)
        if key not in state:
            continue
        if not isinstance(value, Tensor):
            mistyped.append(f'{key}: {type(value).__name__} instead of a tensor')
        elif _comparable_shape(key, value) != _comparable_shape(key, target):
            misshapen.append(f'{key}: {tuple(value.shape)} instead of {tuple(target.shape)}')
        elif _kind(value) != _kind(target):
            mistyped.append(f'{key}: {value.dtype} instead of {target.dtype}')
    problems = [f'{len(keys)} {problem}, first {keys[0]}' for keys, problem in (
        (missing, 'are missing'), (misshapen, 'have another shape'),
        (mistyped, 'are of another type')) if keys]
    if problems:
        raise ValueError(f'checkpoint {path} is not of this config: of {len(targets)} tensors '
                         f'{"; ".join(problems)}. Expected a file that tools/train.py saved for '
                         'it (weights to start from belong in model.backbone.init_cfg)')
    check_finite({key: state[key] for key in targets}, path, model)


def _comparable_shape(key: str, value: Tensor) -> Tuple[int, ...]:
    """Return the shape, of a bias table without its grid, which is resampled."""
    return (*value.shape[:1], value.dim()) if key.endswith('bias.table') else tuple(value.shape)


def _kind(value: Tensor) -> str:
    """Return what converts into each other: float16 into float32, but not into integers."""
    if value.dtype == torch.bool:
        return 'bool'
    return 'complex' if value.is_complex() else ('real' if value.is_floating_point() else 'int')
