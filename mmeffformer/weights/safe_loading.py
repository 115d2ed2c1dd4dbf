"""mmengine's ways of loading checkpoints, made to go through :func:`read_checkpoint`.

mmengine reads with plain ``torch.load``, and its fork falls back to it, so that a file can run
code. With :func:`install` all that it and the libraries on top of it load is read as data:
``Runner.load_checkpoint`` and ``resume``, ``load_checkpoint``, ``init_detector``, ``init_model``
and ``init_cfg=dict(type='Pretrained')`` of any module.
"""
import os
from typing import Any, Mapping, Union

from mmengine.fileio import get_local_path
from mmengine.runner import checkpoint as mmengine
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor

from .fetch import locate
from .load import WRAPPERS
from .read import read_checkpoint

BUCKETS = (r'(\S+\:)?s3://', r'(\S+\:)?petrel://')
NAMED = ('torchvision://', 'modelzoo://', 'open-mmlab://', 'openmmlab://', 'mmcls://')
OTHERS = ('', 'http://', 'https://', 'pavi://')  # '' stands for paths, and for what no other is


def install():
    """Make mmengine load checkpoints safely, in this process. A second time does nothing."""
    CheckpointLoader.register_scheme(BUCKETS + NAMED + OTHERS, load_from_anywhere, force=True)


def load_from_anywhere(filename: Union[str, os.PathLike], map_location: Any = None) -> dict:
    """Return a checkpoint for mmengine, see :func:`read_model`.

    Its tensors are on the CPU whatever ``map_location`` says: who loads them copies them.

    Raises:
        ValueError: As there, or weights are not finite.
    """
    checkpoint = _without_configs(read_model(filename))
    check_finite(checkpoint, filename)
    return checkpoint


def _without_configs(checkpoint: Mapping) -> dict:
    """Leave out the texts of configs, which are code: ``Runner.resume`` would run the one of mmcv
    1.x (``config``), and an inferencer that is given no config the others."""
    checkpoint = dict(checkpoint)
    meta, hub = checkpoint.get('meta'), checkpoint.get('message_hub')
    if isinstance(meta, dict):
        checkpoint['meta'] = {key: value for key, value in meta.items()
                              if key not in ('config', 'cfg')}
    info = hub.get('runtime_info') if isinstance(hub, dict) else None
    if isinstance(info, dict):
        checkpoint['message_hub'] = dict(hub, runtime_info={
            key: value for key, value in info.items() if key != 'cfg'})
    return checkpoint


def read_model(source: Union[str, os.PathLike]) -> Mapping:
    """Return what a checkpoint holds, wherever it is, read without running code from it.

    Args:
        source: A path, a URL, ``hf-hub:OWNER/NAME``, or a name that mmengine knows
            (``torchvision://resnet50``, ``open-mmlab://...``, ``mmcls://...``, ``s3://...``).

    Raises:
        FileNotFoundError, ConnectionError: It is not there.
        ValueError: It cannot be read (see :func:`read_checkpoint`), or the name is unknown.
    """
    name = os.fspath(source)
    scheme, _, rest = name.rpartition('://')
    if scheme.split(':')[-1] in ('s3', 'petrel'):
        with get_local_path(name, backend_args=dict(backend='petrel')) as path:
            return read_checkpoint(path)
    if f'{scheme}://' not in NAMED:
        return read_checkpoint(locate(name))
    if scheme in ('torchvision', 'modelzoo'):
        known = mmengine.get_torchvision_models()
    elif scheme == 'mmcls':
        known = mmengine.get_mmcls_models()
    else:
        known = mmengine.get_external_models()
        rest = mmengine.get_deprecated_model_names().get(rest, rest)
    if rest not in known:
        raise ValueError(f'checkpoint {name!r}: {scheme} has no model of that name')
    place = known[rest]  # a URL, or a file that the user keeps in mmengine's folder
    checkpoint = read_checkpoint(locate(
        place if '://' in place else os.path.join(mmengine._get_mmengine_home(), place)))
    if scheme != 'mmcls':
        return checkpoint
    state = checkpoint.get('state_dict', checkpoint)
    return dict(state_dict={key[len('backbone.'):]: value for key, value in state.items()
                            if key.startswith('backbone.')})


def check_finite(checkpoint: Mapping, name: Union[str, os.PathLike]):
    """Raise a ValueError, naming the first, if weights in ``checkpoint`` are NaN or infinite."""
    sets = [checkpoint, *(checkpoint[key] for key in WRAPPERS
                          if isinstance(checkpoint.get(key), Mapping))]
    bad = [key for each in sets for key, value in each.items()
           if isinstance(value, Tensor) and not value.isfinite().all()]
    if bad:
        raise ValueError(f'checkpoint {name} has {len(bad)} tensors with values that are NaN or '
                         f'infinite, first {bad[0]}')
