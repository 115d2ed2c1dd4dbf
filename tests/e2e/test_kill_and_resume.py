"""A run that is killed at any moment and resumed ends like an uninterrupted one."""
import os
import random
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from mmengine.fileio import LocalBackend
from mmengine.runner import IterBasedTrainLoop, ValLoop
from support.helpers import FORKS, ROOT, run_here, run_tool

from mmeffformer.datasets import write_ade20k, write_coco
from mmeffformer.engine.hooks import CheckpointHook
from mmeffformer.utils.plots import read_scalars
from mmeffformer.weights.safe_loading import read_checkpoint

SEGMENTOR = ROOT / 'tests/data/semfpn_faults.py'


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def call_number(n: int, kind: type, method: str, then):
    """Call ``then`` with the arguments of the ``n``-th call of a method, before that call."""
    original, calls = getattr(kind, method), iter(range(1, 1 << 30))

    def counted(*args, **kwargs):
        if next(calls) == n:
            then(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(kind, method, counted)


def write_half(backend, content, path):
    Path(path).write_bytes(content[:len(content) // 2])
    die()


def full_disk(backend, content, path):
    Path(path).write_bytes(content[:len(content) // 2])
    raise OSError(28, 'No space left on device')


def set_nan(loop_or_hook, *_, **__):
    """Set one weight of the model to NaN."""
    runner = getattr(loop_or_hook, 'runner', None) or _[0]
    runner.model.decode_head.conv_seg.bias.data[0] = float('nan')


FAULTS = {
    'after seconds': lambda x: threading.Timer(x, die).start(),
    'in write': lambda n: call_number(n, LocalBackend, 'put', write_half),
    'in validation': lambda n: call_number(n, ValLoop, 'run_iter', die),
    'before iteration': lambda n: call_number(n, IterBasedTrainLoop, 'run_iter', die),
    'disk full at write': lambda n: call_number(n, LocalBackend, 'put', full_disk),
    'nan before iteration': lambda n: call_number(n, IterBasedTrainLoop, 'run_iter', set_nan),
    'nan after iteration': lambda n: call_number(n, CheckpointHook, 'after_train_iter', set_nan),
}


def train_here(log, argv, fault):
    """Run tools/train.py in this process, with a fault."""
    torch.set_num_threads(1)
    if fault:
        FAULTS[fault[0]](fault[1])
    run_here(log, ['tools/train.py', *map(str, argv)], os.environ.copy())


def train(work_dir, *options, config=SEGMENTOR, fault=None, expect=0):
    """Train in another process; return its output and exit code, which must be ``expect``."""
    work_dir.mkdir(parents=True, exist_ok=True)
    log = work_dir / 'printed.txt'
    before = len(log.read_text()) if log.exists() else 0
    process = FORKS.Process(target=train_here, args=(
        log, [config, '--work-dir', work_dir, *options], fault))
    process.start()
    process.join(120)
    printed = log.read_text()[before:]
    assert process.exitcode in ([expect] if fault is None else [expect, -signal.SIGKILL]), printed
    return printed, process.exitcode


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    write_ade20k(folder / 'ade', train=16, val=3, size=(64, 96), progress=False)
    return ['--data-root', folder / 'ade']


@pytest.fixture(scope='module')
def never_killed(data, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('never_killed')
    server = FORKS.Process(target=os.getpid)  # the first process takes as long as its imports
    server.start()
    server.join()
    began = time.monotonic()
    train(work_dir, *data)
    return work_dir, time.monotonic() - began


def values(part, path: str = '') -> dict:
    """Return the values in nested dicts and lists by their path."""
    if not isinstance(part, (dict, list, tuple)):
        return {path: part}
    items = part.items() if isinstance(part, dict) else enumerate(part)
    return {key: value for name, item in items
            for key, value in values(item, f'{path}.{name}').items()}


def assert_same(a: Path, b: Path, name: str = 'iter_12.pth'):
    """Compare all parts of two checkpoints that the rest of a run depends on."""
    parts = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers', 'module_state')
    a, b = (values({part: file.get(part) for part in parts}) for file in (
        read_checkpoint(folder / name) for folder in (a, b)))
    assert a.keys() == b.keys()
    tensors = [key for key, value in a.items() if isinstance(value, torch.Tensor)]
    assert len(tensors) > 500 and all(torch.equal(a[key], b[key]) for key in tensors)
    assert all(a[key] == b[key] for key in a.keys() - {*tensors})


def test_killed_twenty_times(data, never_killed, tmp_path):
    reference, seconds = never_killed
    draw = random.Random(0)
    moments = [('after seconds', draw.uniform(0, seconds)) for _ in range(12)]
    moments += [('in write', draw.randint(1, 6)) for _ in range(4)]
    moments += [('in validation', draw.randint(1, 3)) for _ in range(4)]
    draw.shuffle(moments)
    killed, runs = [], 0
    while moments:
        runs += 1
        work_dir, code = tmp_path / str(runs), None
        while code != 0:  # until the run is complete
            moment = moments.pop() if moments else None
            printed, code = train(work_dir, *data, '--resume', fault=moment)
            killed += [moment] if code else []
            moments += [moment] if moment and not code else []  # it ended before the fault
        assert_same(reference, work_dir)
        assert not [path for path in work_dir.iterdir() if path.name.startswith('.tmp-')]
        assert 'mIoU' in printed
    assert len(killed) == 20 and {kind for kind, _ in killed} == {
        'after seconds', 'in write', 'in validation'}


def checkpoints_in(work_dir: Path) -> set:
    return {path.name for path in work_dir.glob('*.pth')}


def test_a_truncated_checkpoint_is_skipped(data, never_killed, tmp_path):
    reference, _ = never_killed
    shutil.copy(reference / 'iter_10.pth', tmp_path)
    newest = (reference / 'iter_12.pth').read_bytes()
    (tmp_path / 'iter_12.pth').write_bytes(newest[:len(newest) * 2 // 3])
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_12.pth'))
    printed, _ = train(tmp_path, *data, '--resume')
    assert re.search(r'iter_12\.pth is a broken or truncated .* Resuming from an earlier '
                     r'checkpoint, \S*iter_10\.pth', printed)
    assert 'resumed epoch: 0, iter: 10' in printed
    assert_same(reference, tmp_path)


def test_a_full_disk_keeps_the_previous_checkpoint(data, never_killed, tmp_path):
    printed, code = train(tmp_path, *data, fault=('disk full at write', 2), expect=1)
    assert code == 1 and 'Traceback' not in printed
    assert printed.endswith(
        f'train.py: {tmp_path}/iter_4.pth cannot be written: No space left on device. Solve '
        f'this and use --resume; the last complete checkpoint is {tmp_path}/iter_2.pth\n')
    assert checkpoints_in(tmp_path) == {'iter_2.pth'}
    train(tmp_path, *data, '--resume')
    assert_same(never_killed[0], tmp_path)


def test_a_loss_that_is_nan_stops_the_training(data, never_killed, tmp_path):
    printed, code = train(tmp_path, *data, fault=('nan before iteration', 6), expect=1)
    assert code == 1 and 'Traceback' not in printed
    message = printed[printed.index('train.py: at iteration 6 a loss is not finite: '):]
    assert 'decode.loss_ce nan' in message
    folder = data[1] / 'images/training'
    named = re.findall(rf'{folder}/\w+\.jpg', message)
    assert len({*named}) == 4 and all(Path(path).is_file() for path in named)
    assert f'the last complete checkpoint is {tmp_path}/iter_4.pth' in message
    assert checkpoints_in(tmp_path) == {'iter_2.pth', 'iter_4.pth'}
    train(tmp_path, *data, '--resume')
    assert_same(never_killed[0], tmp_path)


def test_weights_that_are_nan_are_not_saved(data, tmp_path):
    printed, code = train(tmp_path, *data, fault=('nan after iteration', 4), expect=1)
    assert code == 1 and 'Traceback' not in printed
    assert printed.endswith(
        f'train.py: at iteration 4: checkpoint {tmp_path}/iter_4.pth has 1 tensors with values '
        'that are NaN or infinite, first decode_head.conv_seg.bias. The checkpoint is not '
        f'written; the last complete checkpoint is {tmp_path}/iter_2.pth\n')
    assert checkpoints_in(tmp_path) == {'iter_2.pth'}


def test_a_checkpoint_deletes_no_file_outside_the_work_dir(data, never_killed, tmp_path):
    reference, _ = never_killed
    victim = tmp_path / 'thesis.pth'
    victim.write_text('a file of another person')
    checkpoint = torch.load(reference / 'iter_10.pth', weights_only=False)
    checkpoint['message_hub']['runtime_info'].update(best_ckpt=str(victim), best_score=-1.)
    torch.save(checkpoint, tmp_path / 'stranger.pth')
    printed, _ = train(tmp_path / 'work', *data, '--resume', tmp_path / 'stranger.pth')
    assert 'best_mIoU_iter_12.pth' in checkpoints_in(tmp_path / 'work')
    assert victim.read_text() == 'a file of another person'


@pytest.mark.parametrize('change, message', [
    (lambda file: (file.pop('optimizer'), file.pop('param_schedulers')),
     'cannot be resumed: it has weights, but'),
    (lambda file: file['meta'].pop('iter'), 'cannot be resumed: it has weights, but'),
    (lambda file: file['optimizer'].update(param_groups=[]),
     'cannot be resumed with this config: '),
])
def test_incomplete_runs_are_not_resumed(data, never_killed, tmp_path, change, message):
    checkpoint = torch.load(never_killed[0] / 'iter_10.pth', weights_only=False)
    change(checkpoint)
    path = tmp_path / 'other.pth'
    torch.save(checkpoint, path)
    printed, _ = train(tmp_path / 'work', *data, '--resume', path, expect=1)
    assert f'{path} {message}' in printed and 'Traceback' not in printed
    assert f'load_from={path}' in printed and not checkpoints_in(tmp_path / 'work')


def test_schedules_with_functions_and_samplers_with_epochs_are_resumed(data, tmp_path):
    config = tmp_path / 'one_cycle.py'
    config.write_text(f"""
_base_ = '{SEGMENTOR}'
param_scheduler = [dict(type='OneCycleLR', eta_max=0.01, total_steps=12, by_epoch=False)]
train_dataloader = dict(batch_size=2, sampler=dict(type='DefaultSampler'))  # 8 per epoch
""")
    train(tmp_path / 'whole', *data, config=config)
    (tmp_path / 'half').mkdir()
    shutil.copy(tmp_path / 'whole/iter_10.pth', tmp_path / 'half')
    train(tmp_path / 'half', *data, '--resume', config=config)
    assert_same(tmp_path / 'whole', tmp_path / 'half')


def test_temporary_files_of_a_killed_run_are_deleted(data, never_killed, tmp_path):
    shutil.copy(never_killed[0] / 'iter_12.pth', tmp_path)
    (tmp_path / '.tmp-best_mIoU_iter_6.pth').write_bytes(b'PK')
    train(tmp_path, *data, '--resume')
    assert not [*tmp_path.glob('.tmp-*')] and 'iter_12.pth' in checkpoints_in(tmp_path)


def test_an_interrupted_validation_is_repeated_once(data, tmp_path):
    _, code = train(tmp_path, *data, fault=('in validation', 5))  # the second one's
    assert code
    assert checkpoints_in(tmp_path) == {'best_mIoU_iter_6.pth', 'iter_10.pth', 'iter_12.pth'}
    for repeats in (True, False):
        printed, _ = train(tmp_path, *data, '--resume')
        assert ('Running the validation' in printed) == repeats == ('Iter(val) [3/3]' in printed)
    assert read_scalars(tmp_path).metrics['mIoU'].keys() == {6, 12}


def test_effects_of_validations_are_resumed(data, tmp_path):
    config = tmp_path / 'deciding.py'
    config.write_text(f"""
_base_ = '{SEGMENTOR}'
train_cfg = dict(val_interval=2)
# No validation improves the metric by that much.
param_scheduler = [dict(type='ReduceOnPlateauLR', monitor='mIoU', rule='greater', factor=0.5,
                        patience=0, threshold=100, threshold_rule='abs')]
custom_hooks = [dict(type='EarlyStoppingHook', monitor='mIoU', min_delta=100, patience=4)]
""")
    train(tmp_path / 'whole', *data, config=config)
    assert 'iter_10.pth' in checkpoints_in(tmp_path / 'whole')  # of 12
    saved = []
    for iteration in (4, 8):  # right after the validations there
        _, code = train(tmp_path / 'killed', *data, '--resume', config=config,
                        fault=('before iteration', 5))
        assert code
        saved += [read_checkpoint(tmp_path / f'killed/iter_{iteration}.pth')['meta']['validated']]
    assert saved == [4, 6]  # 4 is saved again as the best, 8 before its validation
    train(tmp_path / 'killed', *data, '--resume', config=config)
    assert checkpoints_in(tmp_path / 'killed') == checkpoints_in(tmp_path / 'whole')
    assert_same(tmp_path / 'whole', tmp_path / 'killed', 'iter_10.pth')
    schedule, = read_checkpoint(tmp_path / 'whole/iter_10.pth')['param_schedulers']
    assert schedule['_last_value'] < [1e-3]
    # A run that early stopping has ended stays ended.
    printed, _ = train(tmp_path / 'killed', *data, '--resume', config=config)
    assert 'Iter(train)' not in printed
    config.write_text(config.read_text().replace('patience=4', 'stopping_threshold=0.'))
    for trains in (True, False):
        printed, _ = train(tmp_path / 'good', *data, '--resume', config=config)
        assert ('Iter(train)' in printed) == trains
        assert checkpoints_in(tmp_path / 'good') == {'iter_2.pth', 'best_mIoU_iter_2.pth'}
    run_tool('tools/test.py', config, tmp_path / 'good/iter_2.pth', *data, '--work-dir', tmp_path)


def test_random_numbers_depend_on_the_seed_only(data, never_killed, tmp_path):
    workers = ['--cfg-options', 'train_dataloader.num_workers=2']
    train(tmp_path / 'two workers', *data, *workers)
    assert_same(never_killed[0], tmp_path / 'two workers')
    # A run without a seed draws one, which is resumed.
    seedless = ['--cfg-options', 'randomness.seed=None']
    train(tmp_path / 'whole', *data, *seedless)
    (tmp_path / 'half').mkdir()
    shutil.copy(tmp_path / 'whole/iter_10.pth', tmp_path / 'half')
    train(tmp_path / 'half', *data, *seedless, '--resume')
    assert_same(tmp_path / 'whole', tmp_path / 'half')
    with pytest.raises(AssertionError):
        assert_same(never_killed[0], tmp_path / 'half')


DETECTOR = f"""
_base_ = '{ROOT}/configs/demo/maskrcnn_effformer_l1_shapes.py'
model = dict(
    data_preprocessor=dict(batch_augments=[
        dict(type='BatchSyncRandomResize', random_size_range=(64, 128), interval=2)]),
    backbone=dict(arch=dict(_delete_=True, widths=(8, 8, 16, 16), depths=(1, 1, 1, 1),
                            attention_blocks=(0, 0, 0, 1))),
    neck=dict(in_channels=[8, 8, 16, 16]))
train_dataloader = dict(batch_size=3, sampler=dict(_delete_=True, type='DefaultSampler'),
                        batch_sampler=dict(type='AspectRatioBatchSampler'))
train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=3, val_interval=9)
default_hooks = dict(checkpoint=dict(by_epoch=True, interval=1, max_keep_ckpts=3))
custom_hooks = [dict(type='EMAHook')]
"""


def train_in_two_parts(tmp_path, *options):
    """Train the detector in one run, and from its first checkpoint on."""
    write_coco(tmp_path / 'coco', train=8, val=1, size=(64, 96), progress=False)
    config = tmp_path / 'detector.py'
    config.write_text(DETECTOR)
    options = ['--data-root', tmp_path / 'coco', *options]
    train(tmp_path / 'whole', *options, config=config)
    (tmp_path / 'half').mkdir()
    shutil.copy(tmp_path / 'whole/epoch_1.pth', tmp_path / 'half')
    train(tmp_path / 'half', *options, '--resume', config=config)
    assert_same(tmp_path / 'whole', tmp_path / 'half', 'epoch_3.pth')


DETERMINISTIC = ['--cfg-options', 'randomness.deterministic=True', 'randomness.seed=0']


@pytest.mark.gpu
@pytest.mark.parametrize('amp', [[], ['--amp', 'float16'], ['--amp', 'bfloat16']], ids=str)
def test_a_detector_on_a_gpu_with_deterministic_kernels(amp, tmp_path):
    train_in_two_parts(tmp_path, *amp, *DETERMINISTIC)


@pytest.mark.gpu
def test_a_segmentor_killed_on_a_gpu_with_deterministic_kernels(data, tmp_path):
    train(tmp_path / 'whole', *data, *DETERMINISTIC)
    _, code = train(tmp_path / 'killed', *data, *DETERMINISTIC, fault=('before iteration', 8))
    assert code == -signal.SIGKILL
    train(tmp_path / 'killed', *data, *DETERMINISTIC, '--resume')
    assert_same(tmp_path / 'whole', tmp_path / 'killed')


def test_a_detector_trained_by_epochs_in_mixed_precision(tmp_path):
    train_in_two_parts(tmp_path, '--amp', 'bfloat16')
    state = read_checkpoint(tmp_path / 'whole/epoch_1.pth')['module_state']
    assert len(state['data_preprocessor.batch_augments.0', '_input_size']) == 2
