"""Checkpoints from strangers: refused wherever one is loaded, with the reason, and not run."""
import argparse
import io
import json
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
from mmeffformer.apis import inference
from mmeffformer.apis.inference import load_drawer
from mmeffformer.datasets import SEG_CLASSES, write_ade20k
from mmeffformer.deploy.export import export_checkpoint
from mmeffformer.search.search import load_compatible as load_in_search
from mmeffformer.utils.registry import MODELS
from mmeffformer.weights import door, pickles, read_checkpoint
from mmeffformer.weights.compatibility import check_compatible, load_compatible, read_model
from mmeffformer.weights.conversion import transfer_backbone, transfer_model

TINY = dict(widths=(8, 16, 16, 24), depths=(1, 1, 1, 1), attention_blocks=(0, 0, 0, 1))
CONFIG = ROOT / 'tests/data/semfpn_tiny.py'
SUPERNET = ROOT / 'tests/data/semfpn_super_tiny.py'


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker, function=os.mkdir, *args):
        self.function, self.args = function, args or (str(marker),)

    def __reduce__(self):
        return self.function, self.args


def training(**more):
    """What mmengine saves, of a model that has one weight."""
    hub = MessageHub.get_instance('hostile')
    hub.update_scalar('train/loss', .5)
    return {**dict(meta=dict(epoch=1, iter=2), state_dict={'weight': torch.ones(1)},
                   message_hub=hub.state_dict()), **more}


def archive(path, pickled: bytes, storages=(), **entries):
    """Write a torch file around a pickle made by hand."""
    with zipfile.ZipFile(path, 'w') as file:
        for name, content in {'data.pkl': pickled, 'version': b'3\n', **entries,
                              **{f'data/{i}': data for i, data in enumerate(storages)}}.items():
            file.writestr(f'archive/{name}', content)


def names(*words) -> bytes:
    return b'c%s\n%s\n' % tuple(word.encode() for word in words)


def text(word: str) -> bytes:
    return b'X' + struct.pack('<I', len(word)) + word.encode()


def in_meta(path, marker):
    torch.save(training(meta=dict(epoch=1, iter=2, extra=[{'a': Runs(marker)}])), path)


def in_hub(path, marker):
    made = training()
    made['message_hub']['log_scalars']['train/loss'].__dict__['extra'] = Runs(marker)
    torch.save(made, path)


def in_weights(path, marker):
    torch.save({'state_dict': {'weight': torch.ones(1), 'extra': Runs(marker)}}, path)


def in_new_protocol(path, marker):
    torch.save(training(optimizer=Runs(marker)), path, pickle_protocol=4)


def in_legacy(path, marker):
    torch.save(training(optimizer=Runs(marker)), path, _use_new_zipfile_serialization=False)


def in_bare_pickle(path, marker):
    path.write_bytes(pickle.dumps({'weight': 1, 'extra': Runs(marker)}, protocol=2))


def in_text_pickle(path, marker):
    path.write_bytes(pickle.dumps({'weight': 1, 'extra': Runs(marker)}, protocol=0))


def called(function: bytes, *args: bytes) -> bytes:
    return function + b'(' + b''.join(args) + b'tR'


def by_getattr(path, marker):
    """From a method of a class that is expected, to all that Python can do."""
    def attribute(of: bytes, name: str) -> bytes:
        return called(names('builtins', 'getattr'), of, text(name))

    method = attribute(names('mmengine.logging.history_buffer', 'HistoryBuffer'), '__init__')
    builtins = called(attribute(attribute(method, '__globals__'), 'get'), text('__builtins__'))
    execute = called(attribute(builtins, 'get'), text('exec'))
    archive(path, b'\x80\x02}' + text('meta') + called(
        execute, text(f'import os; os.mkdir({str(marker)!r})')) + b's.')


def by_the_result_of_getattr(path, marker):
    archive(path, b'\x80\x02}' + text('meta') + names('builtins', 'getattr') + b'('
            + names('torch', 'Size') + text('count') + b'tR(' + text(str(marker)) + b'tRs.')


def by_another_pickle(path, marker):
    inner = pickle.dumps(Runs(marker))
    torch.save({'state_dict': Runs(None, pickle.loads, inner)}, path)


def by_torch_itself(path, marker):
    inner = io.BytesIO()
    torch.save(Runs(marker), inner, _use_new_zipfile_serialization=False)
    torch.save({'state_dict': Runs(None, torch.storage._load_from_bytes, inner.getvalue())}, path)


def by_a_dotted_name(path, marker):
    archive(path, b'\x80\x04}' + text('meta') + text('torch') + text('serialization.os.mkdir')
            + b'\x93' + text(str(marker)) + b'\x85Rs.')


def by_the_state_of_a_class(path, marker):
    archive(path, b'\x80\x02}' + text('meta') + names('torch.nn.parameter', 'Parameter') + b'N}'
            + text('__setstate__') + names('builtins', 'getattr') + b's\x86bs.')


def by_an_array_of_objects(path, marker):
    torch.save({'meta': np.array([Runs(marker)], dtype=object)}, path)


def by_an_extension(path, marker):
    archive(path, b'\x80\x02}' + text('meta') + b'\x82\x01s.')


ATTACKS = [value for key, value in globals().items() if key.startswith(('in_', 'by_'))]
SUFFIXES = ('.pth', '.pth.tar', '.safetensors', '.bin')


def refusal(path, load=read_checkpoint) -> str:
    with pytest.raises(ValueError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


# Every place that loads one

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


def segmentor(config=CONFIG) -> nn.Module:
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.norm_cfg = dict(type='BN')
    return MODELS.build(cfg.model)


def pretrained(path):
    return dict(type='Pretrained', checkpoint=str(path))


def exported(path):
    export_checkpoint(Config.fromfile(CONFIG), str(path), str(path.parent / 'a.onnx'), 'onnx',
                      'model', (64, 96))


PLACES = dict(
    load_weights=lambda path: load_weights(EfficientFormer(TINY), path),
    our_init_cfg=lambda path: EfficientFormer(TINY, init_cfg=pretrained(path)).init_weights(),
    init_cfg_of_a_module=lambda path: Sequential(
        nn.Conv2d(1, 1, 1), init_cfg=pretrained(path)).init_weights(),
    init_cfg_of_mmseg=lambda path: FPN([1], 1, 1, init_cfg=pretrained(path)).init_weights(),
    init_cfg_of_a_model=lambda path: OneWeight(pretrained(path)).init_weights(),
    load_checkpoint=lambda path: load_checkpoint(OneWeight(), str(path)),
    runner_load=lambda path: toy_runner(path.parent / 'work').load_checkpoint(str(path)),
    runner_resume=lambda path: toy_runner(path.parent / 'work').resume(str(path)),
    runner_load_from=lambda path: toy_runner(path.parent / 'work', load_from=str(path)).train(),
    init_model=lambda path: init_model(Config.fromfile(CONFIG), str(path), 'cpu'),
    infer=lambda path: load_drawer(Config.fromfile(CONFIG), str(path)),
    export=exported,
    search=lambda path: load_in_search(OneWeight(), str(path)),
    test_and_resume=lambda path: check_compatible(OneWeight(), str(path)),
    record=lambda path: read_model(str(path)),
    convert_model=lambda path: transfer_model(str(path), segmentor()),
    convert_backbone=lambda path: transfer_backbone(str(path), EfficientFormer(TINY).arch,
                                                    'timm'),
)


@pytest.mark.parametrize('place', PLACES)
def test_no_place_runs_what_a_file_asks_for(place, tmp_path):
    attacks = ATTACKS if place in ('record', 'load_checkpoint') else (
        in_meta, by_getattr)
    for attack, suffix in product(attacks, SUFFIXES if place == 'record' else SUFFIXES[:1]):
        path, marker = tmp_path / f'{attack.__name__}{suffix}', tmp_path / 'marker'
        attack(path, marker)
        said = refusal(path, PLACES[place])
        assert 'was refused: it ' in said or attack is in_text_pickle, said
        assert not marker.exists(), attack


def test_the_attacks_are_real(tmp_path):
    """What they do is done where a file is read as Python reads pickles."""
    for attack in (in_meta, in_hub, in_weights, in_new_protocol, in_legacy, by_getattr,
                   by_another_pickle, by_torch_itself, by_a_dotted_name, by_an_array_of_objects):
        path, marker = tmp_path / 'file.pth', tmp_path / attack.__name__
        attack(path, marker)
        try:
            torch.load(path, map_location='cpu', weights_only=False)
        except TypeError:  # after it has run
            pass
        assert marker.is_dir(), attack
    in_text_pickle(path, tmp_path / 'text')
    pickle.loads(path.read_bytes())
    assert (tmp_path / 'text').is_dir()


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


def command(tool, drawn, tmp_path, file):
    return TOOLS[tool].format(config=CONFIG, supernet=SUPERNET, file=file, data=drawn,
                              out=tmp_path / 'out').split()


@pytest.mark.parametrize('tool', TOOLS)
def test_tools_end_with_the_reason(tool, drawn, tmp_path, monkeypatch):
    path, marker = tmp_path / 'stranger.pth', tmp_path / 'marker'
    in_meta(path, marker)
    monkeypatch.setattr(sys, 'argv', [f'{tool}.py', *command(tool, drawn, tmp_path, path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / f'tools/{tool}.py'), run_name='__main__')
    assert f'{path} was refused: it asks for posix.mkdir' in str(ended.value)
    assert not marker.exists() and not list(tmp_path.glob('out/*.onnx'))


def test_importing_is_enough(tmp_path):
    """As mmdet's own tools do for ``custom_imports``, and as a program of one's own does."""
    path, marker = tmp_path / 'stranger.pth', tmp_path / 'marker'
    in_meta(path, marker)
    code = ('import sys, mmengine, torch; '
            'mmengine.Config(dict(custom_imports=dict(imports=["mmeffformer"]))); '
            'mmengine.utils.import_modules_from_strings(["mmeffformer"]); '
            'mmengine.runner.load_checkpoint(torch.nn.Linear(1, 1), sys.argv[1])')
    printed = run_code(code, path, expect=1)
    assert f'{path} was refused: it asks for posix.mkdir' in printed
    assert not marker.exists()


# mmengine

def test_every_name_goes_through_the_door(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    marker, url = tmp_path / 'marker', 'https://no.where/file.pth'
    path = tmp_path / 'checkpoints/file.pth'
    path.parent.mkdir()
    in_meta(path, marker)
    known = dict(toy=url)
    for name in ('get_torchvision_models', 'get_mmcls_models', 'get_deprecated_model_names'):
        monkeypatch.setattr(door.mmengine, name, lambda: known)
    monkeypatch.setattr(door.mmengine, 'get_external_models',
                        lambda: {'toy': url, url: 'checkpoints/file.pth'})

    class Bucket:
        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return str(path)

        __exit__ = __init__

    monkeypatch.setattr(door, 'get_local_path', Bucket)
    for name in (url, 'torchvision://toy', 'modelzoo://toy', 'mmcls://toy', 'open-mmlab://toy',
                 'openmmlab://toy', 's3://bucket/toy', 'petrel://toy', 'cluster:s3://bucket/toy'):
        with pytest.raises(ValueError, match='was refused: it asks for posix.mkdir'):
            CheckpointLoader.load_checkpoint(name, 'cpu')
    for name, said in {'mmcls://other': 'mmcls has no model of that name',
                       'pavi://toy': 'expected a path, an http',
                       'unknown://toy': 'expected a path, an http'}.items():
        with pytest.raises(ValueError, match=said):
            CheckpointLoader.load_checkpoint(name)
    assert not marker.exists()
    torch.save({'state_dict': {'backbone.a': torch.ones(1), 'head.a': torch.ones(1)}}, path)
    assert CheckpointLoader.load_checkpoint('mmcls://toy') == {'state_dict': {'a': 1.}}
    assert set(CheckpointLoader.load_checkpoint('torchvision://toy')['state_dict']) == {
        'backbone.a', 'head.a'}
    door.install()
    assert {*CheckpointLoader._schemes.values()} == {door.load_from_anywhere}


def test_a_training_goes_on_with_what_it_logged(tmp_path):
    first = toy_runner(tmp_path / 'first', train_cfg=dict(by_epoch=True, max_epochs=1))
    first.train()
    logged = first.message_hub.get_scalar('train/loss')
    again = toy_runner(tmp_path / 'again', load_from=str(tmp_path / 'first/epoch_1.pth'),
                       resume=True)
    again.load_or_resume()
    history = again.message_hub.get_scalar('train/loss')
    assert type(history) is HistoryBuffer and history is not logged
    assert np.array_equal(history.data[0], logged.data[0]) and len(history.data[0]) == 4
    assert (again.epoch, again.iter) == (1, 4)
    assert torch.equal(again.model.weight, first.model.weight)
    again._has_loaded = True
    again.train()
    # As it is pickled, it is mmengine's own again.
    saved = torch.load(tmp_path / 'again/epoch_2.pth', weights_only=False)
    values = saved['message_hub']['log_scalars']['train/loss'].data[0]
    assert len(values) == 8 and np.array_equal(values[:4], logged.data[0])


def test_logged_values_bring_no_methods(tmp_path):
    made = training()
    history = made['message_hub']['log_scalars']['train/loss']
    history.__dict__['update'] = 'mine'
    torch.save(made, tmp_path / 'a.pth')
    read = read_checkpoint(tmp_path / 'a.pth')['message_hub']['log_scalars']['train/loss']
    assert read.update(1.) is None and read.max() == 1.
    assert vars(read).keys() == {'_log_history', '_count_history', 'max_length'}
    assert all(map(callable, HistoryBuffer._statistics_methods.values()))


@pytest.mark.parametrize('change', [
    dict(_log_history=np.zeros((2, 2))), dict(_log_history=np.zeros(7)), dict(max_length=-1),
    dict(max_length='many'), dict(_log_history=[1.]), dict(_count_history=None)])
def test_broken_logged_values_are_refused(tmp_path, change):
    made = training()
    made['message_hub']['log_scalars']['train/loss'].__dict__.update(change)
    torch.save(made, tmp_path / 'a.pth')
    assert 'is a broken or truncated torch file' in refusal(tmp_path / 'a.pth')


def test_a_config_in_a_checkpoint_is_not_run(tmp_path):
    """A mere text, which mmengine executes when it resumes, or where an inferencer has none."""
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


@pytest.mark.parametrize('key, value', [
    ('state_dict', float('nan')), ('ema_state_dict', float('inf')), ('model', float('nan'))])
def test_weights_that_are_not_finite_are_refused(tmp_path, key, value):
    path = tmp_path / 'a.pth'
    torch.save(training(**{key: {'weight': torch.tensor([value])}}) if key != 'state_dict' else
               {key: {'weight': torch.tensor([value])}}, path)
    for place in ('load_checkpoint', 'runner_resume', 'init_cfg_of_a_model'):
        assert 'has 1 tensors with values that are NaN or infinite, first weight' in refusal(
            path, PLACES[place])


def test_optimizers_and_schedules_are_read(tmp_path):
    weight = nn.Parameter(torch.ones(3))
    wrapper = OptimWrapper(torch.optim.AdamW([weight], amsgrad=True))
    wrapper.update_params((weight ** 2).sum())
    torch.save(training(optimizer=wrapper.state_dict()), tmp_path / 'a.pth')
    read = read_checkpoint(tmp_path / 'a.pth')['optimizer']
    other = OptimWrapper(torch.optim.AdamW([nn.Parameter(torch.ones(3))], amsgrad=True))
    other.load_state_dict(read)
    for key, value in wrapper.state_dict()['state'][0].items():
        assert torch.equal(other.state_dict()['state'][0][key], value)


# Plain data, and what is none

def everything():
    base = torch.arange(12.)
    made = training(
        n=np.float64(.5), array=np.arange(6).reshape(2, 3).T, half=torch.ones(2).bfloat16(),
        size=torch.Size([1, 2]), device=torch.device('cpu'), dtype=torch.float16,
        parameter=nn.Parameter(base[:3]), view=base.view(3, 4).t(), part=base[3:5],
        scalar=torch.tensor(3), empty=torch.zeros(0, 3), flags=torch.tensor([True, False]),
        args=argparse.Namespace(lr=.1), ordered=OrderedDict(a=1), set={1, 2}, bytes=b'a\xff',
        none=b'', slice=slice(1, None), large=2 ** 70, norm=nn.BatchNorm2d(2).state_dict(),
        complex=torch.ones(2, dtype=torch.complex64))
    if hasattr(torch, 'uint16'):
        made.update(uint16=torch.ones(3, dtype=torch.uint16),
                    float8=torch.ones(3).to(torch.float8_e4m3fn))
    return made


@pytest.mark.parametrize('protocol, zipped', product((2, 4), (True, False)))
def test_plain_data_is_read_as_torch_reads_it(tmp_path, protocol, zipped):
    expected, path = everything(), tmp_path / 'a.pth'
    torch.save(expected, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(path)
    assert read.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert (read[key].dtype, read[key].stride()) == (value.dtype, value.stride())
            torch.testing.assert_close(read[key], value.detach(), rtol=0, atol=0)
        elif isinstance(value, np.ndarray):
            assert np.array_equal(read[key], value) and read[key].dtype == value.dtype
        elif key not in ('message_hub', 'state_dict', 'norm'):
            assert read[key] == value and type(read[key]) is type(value), key
    assert read['norm']._metadata == expected['norm']._metadata
    assert read['view'].data_ptr() == read['parameter'].data_ptr()  # one storage, as before
    torch.save(read, path)
    assert torch.load(path, weights_only=False)['args'] == expected['args']


class Special(torch.Tensor):
    pass


@pytest.mark.parametrize('make, said', [
    (lambda: torch.empty(2, device='meta'), '_rebuild_meta_tensor_no_storage'),
    (lambda: torch.eye(2).to_sparse(), '_rebuild_sparse_tensor'),
    (lambda: torch.quantize_per_tensor(torch.ones(2), 1., 0, torch.qint8), '_rebuild_qtensor'),
    (lambda: torch.ones(2).as_subclass(Special), 'Special'),
    (lambda: nn.Linear(1, 1), 'Linear'),
    (lambda: np.array(['a']), "numpy.dtype 'U1'"),
    (lambda: np.zeros(1, [('a', 'f4')]), "numpy.dtype 'V4'"),
    (lambda: torch.zeros(1).expand(10 ** 6, 10 ** 6),
     r'a tensor of shape \(1000000, 1000000\) .*, for which there are 1 elements'),
    (lambda: Path('a'), 'pathlib'),
], ids=['meta', 'sparse', 'quantised', 'subclass', 'module', 'texts', 'fields', 'expanded',
        'path'])
@pytest.mark.parametrize('zipped', [True, False])
def test_other_than_plain_tensors_are_refused(tmp_path, make, said, zipped):
    path = tmp_path / 'a.pth'
    torch.save({'a': make()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=f'was refused: it (asks for|has).*{said}'):
        read_checkpoint(path)


# Bombs and lies

def zipped_again(path, change, **options):
    """Write a torch file's entries anew; ``change`` gets the open archive before it is closed."""
    with zipfile.ZipFile(path) as old:
        entries = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, 'w', **options) as new:
        for name, content in entries.items():
            new.writestr(name, content)
        change(new)


def is_data(info):
    return info.filename.endswith('data/0')


def test_compressed_files_are_refused(tmp_path):
    path = tmp_path / 'bomb.pth'
    torch.save({'a': torch.zeros(1 << 22)}, path)
    zipped_again(path, lambda new: None, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 16
    assert 'compressed' in refusal(path) and 'zip bomb' in refusal(path)


def lies(entry, **values):
    vars_of = {key: getattr(entry, key) for key in entry.__slots__ if hasattr(entry, key)}
    made = zipfile.ZipInfo(entry.filename)
    for key, value in {**vars_of, **values}.items():
        setattr(made, key, value)
    return made


@pytest.mark.parametrize('change, said', [
    (lambda new: new.filelist.append(lies(new.filelist[0], filename='archive/data/9')),
     'within another'),
    (lambda new: new.filelist.append(lies(new.filelist[-1])), 'twice'),
    (lambda new: new.filelist.append(lies(
        new.filelist[-1], filename='archive/data/9', file_size=1 << 40, compress_size=1 << 40,
        header_offset=new.filelist[-1].header_offset + 999)), 'ends behind the file'),
    (lambda new: new.writestr('archive/constants.pkl', b''), 'TorchScript'),
    (lambda new: new.writestr('archive/code/a.py', b''), 'TorchScript'),
    (lambda new: new.writestr('other/data.pkl', b''), 'archive of something else'),
    (lambda new: new.writestr('archive/byteorder', b'big'), 'twice|big-endian'),
    (lambda new: setattr(new, 'comment', b'PK\5\6'), 'it has no end'),
])
def test_zip_archives_that_lie_are_refused(tmp_path, change, said):
    path = tmp_path / 'archive.pth'
    torch.save({'a': torch.ones(9)}, path)
    zipped_again(path, change)
    with pytest.raises(ValueError, match=f'archive.pth (was refused|is a broken).*({said})'):
        read_checkpoint(path)


def test_torchscript_is_refused(tmp_path):
    path = tmp_path / 'a.pth'
    torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1)), path)
    assert 'was refused: it is a TorchScript program' in refusal(path)


def test_every_bit_counts(tmp_path):
    path = tmp_path / 'a.pth'
    torch.save(training(), path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        places = [info.header_offset + 30 + len(info.filename)
                  + struct.unpack('<H', content[info.header_offset + 28:][:2])[0]
                  for info in file.infolist() if info.file_size]
    assert len(places) >= 4
    for at in places:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])
        said = refusal(path)
        assert 'is a broken or truncated torch file' in said and 'Bad CRC-32' in said


@pytest.mark.parametrize('zipped', [True, False])
def test_cut_anywhere_is_told(tmp_path, zipped):
    path = tmp_path / 'a.pth'
    torch.save(training(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for end in np.linspace(1, len(content) - 1, 40).astype(int):
        path.write_bytes(content[:end])
        said = refusal(path)
        assert 'broken or truncated' in said or end < 5


def storage(count: int, kind: str = 'FloatStorage', view=b'') -> bytes:
    """A persistent id of storage 0, which claims to have ``count`` elements."""
    return (b'(' + text('storage') + names('torch', kind) + text('0') + text('cpu') + b'\x8a\x08'
            + struct.pack('<q', count) + view + b'tQ')


def tensor(count: int, offset: int = 0, shape: int = 1, stride: int = 1, view=b'') -> bytes:
    number = [b'\x8a\x08' + struct.pack('<q', value) for value in (offset, shape, stride)]
    return (names('torch._utils', '_rebuild_tensor_v2') + b'(' + storage(count, view=view)
            + number[0] + number[1] + b'\x85' + number[2] + b'\x85\x89' + b'NtR')


HUGE = 1 << 50


@pytest.mark.parametrize('made, said', [
    (tensor(2, shape=2), None),
    (tensor(HUGE), r'a storage of 1,125,\S+ x torch.float32, for which there are 8 bytes'),
    (tensor(3), 'for which there are 8 bytes'),
    (tensor(-1), 'negative'),
    (tensor(2, shape=HUGE, stride=0), 'for which there are 2 elements'),
    (tensor(2, shape=3), 'for which there are 2 elements'),
    (tensor(2, shape=2, stride=2), 'for which there are 2 elements'),
    (tensor(2, offset=2), 'for which there are 2 elements'),
    (tensor(2, offset=-1), 'negative'),
    (tensor(2, shape=-2, stride=-2), 'negative'),
    (tensor(2) + b'}' + text('a') + b'Ksb', None),
])
def test_tensors_that_claim_more_than_there_is(tmp_path, made, said):
    path = tmp_path / 'a.pth'
    archive(path, b'\x80\x02}' + text('a') + made + b's.', [struct.pack('<2f', 1, 2)])
    if said is None and b'Ksb' not in made:
        assert read_checkpoint(path)['a'].tolist() == [1, 2]
    else:
        with pytest.raises(ValueError, match=said):
            read_checkpoint(path)


def legacy(path, pickled: bytes, keys=('0',), storages=b''):
    heads = (0x1950a86a20f9469cfc6c, 1001, dict(little_endian=True))
    path.write_bytes(b''.join(pickle.dumps(head, protocol=2) for head in heads) + pickled
                     + pickle.dumps(list(keys), protocol=2) + storages)


def test_old_files_that_claim_more_than_there_is(tmp_path):
    path = tmp_path / 'a.pth'
    content = struct.pack('<q2f', 2, 1, 2)

    def pickled(count, **options):
        return b'\x80\x02}' + text('a') + tensor(count, view=b'N', **options) + b's.'

    legacy(path, pickled(2, shape=2), storages=content)
    assert read_checkpoint(path)['a'].tolist() == [1, 2]
    for made, said in (
            (dict(pickled=pickled(HUGE)), 'claims to have storages of 4,503,'),
            (dict(pickled=pickled(2)), 'broken or truncated'),
            (dict(pickled=pickled(2), storages=content[:-1]), 'is cut off'),
            (dict(pickled=pickled(1), storages=content), 'has 2 elements, not 1'),
            (dict(pickled=pickled(2), keys=(), storages=content), 'not those of the tensors'),
            (dict(pickled=pickled(2, shape=HUGE, stride=0), storages=content), '2 elements')):
        legacy(path, **made)
        assert said in refusal(path)


def test_old_tar_files_are_refused(tmp_path):
    """torch unpacks these, whatever they hold; one may start like a pickle."""
    path = tmp_path / 'a.pth'
    with tarfile.open(path, 'w', format=tarfile.GNU_FORMAT, encoding='latin1') as file:
        for name in ('\x80\x02storages', 'storages', 'tensors', 'pickle'):
            file.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert path.read_bytes()[:2] == b'\x80\x02'
    assert 'is a broken or truncated torch file' in refusal(path)


def nested(count: int, opening=b']', closing=b'a') -> bytes:
    return opening * count + closing * (count - 1)


@pytest.mark.parametrize('made, said', [
    (nested(10 ** 5), 'nests containers'),
    (b')' + b'\x85' * 10 ** 5, 'nests containers'),
    (b'}q\x00' + text('state_dict') + b'h\x00s', 'nests containers'),  # in itself
    (b'Nq\x000' + b''.join(b'h%ch%c\x86q%c0' % (i, i, i + 1) for i in range(40)) + b'h\x28',
     'holds more than 10,000,000 items'),
    (b'})' + b'\x85' * 10 ** 5 + b'Ns', 'a tuple as a key'),
    (b'}Nr\xff\xff\xff\xff' + b'Ns', None),  # a place in the memo
    (text('a' * 1000) + b'q\x00' + (names('_codecs', 'encode') + b'h\x00' + text('latin1')
                                    + b'\x86R') * 2000, 'makes more data than the file has'),
    (b'\x8b' + struct.pack('<i', 100) + b'\x7f' * 100, 'more than 128 bits'),
    (b']' * 2000, 'has more than 1,000 instructions'),
    (b'\x8e' + struct.pack('<Q', 1 << 62), 'broken or truncated'),
    (b'(Rh\x63', 'broken or truncated'),
    (b'(i__main__\nA\n', 'the instruction INST'),
    (b']}b', 'gives a state to a list'),
    (b'NK\x01a', 'appends to a NoneType'),
    (names('torch', 'float32') + b')R', 'calls a dtype'),
    (names('torch.nn.parameter', 'Parameter') + b')R', 'in a way that torch never saves'),
    (b'(' + text('module') + names('torch', 'Size') + text('a') + text('b') + b'NtQ',
     "asks for a 'module' beside it"),
], ids=lambda value: value if isinstance(value, str) else '')
def test_pickles_that_take_too_much(tmp_path, monkeypatch, made, said):
    path = tmp_path / 'a.pth'
    if said and 'instructions' in said:
        monkeypatch.setattr(pickles, 'MAX_INSTRUCTIONS', 1000)
    archive(path, b'\x80\x02}' + text('a') + made + b's.')
    if said is None:
        assert read_checkpoint(path) == {'a': {None: None}}
    else:
        assert said in refusal(path)


def test_safetensors_that_lie_are_refused(tmp_path):
    path = tmp_path / 'a.safetensors'
    save_file({'a': torch.ones(2)}, path)
    size, = struct.unpack('<Q', path.read_bytes()[:8])
    header, data = json.loads(path.read_bytes()[8:8 + size]), path.read_bytes()[8 + size:]
    for change, more in ((dict(shape=[HUGE]), b''), (dict(data_offsets=[0, HUGE]), b''),
                         (dict(shape=[HUGE, HUGE]), b''), (dict(dtype='F64'), b''), ({}, b'1234')):
        made = json.dumps({'a': {**header['a'], **change}}).encode()
        path.write_bytes(struct.pack('<Q', len(made)) + made + data + more)
        assert 'broken or truncated safetensors file' in refusal(path)
    path.write_bytes(struct.pack('<Q', 1 << 31) + b'{}' + data)
    assert 'broken or truncated safetensors file' in refusal(path)


def test_other_files_are_named(tmp_path):
    path = tmp_path / 'a.pth'
    for content, said in ((b'', 'is empty (0 bytes)'), (b'\x89PNG\r\n', 'of an unknown format'),
                          (b'PK\5\6' + bytes(18), 'of an unknown format'),
                          (pickle.dumps([1], protocol=2), 'is a pickle of something else')):
        path.write_bytes(content)
        assert said in refusal(path)
    np.savez(tmp_path / 'b.npz', a=1)
    assert 'archive of something else' in refusal(tmp_path / 'b.npz')
    for content in ([1], torch.ones(1)):
        torch.save(content, path)
        assert f'holds a {type(content).__name__}; expected a dict of tensors' in refusal(path)


@pytest.mark.parametrize('change, said', [
    (lambda state: [1], 'has a list as its state_dict'),
    (lambda state: {**state, 'weight': [1.]}, 'another type, first weight: list instead of a'),
    (lambda state: {**state, 'weight': torch.ones(1, dtype=torch.int64)},
     'first weight: torch.int64 instead of torch.float32'),
    (lambda state: {**state, 'weight': torch.ones(1, dtype=torch.complex64)}, 'torch.complex64'),
    (lambda state: {**state, 'weight': torch.ones(1, dtype=torch.bool)}, 'torch.bool instead'),
    (lambda state: {**state, 'weight': torch.ones(2)}, r'first weight: \(2,\) instead of \(1,\)'),
    (lambda state: {3: torch.ones(1)}, '1 are missing, first weight'),
    (lambda state: {**state, 'weight': torch.tensor([float('-inf')])}, 'infinite, first weight'),
])
def test_what_does_not_fit_leaves_the_model_as_it_was(tmp_path, change, said):
    path, model = tmp_path / 'a.pth', OneWeight()
    torch.save({'state_dict': change({'weight': torch.ones(1)}),
                'meta': {'arch': 'OneWeight', 'epoch': 12}}, path)
    with pytest.raises(ValueError, match=said):
        load_compatible(model, str(path))
    assert model.weight.item() == 0
    torch.save({'state_dict': {'weight': torch.ones(1).half()}, 'meta': ['none']}, path)
    assert load_compatible(model, str(path)) == {} and model.weight.item() == 1


def test_class_names_reach_the_drawer(tmp_path, monkeypatch):
    path, model, built = tmp_path / 'a.pth', segmentor(), []
    build = inference.VISUALIZERS.build
    monkeypatch.setattr(inference.VISUALIZERS, 'build',
                        lambda cfg: built.append(build(cfg)) or built[-1])
    for meta, expected in (
            ({'dataset_meta': {'classes': ['a', 'b']}}, ('a', 'b')),
            ({'CLASSES': ('c', 'd')}, ('c', 'd')),
            ({'dataset_meta': {'classes': 7}}, SEG_CLASSES), ({}, SEG_CLASSES)):
        torch.save({'state_dict': model.state_dict(), 'meta': meta}, path)
        draw = load_drawer(Config.fromfile(CONFIG), str(path))
        assert tuple(built[-1].dataset_meta['classes']) == expected
    assert draw(np.zeros((64, 96, 3), np.uint8)).shape == (64, 96, 3)
