"""Whether a checkpoint is one of the model at hand, asked before it is half loaded."""
from typing import Mapping

import torch
from mmengine.model import is_model_wrapper
from mmengine.runner import CheckpointLoader
from torch import nn

from ..models.attention import AttentionBias
from .read import read_checkpoint


def read_model(path: str) -> Mapping:
    """Return a detector's or segmentor's checkpoint, read without running code from it.

    Before torch 2.5, reading so cannot pass what mmengine saves; there mmengine reads it.

    Raises:
        ValueError: The file cannot be read safely (see :func:`read_checkpoint`).
    """
    if hasattr(torch.serialization, 'safe_globals') and '://' not in str(path):
        return read_checkpoint(path)
    return CheckpointLoader.load_checkpoint(path, 'cpu')


def check_fit(model: nn.Module, path: str) -> None:
    """Raise unless a detector's or segmentor's checkpoint holds all weights of ``model``.

    mmengine loads what it can and logs the rest, so that with a wrong file it goes
    on with weights that are partly random. Bias tables of another grid do fit.

    Raises:
        ValueError: Tensors are missing or of another shape, the weights were trained
            in another ``bias_mode``, or the file cannot be read safely (see
            :func:`read_model`).
    """
    _read_fitting(model, path)


def load_fitting(model: nn.Module, path: str) -> None:
    """Load a checkpoint that :func:`check_fit` does not refuse.

    Raises:
        ValueError: As there.
    """
    model.load_state_dict(_read_fitting(model, path), strict=False)  # keys checked already


def _read_fitting(model: nn.Module, path: str) -> Mapping:
    if is_model_wrapper(model):  # where there are several processes
        model = model.module
    checkpoint = read_model(path)
    state = checkpoint.get('state_dict', checkpoint)
    check_state(state, model.state_dict(), path)
    trained = (checkpoint.get('meta') or {}).get('bias_mode')
    modes = {module.mode for module in model.modules() if isinstance(module, AttentionBias)}
    if trained and modes and modes != {trained}:
        raise ValueError(f'checkpoint {path} was trained with bias_mode={trained!r}, the config '
                         f'has {modes.pop()!r}, which would give other results. Add --cfg-options '
                         f'model.backbone.bias_mode={trained}')
    return {key.removeprefix('module.'): value for key, value in state.items()}


def check_state(state: Mapping, model_state: Mapping, path: str) -> None:
    """Raise a ValueError unless ``state``, of the file ``path``, has all of ``model_state``."""
    state = {key.removeprefix('module.'): value for key, value in state.items()}
    wanted = {key: value for key, value in model_state.items()
              if not key.endswith('.num_batches_tracked')}
    missing = [key for key in wanted if key not in state]

    def shape(key, value):
        return (value.dim(), len(value)) if key.endswith('bias.table') else value.shape

    misshapen = [key for key in wanted if key in state
                 and shape(key, state[key]) != shape(key, wanted[key])]
    if missing or misshapen:
        said = [f'{len(missing)} are missing, first {missing[0]}'] if missing else []
        if misshapen:
            key = misshapen[0]
            said.append(f'{len(misshapen)} have another shape, first {key}: '
                        f'{tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}')
        raise ValueError(f'checkpoint {path} is not of this config: of {len(wanted)} tensors '
                         f'{"; ".join(said)}. Expected a file that tools/train.py saved for it '
                         '(weights to start from belong into model.backbone.init_cfg)')
