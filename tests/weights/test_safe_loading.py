"""Checkpoint files are read as data, whatever they ask for."""
import argparse
import io
import os
import pickle
import runpy
import struct
import sys
import tarfile
import zipfile
from collections import OrderedDict
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.infer import BaseInferencer
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.model import BaseModel, Sequential
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint
from mmseg.apis import init_model
from mmseg.models.necks import FPN
from safetensors.torch import save_file
from support.helpers import ROOT, made_up_table, run_code
from torch import nn

from mmeffformer import EfficientFormer, load_weights
from mmeffformer.datasets import write_ade20k
from mmeffformer.utils.registry import MODELS
from mmeffformer.weights import read_checkpoint, safe_loading
from mmeffformer.weights.compatibility import check_compatible, load_compatible
from mmeffformer.weights.conversion import transfer_backbone, transfer_model
from mmeffformer.weights.safe_loading import check_finite, read_model

TINY = dict(widths=(8, 16, 16, 24), depths=(1, 1, 1, 1), attention_blocks=(0, 0, 0, 1))
CONFIG = ROOT / 'tests/data/semfpn_tiny.py'
SUPERNET = ROOT / 'tests/data/semfpn_super_tiny.py'


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """mmengine loads through the safe reader, in one test."""
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    safe_loading.install()


@pytest.fixture(params=['weights_only', 'SafePickle'])
def unpickler(request, monkeypatch):
    """Run a test with torch's unpickler, and with the one for older versions of torch."""
    if request.param == 'SafePickle':
        monkeypatch.setattr(safe_loading, 'SAFE_GLOBALS_SUPPORTED', False)
    return request.param


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker, function=os.mkdir, *args):
        self.function, self.args = function, args or (str(marker),)

    def __reduce__(self):
        return self.function, self.args


def training(**more):
    """Return a checkpoint as mmengine saves it, of a model with one weight."""
    hub = MessageHub.get_instance('safe_loading')
    hub.update_scalar('train/loss', .5)
    return {**dict(meta=dict(epoch=1, iter=2), state_dict={'weight': torch.ones(1)},
                   message_hub=hub.state_dict()), **more}


def write_archive(path, pickled: bytes):
    """Write a torch file around a pickle made by hand."""
    with zipfile.ZipFile(path, 'w') as file:
        for name, content in {'data.pkl': pickled, 'version': b'3\n'}.items():
            file.writestr(f'archive/{name}', content)


def name(*words) -> bytes:
    return b'c%s\n%s\n' % tuple(word.encode() for word in words)


def text(word: str) -> bytes:
    return b'X' + struct.pack('<I', len(word)) + word.encode()


def attack_in_meta(path, marker):
    torch.save(training(meta=dict(epoch=1, iter=2, extra=[{'a': Runs(marker)}])), path)


def attack_in_hub(path, marker):
    made = training()
    made['message_hub']['log_scalars']['train/loss'].__dict__['extra'] = Runs(marker)
    torch.save(made, path)


def attack_in_weights(path, marker):
    torch.save({'state_dict': {'weight': torch.ones(1), 'extra': Runs(marker)}}, path)


def attack_in_new_protocol(path, marker):
    torch.save(training(optimizer=Runs(marker)), path, pickle_protocol=4)


def attack_in_legacy_file(path, marker):
    torch.save(training(optimizer=Runs(marker)), path, _use_new_zipfile_serialization=False)


def attack_in_bare_pickle(path, marker):
    path.write_bytes(pickle.dumps({'weight': 1, 'extra': Runs(marker)}, protocol=2))


def attack_in_text_pickle(path, marker):
    path.write_bytes(pickle.dumps({'weight': 1, 'extra': Runs(marker)}, protocol=0))


def attack_by_getattr(path, marker):
    """From a method of a class that is expected, to ``exec``."""
    def call(function: bytes, *args: bytes) -> bytes:
        return function + b'(' + b''.join(args) + b'tR'

    def attribute(owner: bytes, word: str) -> bytes:
        return call(name('builtins', 'getattr'), owner, text(word))

    method = attribute(name('mmengine.logging.history_buffer', 'HistoryBuffer'), '__init__')
    builtins = call(attribute(attribute(method, '__globals__'), 'get'), text('__builtins__'))
    execute = call(attribute(builtins, 'get'), text('exec'))
    write_archive(path, b'\x80\x02}' + text('meta') + call(
        execute, text(f'import os; os.mkdir({str(marker)!r})')) + b's.')


def attack_by_another_pickle(path, marker):
    torch.save({'state_dict': Runs(None, pickle.loads, pickle.dumps(Runs(marker)))}, path)


def attack_by_torch_itself(path, marker):
    inner = io.BytesIO()
    torch.save(Runs(marker), inner, _use_new_zipfile_serialization=False)
    torch.save({'state_dict': Runs(None, torch.storage._load_from_bytes, inner.getvalue())}, path)


def attack_by_dotted_name(path, marker):
    write_archive(path, b'\x80\x04}' + text('meta') + text('torch')
                  + text('serialization.os.mkdir') + b'\x93' + text(str(marker)) + b'\x85Rs.')


def attack_by_array_of_objects(path, marker):
    torch.save({'meta': np.array([Runs(marker)], dtype=object)}, path)


ATTACKS = [value for key, value in globals().items() if key.startswith('attack_')]


def refusal(path, load=read_checkpoint) -> str:
    with pytest.raises(ValueError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize('attack', ATTACKS)
def test_code_in_a_file_is_never_run(attack, tmp_path, unpickler):
    for suffix in ('.pth', '.pth.tar', '.safetensors', '.bin'):
        path, marker = tmp_path / f'file{suffix}', tmp_path / 'marker'
        attack(path, marker)
        message = refusal(path)
        assert 'was refused: ' in message or attack in (attack_in_text_pickle,
                                                        attack_by_getattr), message
        assert not marker.exists()


def test_the_name_that_a_file_asks_for_is_reported(tmp_path, unpickler):
    for function, args, expected in ((os.mkdir, ('a',), 'posix.mkdir'), (eval, ('1',), 'eval'),
                                     (nn.Linear, (1, 1), 'torch.nn.modules.linear.Linear')):
        torch.save({'a': Runs(None, function, *args)}, tmp_path / 'a.pth')
        assert f'a.pth was refused: it asks for {expected}. A checkpoint may hold' in refusal(
            tmp_path / 'a.pth').replace('builtins.', '')


def test_the_attacks_are_real(tmp_path):
    for attack in {*ATTACKS} - {attack_in_bare_pickle, attack_in_text_pickle}:
        path, marker = tmp_path / 'file.pth', tmp_path / attack.__name__
        attack(path, marker)
        try:
            torch.load(path, map_location='cpu', weights_only=False)
        except TypeError:  # after the code has run
            pass
        assert marker.is_dir(), attack
    attack_in_text_pickle(path, tmp_path / 'text')
    pickle.loads(path.read_bytes())
    assert (tmp_path / 'text').is_dir()


# Every place that loads a checkpoint

class OneWeight(BaseModel):
    def __init__(self, init_cfg=None):
        super().__init__(init_cfg=init_cfg)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, mode='loss', **kwargs):
        return dict(loss=(self.weight * torch.stack(x)).sum())


class Numbers(BaseDataset):
    def load_data_list(self):
        return [dict(x=torch.ones(1) * i) for i in range(4)]


def toy_runner(work_dir, **options) -> Runner:
    return Runner(**{**dict(
        model=OneWeight(), work_dir=str(work_dir), default_scope='mmengine',
        train_dataloader=dict(dataset=Numbers(), batch_size=1, num_workers=0,
                              sampler=dict(type='DefaultSampler', shuffle=False),
                              collate_fn=dict(type='pseudo_collate')),
        train_cfg=dict(by_epoch=True, max_epochs=2), log_level='ERROR',
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=.1)),
        experiment_name=Path(work_dir).name), **options})


def segmentor() -> nn.Module:
    cfg = Config.fromfile(CONFIG)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.norm_cfg = dict(type='BN')
    return MODELS.build(cfg.model)


def pretrained(path):
    return dict(type='Pretrained', checkpoint=str(path))


PLACES = dict(
    load_weights=lambda path: load_weights(EfficientFormer(TINY), path),
    init_cfg_of_a_backbone=lambda path: EfficientFormer(
        TINY, init_cfg=pretrained(path)).init_weights(),
    init_cfg_of_a_module=lambda path: Sequential(
        nn.Conv2d(1, 1, 1), init_cfg=pretrained(path)).init_weights(),
    init_cfg_of_mmseg=lambda path: FPN([1], 1, 1, init_cfg=pretrained(path)).init_weights(),
    init_cfg_of_a_model=lambda path: OneWeight(pretrained(path)).init_weights(),
    load_checkpoint=lambda path: load_checkpoint(OneWeight(), str(path)),
    runner_load=lambda path: toy_runner(path.parent / 'work').load_checkpoint(str(path)),
    runner_resume=lambda path: toy_runner(path.parent / 'work').resume(str(path)),
    runner_load_from=lambda path: toy_runner(path.parent / 'work', load_from=str(path)).train(),
    init_model=lambda path: init_model(Config.fromfile(CONFIG), str(path), 'cpu'),
    load_compatible=lambda path: load_compatible(OneWeight(), str(path)),
    check_compatible=lambda path: check_compatible(OneWeight(), str(path)),
    read_model=lambda path: read_model(str(path)),
    transfer_model=lambda path: transfer_model(str(path), segmentor()),
    transfer_backbone=lambda path: transfer_backbone(str(path), EfficientFormer(TINY).arch,
                                                     'timm'),
)


@pytest.mark.parametrize('place', PLACES)
def test_no_place_runs_code_in_a_file(place, tmp_path):
    path, marker = tmp_path / 'file.pth', tmp_path / 'marker'
    attack_in_meta(path, marker)
    assert 'was refused: it asks for posix.mkdir' in refusal(path, PLACES[place])
    assert not marker.exists()


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """A data set and a latency table for the tools."""
    folder = tmp_path_factory.mktemp('drawn')
    write_ade20k(folder, train=2, val=1, size=(64, 96), progress=False)
    made_up_table(folder / 'table.json', (64, 96), (16, 32, 48, 48), lambda part: 1.)
    return folder


TOOLS = {
    'train': '{config} --resume {file} --data-root {data} --work-dir {out}',
    'test': '{config} {file} --data-root {data} --work-dir {out}',
    'infer': '{config} {file} {data}/images/validation --out-dir {out}',
    'export': '{config} {file} --to onnx --shape 64 96 --out {out}/a.onnx',
    'convert_checkpoint': '{file} --config {config} --out {out}',
    'slim': '{supernet} {file} --table {data}/table.json --target 50% --data-root {data} '
            '--work-dir {out}',
}


@pytest.mark.parametrize('tool', TOOLS)
def test_tools_report_the_refusal(tool, drawn, tmp_path, monkeypatch):
    path, marker = tmp_path / 'unknown.pth', tmp_path / 'marker'
    attack_in_meta(path, marker)
    arguments = TOOLS[tool].format(config=CONFIG, supernet=SUPERNET, file=path, data=drawn,
                                   out=tmp_path / 'out').split()
    script, = (ROOT / 'tools').rglob(f'{tool}.py')
    monkeypatch.setattr(sys, 'argv', [script.name, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name='__main__')
    assert f'{path} was refused: it asks for posix.mkdir' in str(ended.value)
    assert not marker.exists() and not list(tmp_path.glob('out/*.onnx'))


def test_mmengine_is_changed_by_an_explicit_call_only():
    run_code('from mmengine.runner import CheckpointLoader\n'
             'before = dict(CheckpointLoader._schemes)\n'
             'import mmeffformer\n'
             'assert CheckpointLoader._schemes == before\n'
             'from mmeffformer.weights import safe_loading\n'
             'safe_loading.install()\nsafe_loading.install()\n'
             'assert {*CheckpointLoader._schemes.values()} == {safe_loading.load_from_anywhere}\n'
             'assert {*CheckpointLoader._schemes} == {*before}')


def test_names_that_mmengine_knows_are_read_safely(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    marker, url = tmp_path / 'marker', 'https://no.where/file.pth'
    path = tmp_path / 'checkpoints/file.pth'
    path.parent.mkdir()
    attack_in_meta(path, marker)
    lookups = safe_loading.mmengine_checkpoint
    for lookup in ('get_torchvision_models', 'get_mmcls_models', 'get_deprecated_model_names'):
        monkeypatch.setattr(lookups, lookup, lambda: dict(toy=url))
    monkeypatch.setattr(lookups, 'get_external_models',
                        lambda: {'toy': url, url: 'checkpoints/file.pth'})

    class Bucket:
        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return str(path)

        __exit__ = __init__

    monkeypatch.setattr(safe_loading, 'get_local_path', Bucket)
    for source in (url, 'torchvision://toy', 'modelzoo://toy', 'mmcls://toy', 'open-mmlab://toy',
                   'openmmlab://toy', 's3://bucket/toy', 'petrel://toy', 'cluster:s3://a/toy'):
        with pytest.raises(ValueError, match='was refused: it asks for posix.mkdir'):
            CheckpointLoader.load_checkpoint(source, 'cpu')
    for source, message in {'mmcls://other': "mmcls has no model 'other'",
                            'pavi://toy': 'expected a path, an http',
                            'unknown://toy': 'expected a path, an http'}.items():
        with pytest.raises(ValueError, match=message):
            CheckpointLoader.load_checkpoint(source)
    assert not marker.exists()
    torch.save({'state_dict': {'backbone.a': torch.ones(1), 'head.a': torch.ones(1)}}, path)
    assert CheckpointLoader.load_checkpoint('mmcls://toy') == {'state_dict': {'a': 1.}}
    assert set(CheckpointLoader.load_checkpoint('torchvision://toy')['state_dict']) == {
        'backbone.a', 'head.a'}


# Checkpoints of trainings

def test_a_training_resumes_with_its_log(tmp_path, unpickler):
    work_dir, again_dir = tmp_path / f'first_{unpickler}', tmp_path / f'again_{unpickler}'
    first = toy_runner(work_dir, train_cfg=dict(by_epoch=True, max_epochs=1))
    first.train()
    logged = first.message_hub.get_scalar('train/loss')
    again = toy_runner(again_dir, load_from=str(work_dir / 'epoch_1.pth'), resume=True)
    again.load_or_resume()
    history = again.message_hub.get_scalar('train/loss')
    assert type(history) is HistoryBuffer and history is not logged
    assert np.array_equal(history.data[0], logged.data[0]) and len(history.data[0]) == 4
    assert history.statistics('mean') == logged.mean()
    assert (again.epoch, again.iter) == (1, 4)
    assert torch.equal(again.model.weight, first.model.weight)
    again._has_loaded = True
    again.train()
    # It is saved as mmengine's own class again.
    saved = torch.load(again_dir / 'epoch_2.pth', weights_only=False)
    values = saved['message_hub']['log_scalars']['train/loss'].data[0]
    assert len(values) == 8 and np.array_equal(values[:4], logged.data[0])


def test_logged_values_bring_no_methods(tmp_path, unpickler):
    made = training()
    history = made['message_hub']['log_scalars']['train/loss']
    history.__dict__['update'] = 'mine'
    torch.save(made, tmp_path / 'a.pth')
    read = read_checkpoint(tmp_path / 'a.pth')['message_hub']['log_scalars']['train/loss']
    assert read.update(1.) is None and read.max() == 1.
    assert vars(read).keys() == {'_log_history', '_count_history', 'max_length'}
    assert all(map(callable, HistoryBuffer._statistics_methods.values()))


def test_a_config_in_a_checkpoint_is_not_run(tmp_path):
    """mmengine would execute its text on resuming, or in an inferencer without a config."""
    marker, path = tmp_path / 'marker', str(tmp_path / 'a.pth')
    toy_runner(tmp_path / 'work', train_cfg=dict(by_epoch=True, max_epochs=1)).train()
    made = torch.load(tmp_path / 'work/epoch_1.pth', weights_only=False)
    code = f'import os\nos.mkdir({str(marker)!r})\nmodel = dict()\n'
    made['meta'].update(config=code, cfg=code)
    assert 'cfg' in made['message_hub']['runtime_info']
    made['message_hub']['runtime_info']['cfg'] = code
    torch.save(made, path)
    runner = toy_runner(tmp_path / 'again')
    runner.resume(path)
    assert runner.iter == 4 and runner.message_hub.get_info('cfg') != code
    with pytest.raises(ValueError, match='Cannot find the config in the checkpoint'):
        BaseInferencer._init_model(None, ConfigDict(), path)
    assert not marker.exists()


def test_optimizers_are_read(tmp_path, unpickler):
    weight = nn.Parameter(torch.ones(3))
    wrapper = OptimWrapper(torch.optim.AdamW([weight], amsgrad=True))
    wrapper.update_params((weight ** 2).sum())
    torch.save(training(optimizer=wrapper.state_dict()), tmp_path / 'a.pth')
    read = read_checkpoint(tmp_path / 'a.pth')['optimizer']
    other = OptimWrapper(torch.optim.AdamW([nn.Parameter(torch.ones(3))], amsgrad=True))
    other.load_state_dict(read)
    for key, value in wrapper.state_dict()['state'][0].items():
        assert torch.equal(other.state_dict()['state'][0][key], value)


@pytest.mark.parametrize('key', ['state_dict', 'ema_state_dict', 'model'])
def test_weights_that_are_not_finite_are_refused(tmp_path, key):
    path = tmp_path / 'a.pth'
    torch.save(training(**{key: {'weight': torch.tensor([float('nan')])}}), path)
    for place in ('load_checkpoint', 'runner_resume', 'init_cfg_of_a_model'):
        assert 'has 1 tensors with values that are NaN or infinite, first weight' in refusal(
            path, PLACES[place])


def test_masks_may_be_infinite_and_parameters_of_any_name_may_not():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries = nn.Parameter(torch.zeros(2))
            self.norm = nn.BatchNorm2d(2)
            self.register_buffer('mask', torch.full((2, 2), -float('inf')).triu(1))
            self.register_buffer('bias', torch.full((2,), -float('inf')))

    model = Model()
    check_finite(model.state_dict(), 'a.pth', model)
    for key, bad in (('queries', float('nan')), ('norm.running_var', float('inf')),
                     ('norm.weight', float('nan'))):
        with pytest.raises(ValueError, match=f'checkpoint a.pth has 1 tensors .* first {key}'):
            check_finite({**model.state_dict(), key: torch.tensor([1., bad])}, 'a.pth', model)
    state = {'attn.mask': model.mask, 'attn.attn_bias': model.bias, 'steps': torch.tensor(3)}
    check_finite({'state_dict': state}, 'a.pth')  # of an unknown model
    with pytest.raises(ValueError, match='first norm.running_mean'):
        check_finite({'state_dict': {**state, 'norm.running_mean': model.bias}}, 'a.pth')


# Plain data, and other files

def everything(zipped):
    base = torch.arange(12.)
    made = training(
        n=np.float64(.5), array=np.arange(6).reshape(2, 3).T, flag=np.array([True]),
        half=torch.ones(2).bfloat16(), size=torch.Size([1, 2]), device=torch.device('cpu'),
        dtype=torch.float16, parameter=nn.Parameter(base[:3]), view=base.view(3, 4).t(),
        part=base[3:5], scalar=torch.tensor(3), empty=torch.zeros(0, 3),
        flags=torch.tensor([True, False]), args=argparse.Namespace(lr=.1),
        ordered=OrderedDict(a=1), set={1, 2}, bytes=b'a\xff', bytearray=bytearray(b'a'),
        slice=slice(1, None), norm=nn.BatchNorm2d(2).state_dict(), number=1 + 2j,
        complex=torch.ones(2, dtype=torch.complex64), sparse=torch.eye(2).to_sparse())
    if zipped and hasattr(torch, 'uint16'):  # torch reads them from zip files only
        made.update(uint16=torch.ones(3, dtype=torch.uint16),
                    float8=torch.ones(3).to(torch.float8_e4m3fn))
    return made


@pytest.mark.parametrize('zipped', [True, False])
def test_plain_data_is_read_as_it_was_saved(tmp_path, zipped, unpickler):
    expected, path = everything(zipped), tmp_path / 'a.pth'
    torch.save(expected, path, _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(path)
    assert read.keys() == expected.keys()
    for key, value in expected.items():
        if key == 'float8':
            assert torch.equal(read[key].float(), value.float())
        elif isinstance(value, torch.Tensor):
            torch.testing.assert_close(read[key], value.detach(), rtol=0, atol=0)
        elif isinstance(value, np.ndarray):
            assert np.array_equal(read[key], value) and read[key].dtype == value.dtype
        elif key not in ('message_hub', 'state_dict', 'norm'):
            assert read[key] == value and type(read[key]) is type(value), key
    assert read['norm']._metadata == expected['norm']._metadata
    assert read['view'].data_ptr() == read['parameter'].data_ptr()  # one storage, as before


def test_safetensors_with_a_header_of_any_length(tmp_path):
    # The file starts with the length, whose low byte may be that of a pickle.
    path, state = tmp_path / 'a', {'a': torch.arange(3.)}
    save_file(state, path, {'pad': ''})
    length = int.from_bytes(path.read_bytes()[:8], 'little')
    save_file(state, path, {'pad': ' ' * ((0x80 - length) % 0x100)})
    assert path.read_bytes()[:1] == b'\x80'
    assert torch.equal(read_checkpoint(path)['a'], state['a'])


@pytest.mark.parametrize('kind', ['zip', 'legacy', 'safetensors'])
def test_truncated_files_are_named(tmp_path, kind, unpickler):
    path = tmp_path / 'a.pth'
    if kind == 'safetensors':
        save_file({'a': torch.ones(100)}, path)
    else:
        torch.save({'a': torch.ones(100)}, path, _use_new_zipfile_serialization=kind == 'zip')
    content = path.read_bytes()
    for end in np.linspace(16, len(content) - 1, 20).astype(int):
        path.write_bytes(content[:end])
        message, library = refusal(path), 'safetensors' if kind == 'safetensors' else 'torch'
        assert f'is a broken or truncated {library} file ({end} bytes)' in message or (
            kind == 'legacy' and 'was refused: it asks for torch.' in message)


def test_changed_bits_are_found(tmp_path, unpickler):
    path = tmp_path / 'a.pth'
    torch.save({'a': torch.ones(1000)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack('<f', 1.) * 100) + 50] ^= 1
    path.write_bytes(content)
    assert 'is a broken or truncated torch file' in refusal(path)


def test_torchscript_is_refused(tmp_path, unpickler):
    path = tmp_path / 'a.pth'
    torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1)), path)
    assert 'was refused: it is a TorchScript program' in refusal(path)


def test_tar_files_are_refused(tmp_path, unpickler):
    """torch would unpack these; one may start like a pickle."""
    path = tmp_path / 'a.pth'
    with tarfile.open(path, 'w', format=tarfile.GNU_FORMAT, encoding='latin1') as file:
        for member in ('\x80\x02storages', 'storages', 'tensors', 'pickle'):
            file.addfile(tarfile.TarInfo(member), io.BytesIO())
    assert path.read_bytes()[:2] == b'\x80\x02'
    assert 'is a broken or truncated torch file' in refusal(path)


def test_other_files_are_named(tmp_path, unpickler):
    path = tmp_path / 'a.pth'
    for content, message in (
            (b'', 'is empty (0 bytes); expected a torch checkpoint'),
            (b'\x89PNG\r\n', "of an unknown format (it starts with b'\\x89PNG"),
            (b'<!DOCTYPE html>', 'is a web page'),
            (b'version https://git-lfs.github.com', 'is a Git LFS pointer'),
            (pickle.dumps({'a': 1}, protocol=2), 'broken or truncated torch file')):
        path.write_bytes(content)
        assert message in refusal(path)
    np.savez(tmp_path / 'b.npz', a=1)
    assert 'broken or truncated torch file' in refusal(tmp_path / 'b.npz')
    for content, kind in product(([1], torch.ones(1)), (True, False)):
        torch.save(content, path, _use_new_zipfile_serialization=kind)
        assert f'holds a {type(content).__name__}; expected a dict of tensors' in refusal(path)
    with pytest.raises(FileNotFoundError, match='looked for .*no.pth, but there is no such file'):
        read_checkpoint(tmp_path / 'no.pth')
    with pytest.raises(FileNotFoundError, match='that is a folder'):
        read_checkpoint(tmp_path)
