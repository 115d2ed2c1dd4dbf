"""Checkpoint files are read as data, whatever they ask for."""
import argparse
import io
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from safetensors.torch import save_file
from support import attacks
from support.attacks import Runs, refusal
from torch import nn

from mmeffformer.weights import read_checkpoint, safe_loading
from mmeffformer.weights.safe_loading import check_finite


@pytest.fixture(params=sorted({False, safe_loading.SAFE_GLOBALS_SUPPORTED}))
def unpickler(request, monkeypatch):
    """Run a test with torch's unpickler, and with the one for older versions of torch."""
    monkeypatch.setattr(safe_loading, 'SAFE_GLOBALS_SUPPORTED', request.param)


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


def attack_in_hub(path, marker):
    made = training()
    made['message_hub']['log_scalars']['train/loss'].__dict__['extra'] = Runs(marker)
    torch.save(made, path)


def attack_in_legacy_file(path, marker):
    torch.save(training(optimizer=Runs(marker)), path, _use_new_zipfile_serialization=False)


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


def attack_by_torch_itself(path, marker):
    inner = io.BytesIO()
    torch.save(Runs(marker), inner, _use_new_zipfile_serialization=False)
    torch.save({'state_dict': Runs(None, torch.storage._load_from_bytes, inner.getvalue())}, path)


def attack_by_dotted_name(path, marker):
    write_archive(path, b'\x80\x04}' + text('meta') + text('torch')
                  + text('serialization.os.mkdir') + b'\x93' + text(str(marker)) + b'\x85Rs.')


def attack_by_array_of_objects(path, marker):
    torch.save({'meta': np.array([Runs(marker)], dtype=object)}, path)


ATTACKS = [attacks.attack,
           *(value for key, value in globals().items() if key.startswith('attack_'))]


@pytest.mark.parametrize('attack', ATTACKS)
def test_code_in_a_file_is_never_run(attack, tmp_path, unpickler):
    marker = tmp_path / 'marker'
    for suffix in ('.pth', '.pth.tar', '.safetensors', '.bin'):
        attack(tmp_path / f'file{suffix}', marker)
        message = refusal(tmp_path / f'file{suffix}')
        assert 'was refused: ' in message or attack in (attack_in_text_pickle,
                                                        attack_by_getattr), message
        assert not marker.exists()


def test_the_attacks_are_real(tmp_path):
    for attack in {*ATTACKS} - {attack_in_text_pickle}:
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


def test_logged_values_bring_no_methods(tmp_path, unpickler):
    made = training()
    history = made['message_hub']['log_scalars']['train/loss']
    history.__dict__['update'] = 'mine'
    torch.save(made, tmp_path / 'a.pth')
    read = read_checkpoint(tmp_path / 'a.pth')['message_hub']['log_scalars']['train/loss']
    assert read.update(1.) is None and read.max() == 1.
    assert vars(read).keys() == {'_log_history', '_count_history', 'max_length'}
    assert all(map(callable, HistoryBuffer._statistics_methods.values()))


@pytest.mark.parametrize('make', [
    lambda: np.array(['a']), lambda: np.zeros(1, [('a', 'f4')]), lambda: np.array([None])])
def test_arrays_hold_numbers_only(tmp_path, unpickler, make):
    torch.save({'a': make()}, tmp_path / 'a.pth')
    assert 'was refused: ' in refusal(tmp_path / 'a.pth')


def test_dtypes_cannot_claim_to_hold_objects(tmp_path, unpickler):
    """numpy would use the numbers as addresses."""
    class Forged:
        def __reduce__(self):
            return np.dtype, ('f8', False, True), (3, '<', None, None, None, -1, -1, 63)

    class Array:
        def __reduce__(self):
            return (*np.zeros(1).__reduce__()[:2], (1, (1,), Forged(), False, [1.]))

    class Scalar:
        def __reduce__(self):
            return np.float64(1).__reduce__()[0], (Forged(), b'A' * 8)

    for forged in (Array(), Scalar()):
        torch.save({'a': forged}, tmp_path / 'a.pth')
        assert 'it holds a numpy array of other values than numbers' in refusal(tmp_path / 'a.pth')


def test_weights_of_an_unknown_model_must_be_finite_but_masks_need_not():
    infinite = torch.full((2,), -float('inf'))
    state = {'attn.mask': infinite, 'attn.attn_bias': infinite, 'steps': torch.tensor(3)}
    check_finite({'state_dict': state}, 'a.pth')
    with pytest.raises(ValueError, match='a.pth has 1 tensors .* first norm.running_mean'):
        check_finite({'state_dict': {**state, 'norm.running_mean': infinite}}, 'a.pth')


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
            assert type(pickle.loads(pickle.dumps(read[key]))) is np.ndarray
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
            kind == 'legacy' and 'was refused: it asks for ' in message)


def test_changed_bits_are_found(tmp_path, unpickler):
    path = tmp_path / 'a.pth'
    torch.save({'a': torch.ones(1000)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack('<f', 1.) * 100) + 50] ^= 1
    path.write_bytes(content)
    assert 'is a broken or truncated torch file' in refusal(path)


def test_torchscript_is_refused(tmp_path, unpickler):
    path = tmp_path / 'a.pth'
    torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1)).save(path)
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
    torch.save([1], path)
    assert 'holds a list; expected a dict of tensors' in refusal(path)
    with pytest.raises(FileNotFoundError, match='looked for .*no.pth, but there is no such file'):
        read_checkpoint(tmp_path / 'no.pth')
    with pytest.raises(FileNotFoundError, match='that is a folder'):
        read_checkpoint(tmp_path)
