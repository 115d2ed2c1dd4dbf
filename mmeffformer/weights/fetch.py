"""From the name of a checkpoint to a file on this machine.

Downloads are kept where torch.hub keeps its own, ``$TORCH_HOME/hub/checkpoints``.
A file put there by hand is used as if it had been downloaded. Of several processes on one machine,
or on one file system, one downloads and the others wait.
"""
import hashlib
import os
import re
import shutil
import urllib.request
from pathlib import Path
from typing import Union
from urllib.error import HTTPError
from urllib.parse import urlparse

import torch
from filelock import FileLock
from mmengine.dist import is_main_process
from rich.progress import wrap_file

HUB_FILES = ('model.safetensors', 'pytorch_model.bin')
TIMEOUT_S = 10
_HUB = re.compile(r'hf[-_]hub:([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?')
_HUB_URL = re.compile(r'https://huggingface\.co/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)')


# The end of a name that is torch's and OpenMMLab's convention: the SHA-256, or how it starts.
_HASH = re.compile(r'-([0-9a-f]{8,64})\.\w[\w.]*$')
_DATE = re.compile(r'(19|20)\d\d(0[1-9]|1[0-2])[0-3]\d')  # looks like one


def locate(source: Union[str, os.PathLike]) -> Path:
    """Return the local file of a path, an http(s) URL or an ``hf-hub:OWNER/NAME[@REVISION]``.

    Raises:
        FileNotFoundError: A path where nothing is.
        ConnectionError: It can be neither found here nor fetched; says what to
            download and where to put it.
        ValueError: A name of another kind, or the file fetched is not the one whose hash is
            in its name.
    """
    name = os.fspath(source)
    if name.startswith(('hf-hub:', 'hf_hub:')):
        return _from_hub(name)
    if name.startswith(('http://', 'https://')):
        return _from_url(name)
    if '://' in name:
        raise ValueError(f'checkpoint {name!r}: expected a path, an http(s) URL or '
                         'hf-hub:OWNER/NAME')
    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'looked for a checkpoint at {path.absolute()}, but there is no '
                                'such file')
    return path


def cache_path(url: str) -> Path:
    """Return where the file of ``url`` is kept."""
    on_hub = _HUB_URL.fullmatch(url.split('?')[0])
    name = os.path.basename(urlparse(url).path)
    if on_hub:  # where files all have the same few names: the model and revision go in front
        name = '--'.join(part for part in on_hub.groups() if part != 'main').replace('/', '--')
    if not name:
        raise ValueError(f'checkpoint {url!r}: expected a URL that ends in the name of a file')
    return Path(torch.hub.get_dir()).expanduser() / 'checkpoints' / name


def _from_url(url: str) -> Path:
    cached = cache_path(url)
    if cached.is_file():
        return cached
    cached.parent.mkdir(parents=True, exist_ok=True)
    lock = cached.with_name(f'.{cached.name}.lock')
    try:
        with FileLock(lock):  # let go of when a process dies, too
            if not cached.is_file():
                _download(url, cached)
    except NotImplementedError:  # a file system without locks: each downloads, and all the same
        _download(url, cached)
    finally:
        lock.unlink(missing_ok=True)
    return cached


def _download(url: str, cached: Path):
    partial = cached.with_name(f'{cached.name}.{os.getpid()}.partial')
    try:
        request = urllib.request.Request(url, headers={'User-Agent': 'mmeffformer'})
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            expected = reply.headers.get('Content-Length')
            with partial.open('wb') as out, wrap_file(
                    reply, int(expected or 0), description=cached.name,
                    disable=not is_main_process()) as watched:
                shutil.copyfileobj(watched, out)
        size = partial.stat().st_size
        if expected is not None and size != int(expected):
            raise OSError(f'the download ended after {size} of {expected} bytes')
        _check_hash(partial, url, cached.name)
        os.replace(partial, cached)
    except OSError as error:  # URLError, HTTPError and timeouts are OSErrors
        raise _unreachable(url, url, cached, error) from error
    finally:
        partial.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_hash(path: Path, url: str, name: str):
    """Raise a ValueError if the file is not the one whose hash ``name`` ends in."""
    said = _HASH.search(name)
    if not said or _DATE.fullmatch(said[1]):
        return
    found = sha256(path)
    if not found.startswith(said[1]):
        raise ValueError(f'{url} gave another file than its name says: its SHA-256 starts with '
                         f'{found[:len(said[1])]}, expected {said[1]}. Nothing was kept: it was '
                         'altered or damaged there or on the way, or its name ends in a hash of '
                         'another kind; then download it yourself and name your copy')


def _from_hub(name: str) -> Path:
    match = _HUB.fullmatch(name)
    if not match:
        raise ValueError(f'checkpoint {name!r}: expected hf-hub:OWNER/NAME or '
                         'hf-hub:OWNER/NAME@REVISION, as in '
                         'hf-hub:timm/efficientformer_l1.snap_dist_in1k')
    repo, revision = match[1], match[2] or 'main'
    urls = [f'https://huggingface.co/{repo}/resolve/{revision}/{file}' for file in HUB_FILES]
    for url in urls:
        if cache_path(url).is_file():
            return cache_path(url)
    try:
        import huggingface_hub as hub
        from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:  # public files need neither its cache nor its login
        try:
            return _from_url(urls[0])
        except ConnectionError as error:
            if getattr(error.__cause__, 'code', None) != 404:
                raise
        return _from_url(urls[1])
    for file in HUB_FILES:
        cached = hub.try_to_load_from_cache(repo, file, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    for file in HUB_FILES:
        try:
            _reach(hub.constants.ENDPOINT)
            return Path(hub.hf_hub_download(repo, file, revision=revision,
                                            etag_timeout=TIMEOUT_S))
        except Exception as error:  # httpx or requests errors, by the version of the library
            missing = isinstance(error, EntryNotFoundError) \
                and not isinstance(error, LocalEntryNotFoundError)
            if not missing or file == HUB_FILES[-1]:
                raise _unreachable(name, urls[0], cache_path(urls[0]), error) from error


def _reach(endpoint: str):
    """Raise an OSError soon where no server answers; the library retries for a minute."""
    try:
        urllib.request.urlopen(endpoint, timeout=TIMEOUT_S).close()
    except HTTPError:  # an answer too
        pass


def _unreachable(name: str, url: str, cached: Path, reason) -> ConnectionError:
    reason = next(iter(str(reason).strip().splitlines()), '') or type(reason).__name__
    return ConnectionError(
        f'{name} could not be fetched: {reason}\n'
        f'Without a connection, download\n  {url}\nelsewhere and put it at\n  {cached}\n'
        "or name your copy: init_cfg=dict(type='Pretrained', checkpoint='/path/to/file')")
