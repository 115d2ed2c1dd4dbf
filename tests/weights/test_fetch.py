"""Checkpoints are found or downloaded, from servers on this machine alone."""
import hashlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub as hub
import pytest
import torch
from huggingface_hub import constants, errors

from mmeffformer.weights import fetch

L1 = 'timm/efficientformer_l1.snap_dist_in1k'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of torch.hub."""
    monkeypatch.setattr(torch.hub, '_hub_dir', None)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    return tmp_path / 'hub/checkpoints'


@contextmanager
def served(content, requests, wait_s=0.):
    """Serve ``content`` under every name without 'absent'; yield the URL of the folder."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            time.sleep(wait_s)
            self.send_response(404 if 'absent' in self.path else 200)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f'http://127.0.0.1:{server.server_port}'
    finally:
        server.shutdown()
        server.server_close()


def visible(folder):
    return {path.name for path in folder.glob('[!.]*')}  # a lock may stay


def place(message) -> Path:
    """Put a file where the message of an error asks for it."""
    lines = message.splitlines()
    path = Path(lines[lines.index('elsewhere and put it at') + 1].strip())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'weights')
    return path


def test_paths(tmp_path):
    for name in ('a.pth', 'saved/model.safetensors'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert fetch.locate(tmp_path / 'a.pth') == tmp_path / 'a.pth'
    assert fetch.locate(tmp_path / 'saved') == tmp_path / 'saved/model.safetensors'
    for name in ('b.pth', 'hub'):
        with pytest.raises(FileNotFoundError, match=f'looked for a checkpoint at .*/{name}, but'):
            fetch.locate(tmp_path / name)


@pytest.mark.parametrize('name, message', [
    ('s3://a/b.pth', "checkpoint 's3://a/b.pth': expected a path, an http"),
    ('hf-hub:timm', 'expected hf-hub:OWNER/NAME'),
    ('https://a.b/', 'URL that ends in the name of a file')])
def test_other_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        fetch.locate(name)


def test_download_is_kept(cache):
    requests = []
    with served(b'weights', requests) as at:
        with pytest.raises(ConnectionError, match='404'):
            fetch.locate(f'{at}/absent.pth')
        for _ in range(2):
            assert fetch.locate(f'{at}/l1.pth').read_bytes() == b'weights'
    assert requests == ['/absent.pth', '/l1.pth'] and visible(cache) == {'l1.pth'}


def test_download_is_compared_with_the_hash_in_its_name(cache):
    content = b'weights'
    digest = hashlib.sha256(content).hexdigest()
    with served(content, []) as at:
        for name in ('l1-00000000.pth', f'l1-{digest[:15]}0.pth.tar'):
            with pytest.raises(ValueError, match=f'was not kept: invalid hash.*{digest}'):
                fetch.locate(f'{at}/{name}')
        assert not visible(cache)
        # Hashes of any length, a date, and other words.
        good = (f'l1-{digest[:8]}.pth', f'l1-{digest}.pth.tar', 'l1-20220915.pth', 'l1-cafe.pth',
                'l1-00000000-best.pth')
        for name in good:
            assert fetch.locate(f'{at}/{name}').read_bytes() == content
    assert visible(cache) == {*good}


def test_one_of_several_processes_downloads(cache):
    cache.mkdir(parents=True)
    (cache / '.l1.pth.lock').touch()  # of a process that was killed
    requests = []
    # Threads that open the lock each for itself exclude each other as processes do.
    with served(b'weights', requests, wait_s=.2) as at, ThreadPoolExecutor(4) as pool:
        paths = [*pool.map(lambda _: fetch.locate(f'{at}/l1.pth'), range(4))]
    assert {*paths} == {cache / 'l1.pth'} and requests == ['/l1.pth']
    assert paths[0].read_bytes() == b'weights' and visible(cache) == {'l1.pth'}


def test_unreachable_url_is_explained_and_a_file_placed_by_hand_is_used(cache):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    url = f'http://127.0.0.1:{port}/v0/l1-cc3e1ac6.pth?download=true'
    with pytest.raises(ConnectionError, match='could not be fetched: .*refused') as error:
        fetch.locate(url)
    assert f'download\n  {url}\n' in str(error.value)
    assert "init_cfg=dict(type='Pretrained', checkpoint=PATH)" in str(error.value)
    assert not visible(cache)
    assert place(str(error.value)) == cache / 'l1-cc3e1ac6.pth' == fetch.locate(url)


@pytest.mark.parametrize('name, revision', [(f'hf-hub:{L1}', 'main'), (f'hf_hub:{L1}@abc', 'abc')])
def test_unreachable_hub_is_explained_and_a_file_placed_by_hand_is_used(
        name, revision, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(ConnectionError, match=f'{name} could not be fetched: ') as error:
        fetch.locate(name)
    for file in ('pytorch_model.bin', 'model.safetensors'):  # many repositories have only one
        url = f'https://huggingface.co/{L1}/resolve/{revision}/{file}'
        message = str(error.value)
        assert f'download\n  {url}\n' in message
        assert place(message[message.index(url):]) == fetch.locate(name) == fetch.locate(url)
    with pytest.raises(ConnectionError):  # the file is used for its own revision only
        fetch.locate(f'hf-hub:{L1}@other')


def test_hub_is_asked_for_safetensors_then_bin(monkeypatch):
    requests = []
    remote = getattr(errors, 'RemoteEntryNotFoundError', errors.EntryNotFoundError)

    def download(repo, file, revision, local_files_only):
        requests.append((repo, file, revision, local_files_only))
        if file.endswith('safetensors'):
            kind = errors.LocalEntryNotFoundError if repo == 'a/cached' else remote
            raise type('Missing', (kind,), {'__init__': lambda self: None})
        return f'/cache/{file}'

    monkeypatch.setattr(hub, 'hf_hub_download', download)
    for repo in ('a/b', 'a/cached'):
        assert str(fetch.locate(f'hf-hub:{repo}@v1')) == '/cache/pytorch_model.bin'
    # Without a connection, the second file is looked for in the cache alone.
    assert requests == [(repo, file, 'v1', offline) for repo, file, offline in (
        ('a/b', 'model.safetensors', False), ('a/b', 'pytorch_model.bin', False),
        ('a/cached', 'model.safetensors', False), ('a/cached', 'pytorch_model.bin', True))]
