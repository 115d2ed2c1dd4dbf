"""Loading is whole or not at all, and says what it did."""
import hashlib
import io
import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace
from urllib.error import HTTPError, URLError

import huggingface_hub as hub
import numpy as np
import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.logging import MessageHub
from safetensors.torch import save_file

from mmeffformer import EfficientFormer, load_weights
from mmeffformer.models import ARCHS
from mmeffformer.models.attention import resample_table
from mmeffformer.weights import LAYOUTS, convert, fetch, read_checkpoint

SMALL = dict(widths=(8, 16, 24, 32), depths=(1, 1, 2, 2), attention_blocks=(0, 0, 0, 1))
NORMS = tuple(f'out_norms.{i}.{leaf}' for i in range(4) for leaf in ('weight', 'bias'))
TABLE = 'stages.3.blocks.1.token_mixer.bias.table'


def build(seed=0, arch=SMALL, **kwargs):
    """Return a backbone with random weights, statistics and scales."""
    net = EfficientFormer(arch, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    for value in net.state_dict().values():
        if value.is_floating_point():
            fan_in = value[0].numel() if value.dim() in (2, 4) else 4
            value.copy_((torch.rand(value.shape, generator=generator) + .1) / fan_in)
    return net.eval()


def as_layout(net, layout='timm', prefix=''):
    state = convert(net.state_dict(), net.arch, 'mmeffformer', layout)
    return {prefix + key: value for key, value in state.items()}


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refused(net, source, match, error=ValueError, **kwargs):
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(error, match=match):
        load_weights(net, source, **kwargs)
    after = net.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize('wrap, prefix, chosen', [
    (lambda s: s, '', ''),
    (lambda s: {'state_dict': s, 'epoch': torch.tensor(3)}, '', 'state_dict'),
    (lambda s: {'model': s, 'args': 1}, 'module.', 'model.module.'),
    (lambda s: {'model': {'state_dict': s}}, '', 'model.state_dict'),
    (lambda s: {'state_dict': s}, 'module.backbone.', 'state_dict.module.backbone.'),
    (lambda s: s, 'model.', 'model.'),
    (lambda s: s, 'efficientformer.', 'efficientformer.'),
])
@pytest.mark.parametrize('layout', ['timm', 'mmeffformer'])
def test_wrappers_and_prefixes_are_found(wrap, prefix, chosen, layout):
    source, net = build(1, out_norm_cfg=None), build(2, out_norm_cfg=None)
    report = load_weights(net, wrap(as_layout(source, layout, prefix)))
    assert same(net, source)
    assert (report.layout, report.prefix, report.left_over) == (layout, chosen, ())


def test_prefix_chooses():
    student, teacher, net = build(1), build(2), build(3)
    state = {**as_layout(student, prefix='student.'), **as_layout(teacher, prefix='teacher.net.')}
    refused(net, state, "holds more than one backbone; .* one of 'student.', 'teacher.net.'$")
    for prefix in ('teacher.net', 'teacher.net.'):
        report = load_weights(net, state, prefix=prefix)
        assert torch.equal(net.stem[0].conv.weight, teacher.stem[0].conv.weight)
        assert len(report.dropped) == len(state) // 2 and not report.unknown
    refused(net, state, r"no keys under prefix 'neck.'; it has student, teacher$", prefix='neck')


def test_raw_weights_before_averaged_unless_asked():
    raw, averaged, net = build(1), build(2), build(3)
    checkpoint = {'model_ema': as_layout(averaged), 'model': as_layout(raw)}
    report = load_weights(net, checkpoint)
    assert torch.equal(net.stem[0].conv.weight, raw.stem[0].conv.weight)
    assert report.others == ('model_ema',)
    assert 'also in the file, choose with prefix=: model_ema' in str(report)
    report = load_weights(net, checkpoint, prefix='model_ema')
    assert torch.equal(net.stem[0].conv.weight, averaged.stem[0].conv.weight)
    assert report.others == ('model',)


def test_runs_of_mmengine_keep_the_average_as_state_dict():
    raw, averaged, net = build(1), build(2), build(3)
    checkpoint = {'state_dict': as_layout(raw, prefix='backbone.')}
    hook = EMAHook()
    hook.ema_model = SimpleNamespace(state_dict=lambda: {
        'steps': torch.tensor(9), **as_layout(averaged, prefix='module.backbone.')})
    hook.before_save_checkpoint(SimpleNamespace(iter=9, epoch=0), checkpoint)
    report = load_weights(net, checkpoint)
    assert torch.equal(net.stem[0].conv.weight, averaged.stem[0].conv.weight)
    assert report.others == ('ema_state_dict',)
    load_weights(net, checkpoint, prefix='ema_state_dict')
    assert torch.equal(net.stem[0].conv.weight, raw.stem[0].conv.weight)


def test_report_counts_and_reads():
    source, net = build(1), build(2, bias_grid=(25, 12))
    state = {**as_layout(source), 'head.weight': torch.ones(1), 'extra.a': torch.ones(1)}
    report = load_weights(net, state)
    assert len(report.loaded) == len(source.state_dict()) - len(NORMS)
    assert report.resampled == {TABLE: ((7, 7), (25, 12))}
    assert (report.dropped, report.unknown) == (('head.weight',), ('extra.a',))
    assert report.left_over == ('head.weight', 'extra.a')
    assert sorted(report.missing) == sorted(NORMS)
    assert str(report) == '\n'.join([
        f'loaded {len(report.loaded)} tensors from a state dict in memory (layout timm)',
        f'  bias tables resampled from 7 x 7 to 25 x 12: {TABLE}',
        '  not needed by a backbone: head.weight',
        '  left over, known to no layout: extra.a',
        '  missing, initial values kept: out_norms.0.weight, out_norms.0.bias, '
        'out_norms.1.weight and 5 more'])
    corners = net.state_dict()[TABLE][:, ::24, ::11]
    assert torch.equal(corners, source.state_dict()[TABLE][:, ::6, ::6])


def test_missing_counters_and_output_norms_keep_their_values():
    source, net = build(1), build(2, out_indices=(1, 3))
    state = {key: value for key, value in as_layout(source, 'official-dense').items()
             if 'num_batches' not in key}
    report = load_weights(net, state)
    assert torch.equal(net.out_norms['3'].bias, source.out_norms['3'].bias)
    assert {*report.dropped} == {f'norm{i}.{leaf}' for i in (0, 4) for leaf in ('weight', 'bias')}
    assert report.missing and all('num_batches' in key for key in report.missing)


def test_dtype_stays_and_frozen_stages_load():
    source, net = build(1), build(2, frozen_stages=4).to(torch.bfloat16)
    load_weights(net, as_layout(source))
    assert {v.dtype for v in net.parameters()} == {torch.bfloat16}
    assert torch.equal(net.stem[0].conv.weight, source.stem[0].conv.weight.bfloat16())


def test_half_precision_is_resampled_too():
    source, net = build(1, out_norm_cfg=None).half(), build(2, out_norm_cfg=None, bias_grid=25)
    report = load_weights(net, as_layout(source))
    assert report.resampled == {TABLE: ((7, 7), (25, 25))}
    assert torch.equal(net.state_dict()[TABLE],
                       resample_table(source.state_dict()[TABLE], (25, 25)).float())
    assert torch.equal(net.stages[3].blocks[1].mlp.project.weight,
                       source.stages[3].blocks[1].mlp.project.weight.float())


def test_nothing_is_loaded_when_resampling_fails(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError('not implemented for this dtype')

    monkeypatch.setattr(torch.nn.functional, 'interpolate', fail)
    refused(build(2, bias_grid=25), as_layout(build(1)), 'not implemented', RuntimeError)


@torch.no_grad()
def test_bias_cached_in_eval_expires():
    source, net = build(1), build(1)
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    source.state_dict()[TABLE][:, 0, 0] = 20.  # every token attends to itself
    before = net(x)[-1]
    load_weights(net, as_layout(source))
    assert (net(x)[-1] - before).abs().max() > 1e-5
    assert torch.equal(net(x)[-1], source(x)[-1])


@pytest.mark.parametrize('prefix', [None, 'backbone.'])
def test_init_cfg_loads_the_same(tmp_path, prefix):
    source = build(1, out_norm_cfg=None)
    torch.save({'state_dict': as_layout(source, 'mmpretrain', 'backbone.')}, tmp_path / 'a.pth')
    cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'), prefix=prefix)
    net = build(2, out_norm_cfg=None, init_cfg=cfg)
    net.init_weights()
    assert same(net, source)


# What does not fit

def test_other_arch_is_named():
    with torch.device('meta'):
        l3 = EfficientFormer('l3').state_dict()
    l3 = {key: torch.zeros(value.shape) for key, value in l3.items()}
    for layout in ('official', 'mmeffformer'):
        state = convert(l3, ARCHS['l3'], 'mmeffformer', layout)
        refused(EfficientFormer('l1'), state, 'checkpoint is l3, backbone is l1: .* tensors have '
                r'another shape, first .* is \(32, 3, 3, 3\) and should be \(24, 3, 3, 3\)')


def test_shallower_backbone_of_the_same_widths_is_refused():
    l1 = ARCHS['l1']
    net = EfficientFormer(dict(widths=l1.widths, depths=(3, 2, 5, 4),
                               attention_blocks=l1.attention_blocks))
    state = as_layout(EfficientFormer('l1'))
    refused(net, state, 'checkpoint is l1, backbone is another arch: the backbone has no place '
            'for 16 of the keys, first stages.2.b')


@pytest.mark.parametrize('layout', LAYOUTS)
def test_deeper_checkpoint_is_refused(layout):
    # By blocks of a kind that the backbone has, and by its only block of a kind.
    deep = build(1, dict(SMALL, depths=(1, 1, 3, 2)))
    state = {**as_layout(deep, layout, 'backbone.'), 'neck.a': torch.ones(1)}
    refused(build(2, dict(SMALL, depths=(1, 1, 1, 2))), state,
            r'the backbone has no place for 32 of the keys, first backbone\..* and 29 more\. Noth')
    deep = build(1, dict(SMALL, depths=(1, 1, 2, 2)))
    shallow = dict(SMALL, depths=(1, 1, 2, 1), attention_blocks=(0, 0, 0, 0))
    refused(build(2, shallow), as_layout(deep, layout), 'has no place for 15 of the keys')


def test_unknown_keys_do_not_make_a_checkpoint_another_arch():
    # A deeper backbone's checkpoint has all keys of the l1 as well.
    l1 = ARCHS['l1']
    net = EfficientFormer(dict(widths=l1.widths, depths=(4, 2, 6, 4),
                               attention_blocks=l1.attention_blocks))
    state = {**as_layout(net), 'extra.a': torch.ones(1)}
    assert load_weights(net, state).unknown == ('extra.a',)


def test_what_does_not_fit_changes_nothing():
    net, good = build(2), as_layout(build(1))
    key = 'stages.1.blocks.0.mlp.fc1.weight'
    table = 'stages.3.blocks.2.token_mixer.attention_biases'

    def changed(**kwargs):
        return {**good, **{key if name == 'key' else table: v for name, v in kwargs.items()}}

    lacking = {k: v for k, v in good.items() if not k.startswith('stages.3.')}
    refused(net, lacking, 'it lacks stages.3.downsample.conv.weight, .* more. Nothing was loaded')
    refused(net, {**good, key: torch.ones(3)}, rf'first {key} is \(3,\) and should be \(64, 16, 1')
    refused(net, changed(key=good[key] * float('nan')), f'{key} has values that are NaN or inf')
    refused(net, changed(key=good[key] / 0), f'{key} has values that are NaN or inf')
    refused(net, changed(key=good[key].long()), f'{key} is of torch.int64, expected floating')
    refused(net, changed(key=good[key].numpy()), f'{key} is a ndarray, expected a tensor')
    refused(net, changed(table=torch.ones(8, 50)), r'shape \(8, 50\): expected \(heads, n \* n\)')
    refused(net, changed(table=torch.ones(4, 49)), r'is \(4, 7, 7\) and should be \(8, 7, 7\)')
    refused(net, {'a.b': torch.ones(1)}, 'no known layout; accepted are mmeffformer, official, '
            'official-dense, mmpretrain, mmpretrain-dense, timm, transformers. It starts with a.b')
    refused(net, {}, 'no known layout')
    refused(build(1, norm_cfg=dict(type='GN', num_groups=1)), good,
            r'has no place for 45 of the keys, first stem.norm1.running_mean, .*type BN or SyncBN')
    refused(torch.nn.Linear(2, 2), good, 'got a Linear; expected a backbone', TypeError)


# Files

def test_torch_and_safetensors_files(tmp_path):
    source = build(1, out_norm_cfg=None)
    state = as_layout(source)
    hub = MessageHub.get_instance('test')
    hub.update_scalar('loss', .5)
    paths = [tmp_path / name for name in (
        'a.pth', 'b.pth.tar', 'c.bin', 'd.safetensors', 'mmengine.pth')]
    torch.save(state, paths[0])
    torch.save({'state_dict': state}, paths[1], _use_new_zipfile_serialization=False)
    torch.save({'model': state}, paths[2])
    save_file({key: value.contiguous() for key, value in state.items()}, paths[3])
    torch.save({'state_dict': state, 'message_hub': hub.state_dict(), 'n': np.float64(1),
                'meta': {'array': np.arange(3)}}, paths[-1])
    for path in paths:
        net = build(2, out_norm_cfg=None)
        assert load_weights(net, path).source == str(path)
        assert same(net, source), path


def test_safetensors_header_of_any_length(tmp_path):
    # The file starts with the length, whose low byte may be that of a pickle.
    source, net, path = build(1, out_norm_cfg=None), build(2, out_norm_cfg=None), tmp_path / 'a'
    save_file(as_layout(source), path, {'pad': ''})
    length = int.from_bytes(path.read_bytes()[:8], 'little')
    save_file(as_layout(source), path, {'pad': ' ' * ((0x80 - length) % 0x100)})
    content = path.read_bytes()
    assert content[:1] == b'\x80'
    load_weights(net, path)
    assert same(net, source)
    path.write_bytes(content[:40])
    refused(net, path, 'broken or truncated safetensors file')


class Runs:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize('zipped', [True, False])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path, zipped):
    net, path, marker = build(1), tmp_path / 'evil.pth', tmp_path / 'marker'
    for function, args, named in (
            (os.system, (f'touch {marker}',), 'posix.system'),
            (os.mkdir, (str(marker),), 'posix.mkdir'),
            (eval, (f'open({str(marker)!r}, "w")',), 'eval')):
        torch.save({'state_dict': as_layout(net), 'x': Runs(function, *args)}, path,
                   _use_new_zipfile_serialization=zipped)
        refused(net, path, rf'evil.pth was refused: it asks for \S*{named}, and only')
        refused(net, str(path), 'evil.pth was refused')
        assert not marker.exists()


def test_getattr_in_a_pickle_gets_nothing(tmp_path):
    torch.save({'x': Runs(getattr, torch.Size, 'numel')}, tmp_path / 'a.pth')
    assert read_checkpoint(tmp_path / 'a.pth') == {'x': None}


def test_broken_files(tmp_path):
    net, path = build(1), tmp_path / 'a.pth'
    torch.save(as_layout(net), path)
    zipped = path.read_bytes()
    torch.save(as_layout(net), path, _use_new_zipfile_serialization=False)
    legacy = path.read_bytes()
    save_file(as_layout(net), path)
    tensors = path.read_bytes()
    for content, match in (
            (b'', r'a.pth is empty \(0 bytes\); expected a torch checkpoint'),
            (zipped[:-50], r'broken or truncated torch file \(\d+ bytes\)'),
            (zipped[:200], 'broken or truncated torch file'),
            (legacy[:-50], 'broken or truncated torch file'),
            (legacy[:20], 'broken or truncated torch file'),
            (tensors[:-50], 'broken or truncated safetensors file'),
            (tensors[:40], 'broken or truncated safetensors file'),
            (b'hello, world', "unknown format .it starts with b'hello, w'.; expected a torch"),
            (b'<!DOCTYPE html>', 'a web page, not the file'),
            (b'version https://git-lfs.github.com', 'a Git LFS pointer')):
        path.write_bytes(content)
        refused(net, path, match)
    torch.save([1], path)
    refused(net, path, 'holds a list; expected a dict of tensors')


def test_files_that_are_not_there(tmp_path):
    net = build(1)
    refused(net, tmp_path / 'no.pth', 'looked for a checkpoint at .*/no.pth, but there is no such',
            FileNotFoundError)
    with pytest.raises(FileNotFoundError, match='that is a folder'):
        read_checkpoint(tmp_path)
    refused(net, 's3://a/b.pth', "checkpoint 's3://a/b.pth': expected a path, an http")
    refused(net, 'hf-hub:timm', 'expected hf-hub:OWNER/NAME')
    refused(net, 'https://host/', 'URL that ends in the name of a file')


# Downloads, on this machine alone

@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, '_hub_dir', None)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    return tmp_path / 'hub' / 'checkpoints'


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    """The hub's library as it behaves without a connection and with an empty cache."""

    def offline(*args, **kwargs):
        raise hub.utils.LocalEntryNotFoundError('no connection')

    monkeypatch.setattr(fetch, '_reach', lambda endpoint: None)
    monkeypatch.setattr(hub, 'hf_hub_download', offline)
    monkeypatch.setattr(hub, 'try_to_load_from_cache', lambda *args, **kwargs: None)


def closed_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def placed(message, file):
    """Put ``file`` where the message of an error says."""
    lines = message.splitlines()
    path = lines[lines.index('elsewhere and put it at') + 1].strip()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.replace(file, path)
    return path


def test_url_out_of_reach_says_what_to_do_and_that_works(torch_home, tmp_path):
    source, net = build(1, out_norm_cfg=None), build(2, out_norm_cfg=None)
    url = f'http://127.0.0.1:{closed_port()}/v0/l1-cc3e1ac6.pth?download=true'
    with pytest.raises(ConnectionError) as error:
        load_weights(net, url)
    assert f'download\n  {url}\n' in str(error.value)
    assert "init_cfg=dict(type='Pretrained', checkpoint='/path/to/file')" in str(error.value)
    assert not list(torch_home.iterdir())
    torch.save(as_layout(source), tmp_path / 'mine.pth')
    path = placed(str(error.value), tmp_path / 'mine.pth')
    assert path == str(torch_home / 'l1-cc3e1ac6.pth')
    assert load_weights(net, url).source == path
    assert same(net, source)


@pytest.mark.parametrize('name, folder', [
    ('hf-hub:timm/efficientformer_l1.snap_dist_in1k', 'main'),
    ('hf-hub:timm/efficientformer_l1.snap_dist_in1k@abc', 'abc')])
def test_hub_out_of_reach_says_what_to_do_and_that_works(torch_home, no_hub, tmp_path, name,
                                                         folder):
    source, net = build(1, out_norm_cfg=None), build(2, out_norm_cfg=None)
    with pytest.raises(ConnectionError) as error:
        load_weights(net, name)
    url = ('https://huggingface.co/timm/efficientformer_l1.snap_dist_in1k/resolve/'
           f'{folder}/model.safetensors')
    assert f'download\n  {url}\n' in str(error.value) and 'no connection' in str(error.value)
    save_file(as_layout(source), tmp_path / 'mine')
    placed(str(error.value), tmp_path / 'mine')
    for named in (name, url):
        net = build(2, out_norm_cfg=None)
        load_weights(net, named)
        assert same(net, source)


def test_hub_that_no_one_answers_for_is_given_up_soon(torch_home, monkeypatch):
    monkeypatch.setattr(hub.constants, 'ENDPOINT', f'http://127.0.0.1:{closed_port()}')
    monkeypatch.setattr(hub, 'hf_hub_download', None)
    monkeypatch.setattr(hub, 'try_to_load_from_cache', lambda *args, **kwargs: None)
    refused(build(1), 'hf-hub:a/b', 'refused', ConnectionError)


def test_hub_without_its_library(torch_home, monkeypatch, tmp_path):
    source, net, asked = build(1, out_norm_cfg=None), build(2, out_norm_cfg=None), []
    torch.save(as_layout(source), tmp_path / 'served')

    class Reply(io.BytesIO):
        headers = {}

    def answer(request, timeout):
        asked.append(request.full_url)
        if 'out-of-reach' in request.full_url:
            raise URLError('no connection')
        if not request.full_url.endswith('/efficientformer-l1-300/resolve/v1/pytorch_model.bin'):
            raise HTTPError(request.full_url, 404, 'Not Found', {}, None)
        return Reply((tmp_path / 'served').read_bytes())

    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    monkeypatch.setattr(fetch.urllib.request, 'urlopen', answer)
    for _ in range(2):
        load_weights(net, 'hf-hub:snap-research/efficientformer-l1-300@v1')
        assert same(net, source)
    at = 'https://huggingface.co/snap-research/efficientformer-l1-300/resolve/v1/'
    assert asked == [at + 'model.safetensors', at + 'pytorch_model.bin']
    # A file that is kept stands for its own revision alone.
    refused(net, 'hf-hub:snap-research/efficientformer-l1-300', '404', ConnectionError)
    refused(net, 'hf-hub:a/out-of-reach', r'no connection[^/]*download\n  https://huggingface.co/a/'
            'out-of-reach/resolve/main/model.safetensors', ConnectionError)
    refused(net, 'hf-hub:a/b', 'HTTP Error 404: Not Found', ConnectionError)
    assert len(asked) == 7


def test_hub_tries_safetensors_then_bin(torch_home, no_hub, monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.utils import EntryNotFoundError
    source, net, asked = build(1, out_norm_cfg=None), build(2, out_norm_cfg=None), []

    class Absent(EntryNotFoundError):
        def __init__(self):
            pass

    def download(repo, file, **kwargs):
        asked.append((repo, file))
        if file.endswith('safetensors'):
            raise Absent
        torch.save(as_layout(source), tmp_path / file)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
    load_weights(net, 'hf-hub:snap-research/efficientformer-l1-300')
    assert asked == [('snap-research/efficientformer-l1-300', 'model.safetensors'),
                     ('snap-research/efficientformer-l1-300', 'pytorch_model.bin')]
    assert same(net, source)


@contextmanager
def served(content, asked, wait_s=0.):
    """Serve ``content`` under every name, but for some; yield the URL of the folder."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            time.sleep(wait_s)
            self.send_response(404 if 'absent' in self.path else 200)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            self.wfile.write(content[:-1] if 'short' in self.path else content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f'http://127.0.0.1:{server.server_port}'
    finally:
        server.shutdown()
        server.server_close()


def test_download_is_kept_and_a_short_one_is_not(torch_home, tmp_path):
    source, net, asked = build(1, out_norm_cfg=None), build(2, out_norm_cfg=None), []
    torch.save(as_layout(source), tmp_path / 'served')
    with served((tmp_path / 'served').read_bytes(), asked) as at:
        with pytest.raises(ConnectionError, match=r'ended after \d+ of \d+ bytes'):
            load_weights(net, f'{at}/short.pth')
        with pytest.raises(ConnectionError, match='404'):
            load_weights(net, f'{at}/absent.pth')
        for _ in range(2):
            load_weights(net, f'{at}/l1.pth')
    assert same(net, source)
    assert asked == ['/short.pth', '/absent.pth', '/l1.pth']
    assert [path.name for path in torch_home.iterdir()] == ['l1.pth']
    assert fetch.TIMEOUT_S <= 10


def test_a_download_is_what_its_name_says(torch_home):
    content, asked = b'weights', []
    digest = hashlib.sha256(content).hexdigest()
    with served(content, asked) as at:
        for name in ('l1-00000000.pth', f'l1-{digest[:15]}0.pth.tar'):
            with pytest.raises(ValueError, match=f'SHA-256 starts with {digest[:8]}.*Nothing was'):
                fetch.locate(f'{at}/{name}')
        assert not list(torch_home.iterdir())
        # A hash of any length, a date, and words that are no hash.
        good = (f'l1-{digest[:8]}.pth', f'l1-{digest}.pth.tar', 'l1-20220915.pth', 'l1-cafe.pth',
                'l1-00000000-best.pth')
        for name in good:
            assert fetch.locate(f'{at}/{name}').read_bytes() == content
    assert {path.name for path in torch_home.iterdir()} == {*good}


def test_of_several_processes_one_downloads(torch_home):
    torch_home.mkdir(parents=True)
    (torch_home / '.l1.pth.lock').touch()  # of a process that was killed
    asked = []
    # Threads that open the lock each for itself exclude each other as processes do.
    with served(b'weights', asked, wait_s=.2) as at, ThreadPoolExecutor(4) as pool:
        paths = [*pool.map(lambda _: fetch.locate(f'{at}/l1.pth'), range(4))]
    assert {*paths} == {torch_home / 'l1.pth'}
    assert asked == ['/l1.pth'] and paths[0].read_bytes() == b'weights'
    assert [path.name for path in torch_home.iterdir()] == ['l1.pth']
