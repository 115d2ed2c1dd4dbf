"""Reads checkpoint files without running code from them, also where mmengine loads them.

torch's ``weights_only`` unpickler does the work. Besides torch's own names it accepts those in
mmengine's checkpoints.
"""
import argparse
import json
import os
import pickle
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Set, Union

import numpy as np
import torch
from mmengine.fileio import get_local_path
from mmengine.logging import HistoryBuffer
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.utils import digit_version
from torch import Tensor, nn

from .fetch import INDEX, locate

Source = Union[str, os.PathLike]

# Keys under which files keep weights, in the order of preference. Averaged weights come last:
# the authors' training code stores them, but evaluates the raw ones. mmengine swaps the two: with
# EMAHook, `state_dict` is the average, which it evaluates, and `ema_state_dict` the raw weights.
WRAPPERS = ('state_dict', 'model', 'model_state_dict', 'module', 'net', 'state_dict_ema',
            'model_ema', 'ema_state_dict')
# The last names in keys of weights, for files whose model is unknown.
WEIGHT_NAMES = {'weight', 'bias', 'in_proj_weight', 'in_proj_bias', 'running_mean', 'running_var',
                'table', 'layer_scale1', 'layer_scale2'}
SCHEMES = (r'(\S+\:)?s3://', r'(\S+\:)?petrel://', 'torchvision://', 'modelzoo://',
           'open-mmlab://', 'openmmlab://', 'mmcls://', 'http://', 'https://', 'pavi://', '')


class _History(HistoryBuffer):
    """Becomes a HistoryBuffer when its state is set.

    mmengine's ``__setstate__`` would register the methods in a file for all its buffers.
    """

    def __setstate__(self, state: dict) -> None:
        self.__class__ = HistoryBuffer
        HistoryBuffer.__init__(self, state['_log_history'], state['_count_history'],
                               state['max_length'])


class _Array(np.ndarray):
    """An array of numbers, saved as a plain one."""

    def __new__(cls, *args: Any) -> '_Array':  # its content is set with its state
        return super().__new__(cls, 0)

    def __setstate__(self, state: tuple) -> None:
        super().__setstate__((*state[:2], _numeric(state[2]), *state[3:]))

    def __reduce__(self) -> Any:
        return np.asarray(self).__reduce__()


def _numeric(dtype: np.dtype) -> np.dtype:
    """Refuse other dtypes, and numeric ones with forged flags.

    A dtype that claims to hold objects makes numpy take numbers for their addresses.
    """
    if dtype.kind not in 'biufc' or dtype.flags:
        raise pickle.UnpicklingError('it holds a numpy array of other values than numbers')
    return dtype


def _scalar(dtype: np.dtype, data: bytes) -> np.generic:
    return np.frombuffer(data, _numeric(dtype), 1)[0]


def _no_getattr(*args: Any) -> None:
    """Stands in for ``getattr``, by which HistoryBuffer saves its methods."""


# What checkpoints of mmengine ask for besides tensors and containers. The authors' checkpoints
# hold the options of their training, an argparse.Namespace.
SAFE_GLOBALS: Dict[str, Any] = {
    'mmengine.logging.history_buffer.HistoryBuffer': _History,
    'builtins.getattr': _no_getattr,
    'builtins.slice': slice,
    'argparse.Namespace': argparse.Namespace,
    'numpy.ndarray': _Array,
    'numpy.dtype': np.dtype,
}
for _code in '?' + np.typecodes['AllInteger'] + np.typecodes['AllFloat']:
    _kind = type(np.dtype(_code))
    SAFE_GLOBALS[f'numpy.dtypes.{_kind.__name__}'] = _kind
for _module in ('numpy.core.multiarray', 'numpy._core.multiarray'):  # before and since numpy 2
    SAFE_GLOBALS.update({f'{_module}._reconstruct': _Array, f'{_module}.scalar': _scalar})
_TORCH_GLOBALS = {
    'collections.OrderedDict', 'collections.Counter', '_codecs.encode', 'builtins.set',
    'builtins.bytearray', 'builtins.complex', 'torch.Size', 'torch.device', 'torch.Tensor',
    'torch.nn.parameter.Parameter', 'torch.serialization._get_layout',
    'torch.storage.UntypedStorage', 'torch._tensor._rebuild_from_type_v2',
    *(f'torch._utils._rebuild_{name}' for name in (
        'tensor', 'tensor_v2', 'tensor_v3', 'parameter', 'parameter_with_state', 'qtensor',
        'sparse_tensor', 'sparse_csr_tensor', 'meta_tensor_no_storage'))}


# Before, torch knows no safe globals under another name than their own.
SAFE_GLOBALS_SUPPORTED = digit_version(torch.__version__) >= digit_version('2.7')


class SafePickle:
    """Stands in for the pickle module where torch cannot be given ``SAFE_GLOBALS``."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            full_name = f'{module.replace("__builtin__", "builtins")}.{name}'
            if full_name in SAFE_GLOBALS:
                return SAFE_GLOBALS[full_name]
            if full_name in _TORCH_GLOBALS or (
                    module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype)):
                return super().find_class(module, name)
            raise pickle.UnpicklingError(f'GLOBAL {full_name} is not allowed')

    @classmethod
    def load(cls, file: Any, **options: Any) -> Any:
        return cls.Unpickler(file, **options).load()


def read_checkpoint(path: Source) -> Mapping:
    """Return the content of a checkpoint file, its tensors on the CPU.

    Args:
        path: A torch file (.pth, .pt, .bin, .pth.tar) or a .safetensors file, by content, not
            by name; or the .index.json of a split one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is empty, truncated, of another format, or a pickle that asks for
            more than tensors and plain data, which is refused before anything in it runs.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        found = 'that is a folder' if path.is_dir() else 'there is no such file'
        raise FileNotFoundError(f'looked for a checkpoint at {path}, but {found}')
    if path.name.endswith(INDEX):
        return _read_shards(path)
    with path.open('rb') as file:
        head = file.read(64)
    read: Callable[[Path], Any]
    if head[4:9] == b'\0\0\0\0{':  # the length of a header in JSON, less than 2 ** 32, comes first
        from safetensors.torch import load_file
        read, kind = load_file, 'safetensors'
    elif head.startswith((b'PK\x03\x04', b'\x80')):
        read, kind = _read_torch, 'torch'
    else:
        raise ValueError(f'{path} is {_describe(head)}; expected a torch checkpoint (.pth, .pt, '
                         '.bin) or a .safetensors file')
    try:
        checkpoint = read(path)
    except Exception as error:  # errors about broken files have no class in common
        reason = _summary(error)
        if isinstance(error, pickle.UnpicklingError) and 'truncated' not in reason:
            raise ValueError(f'{path} was refused: {reason}. A checkpoint may hold tensors and '
                             'plain data only, as torch.save(model.state_dict(), path) writes '
                             'them') from error
        raise ValueError(f'{path} is a broken or truncated {kind} file ({path.stat().st_size} '
                         f'bytes): {reason}. If it was downloaded, delete it and download it '
                         'again') from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f'{path} holds a {type(checkpoint).__name__}; expected a dict of tensors')
    return checkpoint


def _read_shards(index: Path) -> Dict[str, Any]:
    """Return the content of all files that ``index`` lists, which are in its folder."""
    try:
        names = {Path(name).name for name in json.loads(index.read_text())['weight_map'].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{index} is not an index of weights: expected JSON with a weight_map, '
                         'as save_pretrained writes it') from error
    return {key: value for name in sorted(names)
            for key, value in read_checkpoint(index.with_name(name)).items()}


def _read_torch(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith('constants.pkl') for name in archive.namelist()):
                raise pickle.UnpicklingError('it is a TorchScript program')
            if damaged := archive.testzip():  # torch does not compare the checksums
                raise ValueError(f'the checksum of {damaged} is wrong')
    if not SAFE_GLOBALS_SUPPORTED:
        if tarfile.is_tarfile(path):  # which torch would unpack
            raise ValueError('it is a tar file')
        return torch.load(path, 'cpu', pickle_module=SafePickle, weights_only=False)
    safe_globals: List[Any] = [(value, name) for name, value in SAFE_GLOBALS.items()]
    with torch.serialization.safe_globals(safe_globals):
        return torch.load(path, 'cpu', weights_only=True)


def _describe(head: bytes) -> str:
    if not head:
        return 'empty (0 bytes)'
    if head.startswith(b'version https://git-lfs'):
        return 'a Git LFS pointer, not the file it points to (run `git lfs pull`)'
    if head.lstrip().startswith(b'<'):
        return 'a web page, not a checkpoint (download it again)'
    return f'of an unknown format (it starts with {head[:8]!r})'


def _summary(error: Exception) -> str:
    """Return the cause of an error in one line; torch puts advice around it."""
    text = str(error).strip() or type(error).__name__
    if name := re.search(r'GLOBAL (\S+)', text):
        return f'it asks for {name[1]}'
    cause = re.search(r'WeightsUnpickler error:\s*(.+)', text)
    return (cause[1] if cause else text.split('\n')[0])[:200]


def read_model(source: Source) -> Mapping:
    """Return the content of a checkpoint, wherever it is; see :func:`read_checkpoint`.

    Args:
        source: A path, a URL, ``hf-hub:OWNER/NAME``, or a name that mmengine knows
            (``torchvision://resnet50``, ``open-mmlab://...``, ``mmcls://...``, ``s3://...``).

    Raises:
        FileNotFoundError, ConnectionError: The checkpoint is not there.
        ValueError: The checkpoint cannot be read, or the name is unknown.
    """
    name = os.fspath(source)
    if re.match(r'(\S+:)?(s3|petrel)://', name):
        with get_local_path(name, backend_args=dict(backend='petrel')) as path:
            return read_checkpoint(path)
    checkpoint = read_checkpoint(locate(_look_up(name)))
    if not name.startswith('mmcls://'):
        return checkpoint
    state = checkpoint.get('state_dict', checkpoint)
    return dict(state_dict={key.removeprefix('backbone.'): value for key, value in state.items()
                            if key.startswith('backbone.')})


def _look_up(name: str) -> str:
    """Return the URL or path of a model that mmengine knows by name; other names unchanged."""
    scheme, _, model = name.rpartition('://')
    if scheme in ('torchvision', 'modelzoo'):
        known = mmengine_checkpoint.get_torchvision_models()
    elif scheme == 'mmcls':
        known = mmengine_checkpoint.get_mmcls_models()
    elif scheme in ('open-mmlab', 'openmmlab'):
        known = mmengine_checkpoint.get_external_models()
        model = mmengine_checkpoint.get_deprecated_model_names().get(model, model)
    else:
        return name
    if model not in known:
        raise ValueError(f'checkpoint {name!r}: {scheme} has no model {model!r}')
    place = known[model]  # a URL, or a file in mmengine's folder
    return place if '://' in place else os.path.join(mmengine_checkpoint._get_mmengine_home(),
                                                     place)


def check_finite(checkpoint: Mapping, name: Source, model: Optional[nn.Module] = None) -> None:
    """Raise a ValueError if weights are NaN or infinite; masks and other buffers may be.

    Weights are parameters and the statistics of BatchNorm.

    Args:
        checkpoint: A state dict, or a dict that holds some under ``WRAPPERS``.
        name: The checkpoint's name in the message.
        model: The model that the state dict is of. Without it, weights are recognised by the
            last names in their keys (``WEIGHT_NAMES``).
    """
    states = [checkpoint, *(checkpoint[key] for key in WRAPPERS
                            if isinstance(checkpoint.get(key), Mapping))]
    parameters = None if model is None else {key for key, _ in model.named_parameters()}
    bad = [key for state in states for key, value in state.items()
           if isinstance(value, Tensor) and _is_weight(str(key), parameters)
           and not value.isfinite().all()]
    if bad:
        raise ValueError(f'checkpoint {name} has {len(bad)} tensors with values that are NaN or '
                         f'infinite, first {bad[0]}')


def _is_weight(key: str, parameters: Optional[Set[str]]) -> bool:
    last = key.rpartition('.')[2]
    if parameters is None:
        return last in WEIGHT_NAMES
    return key in parameters or last in ('running_mean', 'running_var')


def install() -> None:
    """Make mmengine load checkpoints through :func:`load_from_anywhere`, in this process.

    This covers ``Runner.load_checkpoint`` and ``resume``, ``load_checkpoint``, ``init_detector``,
    ``init_model`` and ``init_cfg=dict(type='Pretrained')`` of any module.
    """
    CheckpointLoader.register_scheme(SCHEMES, load_from_anywhere, force=True)


def load_from_anywhere(filename: Source, map_location: Any = None) -> dict:
    """Return a checkpoint for mmengine, see :func:`read_model`.

    Its tensors are on the CPU whatever ``map_location`` is; the caller copies them. Texts of
    configs are left out: mmengine's ``Runner.resume`` and inferencers execute them.

    Raises:
        ValueError: The checkpoint cannot be read, or its weights are not finite.
    """
    checkpoint = dict(read_model(filename))
    check_finite(checkpoint, filename)
    hub = checkpoint.get('message_hub')
    info = hub.get('runtime_info') if isinstance(hub, dict) else None
    for place in (checkpoint.get('meta'), info):
        if isinstance(place, dict):
            for key in ('cfg', 'config'):
                place.pop(key, None)
    return checkpoint
