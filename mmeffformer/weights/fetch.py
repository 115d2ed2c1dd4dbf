"""From the name of a checkpoint to a file on this machine.

Downloads are kept where torch.hub keeps its own, ``$TORCH_HOME/hub/checkpoints``. A file put
there by hand is used as if it had been downloaded.
"""
import os
import re
from pathlib import Path
from typing import Sequence, Union
from urllib.parse import urlparse

import torch
from filelock import FileLock
from mmengine.dist import is_main_process

HUB_FILES = ('model.safetensors', 'pytorch_model.bin')
INDEX = '.index.json'  # lists the files of weights that save_pretrained has split
_HUB = re.compile(r'hf[-_]hub:([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?')
_HUB_URL = re.compile(r'https://huggingface\.co/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)')
# The end of a file name by the convention of torch and OpenMMLab: the SHA-256 or its start. A date
# is none.
_HASH = re.compile(r'-(?!(?:19|20)\d{6}\.)([0-9a-f]{8,64})\.\w[\w.]*$')


def locate(source: Union[str, os.PathLike]) -> Path:
    """Return the local file of a checkpoint, which is downloaded if necessary.

    Args:
        source: A path of a file, or of a folder that ``save_pretrained`` wrote, an http(s) URL,
            or ``hf-hub:OWNER/NAME[@REVISION]``.

    Raises:
        FileNotFoundError: There is nothing at the path.
        ConnectionError: The download failed; the message names what to download and where to
            put it.
        ValueError: A name of another kind, or the SHA-256 of the download is not the one in
            its name.
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
    inside = [*HUB_FILES, *(each + INDEX for each in HUB_FILES)]
    found = [file for file in (path, *(path / each for each in inside)) if file.is_file()]
    if not found:
        reason = f'the folder has no {" or ".join(inside)}' if path.is_dir() else \
            'there is no such file'
        raise FileNotFoundError(f'looked for a checkpoint at {path.absolute()}, but {reason}')
    return found[0]


def cache_path(url: str) -> Path:
    """Return where the download of ``url`` is kept."""
    on_hub = _HUB_URL.fullmatch(url.split('?')[0])
    name = os.path.basename(urlparse(url).path)
    if on_hub:  # files there have the same few names, so the model and revision are added
        name = '--'.join(part for part in on_hub.groups() if part != 'main').replace('/', '--')
    if not name:
        raise ValueError(f'checkpoint {url!r}: expected a URL that ends in the name of a file')
    return Path(torch.hub.get_dir()).expanduser() / 'checkpoints' / name


def _from_url(url: str) -> Path:
    cached = cache_path(url)
    if cached.is_file():
        return cached
    cached.parent.mkdir(parents=True, exist_ok=True)
    expected = _HASH.search(cached.name)
    try:
        with FileLock(cached.with_name(f'.{cached.name}.lock')):  # one process downloads
            if not cached.is_file():
                torch.hub.download_url_to_file(url, str(cached), expected and expected[1],
                                               progress=is_main_process())
    except OSError as error:  # so are URLError, HTTPError and timeouts
        raise _unreachable(url, [url], error) from error
    except RuntimeError as error:
        raise ValueError(f'{url} is not the file that its name says, and was not kept: {error}. '
                         'If the name ends in another kind of hash, download the file yourself '
                         'and give its path') from error
    return cached


def _from_hub(name: str) -> Path:
    match = _HUB.fullmatch(name)
    if not match:
        raise ValueError(f'checkpoint {name!r}: expected hf-hub:OWNER/NAME or '
                         'hf-hub:OWNER/NAME@REVISION, as in '
                         'hf-hub:timm/efficientformer_l1.snap_dist_in1k')
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import LocalEntryNotFoundError, logging
    repo, revision = match[1], match[2] or 'main'
    urls = [f'https://huggingface.co/{repo}/resolve/{revision}/{file}' for file in HUB_FILES]
    for path in map(cache_path, urls):
        if path.is_file():
            return path
    offline = False
    logging.set_verbosity_error()  # each retry is a warning, and the last error is raised
    for file in HUB_FILES:
        try:
            return Path(hf_hub_download(repo, file, revision=revision, local_files_only=offline))
        except OSError as error:  # so are all errors of the hub
            reason, offline = error, isinstance(error, LocalEntryNotFoundError)
    raise _unreachable(name, urls, reason) from reason


def _unreachable(name: str, urls: Sequence[str], error: Exception) -> ConnectionError:
    """Return the error for a source at one of ``urls``."""
    reason = (str(error).strip() or type(error).__name__).split('\n')[0]
    ways = '\nor, if there is no such file,\n'.join(
        f'download\n  {url}\nelsewhere and put it at\n  {cache_path(url)}' for url in urls)
    return ConnectionError(
        f'{name} could not be fetched: {reason}\nWithout a connection, {ways}\n'
        "or give the path of your copy: init_cfg=dict(type='Pretrained', checkpoint=PATH)")
