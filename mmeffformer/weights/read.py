"""The one door through which checkpoint files are read: no code in them is ever run."""
import io
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Union

import numpy as np
import torch
from torch import Tensor

from .pickles import RefusedError, unpickle

PICKLE = 'data.pkl'
MAGIC, PROTOCOL = 0x1950a86a20f9469cfc6c, 1001  # of torch files before 1.6
BLOCK = 1 << 24
MAX_DIRECTORY = 1 << 26  # bytes, of some 100 for each tensor
_LFS = b'version https://git-lfs'


def read_checkpoint(path: Union[str, os.PathLike]) -> Mapping:
    """Return what a checkpoint file holds, its tensors on the CPU.

    Args:
        path: A torch file (.pth, .pt, .bin, .pth.tar) or a .safetensors file; the
            content decides, not the name.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: A safetensors file, and the library is not installed.
        ValueError: Empty, truncated, altered (by the checksums of zip files), of another
            format, or a pickle which asks for anything but tensors and plain data, or for
            more of them than the file can hold. It is refused unexecuted.
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
    elif head[:4] == b'PK\x03\x04':
        checkpoint = _read_torch(path, _read_zip)
    elif head[:1] == b'\x80':
        checkpoint = _read_torch(path, _read_legacy)
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


def _read_torch(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except RefusedError as error:
        raise ValueError(f'{path} was refused: it {error}') from error
    except Exception as error:  # what can be wrong with a file has no common class
        said = str(error).split('\n')[0] or type(error).__name__
        raise ValueError(f'{path} is a broken or truncated torch file ({path.stat().st_size} '
                         f'bytes): {said:.200}') from error


def _read_zip(path: Path) -> Any:
    """Read a file that ``torch.save`` writes since torch 1.6: storages in a zip archive.

    Storages are stored as they are, so what is read is at most as large as the file.
    """
    if _directory_size(path) > MAX_DIRECTORY:
        raise RefusedError('has a table of contents too large for any network')
    with zipfile.ZipFile(path) as archive:
        if any(re.fullmatch(r'([^/]*/)?(constants\.pkl|code/.*\.py(\.debug_pkl)?)', name)
               for name in archive.namelist()):
            raise RefusedError('is a TorchScript program, which could do anything. Expected '
                               'weights alone: torch.save(model.state_dict(), path)')
        entries = _entries(archive)
        roots = [name[:-len(PICKLE)] for name in entries if name.endswith(PICKLE)
                 and name.count('/') <= 1]
        if len(roots) != 1:
            raise RefusedError('is a zip archive of something else, not a torch checkpoint '
                               f'(it has no {PICKLE})')
        root, = roots
        storages: Dict[str, Tensor] = {}

        def load(key: str, dtype: torch.dtype, count: int) -> Tensor:
            entry = entries[f'{root}data/{key}']
            if count * dtype.itemsize > entry.file_size:
                raise RefusedError(f'has a storage of {count:,} x {dtype}, for which there are '
                                   f'{entry.file_size:,} bytes')
            if key not in storages:
                storages[key] = _content(archive, entry)
            return storages[key][:count * dtype.itemsize].view(dtype)

        order = entries.get(f'{root}byteorder')
        if order is not None and archive.read(order) != b'little':
            raise RefusedError('is of a big-endian machine')
        pickle = archive.read(entries[root + PICKLE])
        checkpoint = unpickle(io.BytesIO(pickle), load, limit=_limit(len(pickle)))
        for name, entry in entries.items():  # whatever else there is has a checksum too
            if name not in {root + PICKLE, *(f'{root}data/{key}' for key in storages)}:
                with archive.open(entry) as file:
                    while file.read(BLOCK):
                        pass
    return checkpoint


def _directory_size(path: Path) -> int:
    """Bytes of a zip archive's table of contents, which zipfile reads at once."""
    with path.open('rb') as file:
        file.seek(-min(98, path.stat().st_size), os.SEEK_END)
        tail = file.read().rjust(98)
    if tail[-22:-18] != b'PK\5\6':  # torch adds no comment behind it
        raise ValueError('it has no end')
    size, = struct.unpack('<L', tail[-10:-6])
    if tail[-42:-38] == b'PK\6\7':  # from 4 GB on
        size = max(struct.unpack('<Q', tail[-58:-50])[0], size if size < 0xffffffff else 0)
    return size


def _entries(archive: zipfile.ZipFile) -> Dict[str, zipfile.ZipInfo]:
    """Return the entries of an archive by name, of which none is larger than what is there."""
    entries: Dict[str, zipfile.ZipInfo] = {}
    end = 0
    for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
        name = entry.filename
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise RefusedError(f'has the entry {name!r:.80} compressed, of {entry.file_size:,} '
                               'bytes, which torch never does: it may be a zip bomb')
        if name in entries or entry.header_offset < end:
            raise RefusedError(f'has the entry {name!r:.80} twice, or within another: it may be a '
                               'zip bomb')
        entries[name] = entry
        end = entry.header_offset + entry.compress_size
    if end > os.fstat(archive.fp.fileno()).st_size:
        raise ValueError('an entry ends behind the file')
    return entries


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Tensor:
    """Return the bytes of an entry (bytes), whose checksum zipfile compares."""
    data = torch.empty(entry.file_size, dtype=torch.uint8)
    view, start = data.numpy(), 0
    with archive.open(entry) as file:
        while block := file.read(BLOCK):
            view[start:start + len(block)] = np.frombuffer(block, np.uint8)
            start += len(block)
    if start != len(data):
        raise EOFError(f'{entry.filename} ends after {start} of {len(data)} bytes')
    return data


def _read_legacy(path: Path) -> Any:
    """Read a file as ``torch.save`` wrote them before 1.6: five pickles, then the storages."""
    size = path.stat().st_size
    storages: Dict[str, Tensor] = {}

    def load(key: str, dtype: torch.dtype, count: int) -> Tensor:
        if key not in storages:
            claimed = sum(data.nbytes for data in storages.values()) + count * dtype.itemsize
            if claimed > size:
                raise RefusedError(f'claims to have storages of {claimed:,} bytes, in a file of '
                                   f'{size:,}')
            storages[key] = torch.empty(count, dtype=dtype)  # filled below
        if (storages[key].dtype, len(storages[key])) != (dtype, count):
            raise ValueError(f'storage {key} is of two kinds')
        return storages[key]

    with path.open('rb') as file:
        if unpickle(file) != MAGIC or unpickle(file) != PROTOCOL:
            raise RefusedError('is a pickle of something else, not a torch checkpoint')
        if not unpickle(file).get('little_endian', True):
            raise RefusedError('is of a big-endian machine')
        checkpoint = unpickle(file, load, limit=_limit(size))
        keys = [str(key) for key in unpickle(file)]
        if sorted(keys) != sorted(storages):
            raise ValueError('the storages are not those of the tensors')
        for key in keys:
            count, = struct.unpack('<q', file.read(8))
            if count != len(storages[key]):
                raise ValueError(f'storage {key} has {count} elements, not {len(storages[key])}')
            view = storages[key].view(torch.uint8).numpy()
            if count and file.readinto(view) != len(view):
                raise EOFError(f'storage {key} is cut off')
    return checkpoint


def _limit(size: int) -> int:
    """Bytes to make of a pickle of so many: texts stand for some, and numbers for themselves."""
    return 4 * size + (1 << 20)
