"""The one door through which checkpoint files are read: no code in them is ever run."""
import argparse
import os
import re
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Mapping, Union

import numpy as np
import torch

_LFS = b'version https://git-lfs'


def read_checkpoint(path: Union[str, os.PathLike]) -> Mapping:
    """Return what a checkpoint file holds, its tensors on the CPU.

    Args:
        path: A torch file (.pth, .pt, .bin, .pth.tar) or a .safetensors file; the
            content decides, not the name.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: A safetensors file, and the library is not installed.
        ValueError: Empty, truncated or of another format, or a pickle which asks
            for anything but tensors and plain data. It is refused unexecuted.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        found = 'that is a folder' if path.is_dir() else 'there is no such file'
        raise FileNotFoundError(f'looked for a checkpoint at {path}, but {found}')
    with path.open('rb') as file:
        head = file.read(64)
    # After the length of its header, less than 2 ** 32, whose low byte may be a pickle's \x80.
    if head[4:9] == b'\0\0\0\0{':
        checkpoint = _read_safetensors(path)
    elif head[:4] == b'PK\x03\x04' or head[:1] == b'\x80':
        checkpoint = _read_torch(path)
    else:
        raise ValueError(f'{path} is {_describe(head)}; expected a torch checkpoint (.pth, .pt, '
                         '.bin) or a .safetensors file')
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f'{path} holds a {type(checkpoint).__name__}; expected a dict of tensors')
    return checkpoint


def _describe(head: bytes) -> str:
    if not head:
        return 'empty (0 bytes)'
    if head.startswith(_LFS):
        return 'a Git LFS pointer, not the file it stands for (run `git lfs pull`)'
    if head.lstrip()[:1] == b'<':
        return 'a web page, not the file it stands for (download it again)'
    return f'of an unknown format (it starts with {head[:8]!r})'


def _read_safetensors(path: Path) -> Mapping:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f'{path} needs safetensors: pip install safetensors') from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f'{path} is a broken or truncated safetensors file '
                         f'({path.stat().st_size} bytes): {error}') from error


def _read_torch(path: Path) -> Mapping:
    try:
        with _plain_data():
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch has no common class for what is wrong with a file
        said = str(error)
        wanted = re.search(r'(?:GLOBAL|Unsupported class) ([\w.]+)', said)
        if wanted:
            raise ValueError(
                f'{path} was refused: its pickle asks for {wanted[1]}, and only tensors and plain '
                f'data are read (by torch {torch.__version__}), since anything else can run code. '
                'Where you trust the file, save its weights alone: '
                'torch.save(state_dict, path).') from error
        raise ValueError(f'{path} is a broken or truncated torch file ({path.stat().st_size} '
                         f'bytes): {said.split(". ")[0] or type(error).__name__}') from error


class _Inert:
    """Stands for an object of a checkpoint that no one asks for; keeps nothing."""

    def __setstate__(self, state):
        pass


def _nothing(*args):
    """Stands for a function that a checkpoint would call."""


def _plain_data():
    """Let weights-only loading pass what mmengine and argparse add to a checkpoint.

    Logged scalars and the methods they name become inert: the real classes change
    themselves, and a real ``getattr`` reaches anything. Before torch 2.5 the list
    of what passes cannot be extended, so such files are refused there.
    """
    if not hasattr(torch.serialization, 'safe_globals'):
        return nullcontext()
    allowed = [dict, set, slice, defaultdict, argparse.Namespace, np.ndarray, np.dtype,
               (_Inert, 'mmengine.logging.history_buffer.HistoryBuffer'),
               (_nothing, 'builtins.getattr'), (_nothing, '__builtin__.getattr')]
    allowed += [getattr(np.dtypes, name) for name in np.dtypes.__all__]
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):  # before and from 2.0
        allowed += [(np.array(0).__reduce__()[0], f'{module}._reconstruct'),
                    (np.float64(0).__reduce__()[0], f'{module}.scalar')]
    return torch.serialization.safe_globals(allowed)
