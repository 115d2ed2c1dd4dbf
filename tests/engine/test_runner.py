"""The parts of a Runner that are built from a config."""
import inspect
import io
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.fileio import FileClient, LocalBackend, register_backend
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.runner import IterBasedTrainLoop
from mmengine.runner.base_loop import BaseLoop
from support.helpers import ROOT
from support.toys import toy_config, train_toy
from torch.utils.data import SequentialSampler

from mmeffformer.apis.options import exit_on_error, set_data_root
from mmeffformer.datasets import write_ade20k
from mmeffformer.datasets.repeatable import RepeatableBatches
from mmeffformer.engine.hooks import CheckpointHook, EarlyStoppingHook, MetricHook
from mmeffformer.engine.mmengine_internals import SkippedIterator
from mmeffformer.engine.runner import Runner


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_ade20k(tmp_path_factory.mktemp('data') / 'ade', train=8, val=1, size=(64, 96),
                        progress=False)


@pytest.fixture
def cfg(data, tmp_path):
    cfg = Config.fromfile(ROOT / 'tests/data/semfpn_tiny.py')
    set_data_root(cfg, str(data))
    cfg.work_dir = str(tmp_path)
    cfg.experiment_name = tmp_path.name  # by default the second, by which scopes are found
    return cfg


def test_the_sampler_stays_one_of_samples(cfg):
    runner = Runner.from_cfg(cfg)
    loader = runner.train_dataloader
    assert isinstance(loader.sampler, InfiniteSampler)
    assert isinstance(loader.batch_sampler, RepeatableBatches)
    assert loader.batch_sampler.sampler is loader.sampler and loader.batch_size == 4
    first = next(iter(loader.batch_sampler))
    assert [index.position for index in first] == [(0, 0, i) for i in range(4)]
    # Data of validation are not drawn at random.
    assert isinstance(runner.val_dataloader.sampler, DefaultSampler)
    assert not isinstance(runner.val_dataloader.batch_sampler, RepeatableBatches)


def test_the_sampler_of_a_batch_sampler_keeps_its_epochs(cfg):
    cfg.train_dataloader.update(
        sampler=dict(type='DefaultSampler'),
        batch_sampler=dict(type='mmdet.AspectRatioBatchSampler'))
    cfg.train_cfg = dict(by_epoch=True, max_epochs=2)
    loader = Runner.from_cfg(cfg).train_dataloader
    assert isinstance(loader.sampler, SequentialSampler)  # torch's default, not used
    assert isinstance(loader.batch_sampler.sampler, DefaultSampler)


FAST_FORWARD = {} if 'fast_forward_on_resume' not in inspect.signature(
    IterBasedTrainLoop).parameters else {'train_cfg.fast_forward_on_resume': True}


@pytest.mark.parametrize('edits, skips', [
    ({}, True), (FAST_FORWARD, not FAST_FORWARD),
    ({'train_dataloader.sampler.type': 'DefaultSampler'}, False),
    ({'train_cfg': dict(type='EpochBasedTrainLoop', max_epochs=9)}, False)], ids=str)
def test_only_an_endless_sampler_starts_at_the_next_batch(cfg, edits, skips):
    cfg.merge_from_dict(edits)
    if 'train_cfg' in edits:
        cfg.train_cfg = edits['train_cfg']
    runner = Runner.from_cfg(cfg)
    runner._resumed_iters = 3
    loop = runner.train_loop
    assert loop.dataloader.batch_sampler.start == (3 if skips else 0)
    iterator = getattr(loop, 'dataloader_iterator', None)
    assert isinstance(iterator, SkippedIterator) == skips


def test_hooks_of_mmengine_are_replaced(cfg):
    cfg.custom_hooks = [dict(type='mmengine.EarlyStoppingHook', monitor='mIoU')]
    assert cfg.default_hooks.checkpoint.type == 'CheckpointHook'
    kinds = [type(hook) for hook in Runner.from_cfg(cfg).hooks]
    assert CheckpointHook in kinds and EarlyStoppingHook in kinds
    assert MMEngineCheckpointHook not in kinds


def test_a_hook_registered_later_is_replaced_too(tmp_path):
    runner = Runner.from_cfg(toy_config(tmp_path / 'hooks', default_hooks=dict(checkpoint=None)))
    assert not any(isinstance(hook, MMEngineCheckpointHook) for hook in runner.hooks)
    runner.register_hook(dict(type='CheckpointHook', by_epoch=False, priority='LOW'))
    hook, = (hook for hook in runner.hooks if isinstance(hook, MMEngineCheckpointHook))
    assert type(hook) is CheckpointHook and hook.priority == 'LOW'
    assert hook.by_epoch is False


class Bucket(LocalBackend):
    """Keeps files in memory, under paths without a scheme; cannot rename."""

    files = {}

    def put(self, obj, filepath):
        self.files[str(filepath)] = obj

    def isfile(self, filepath):
        return str(filepath) in self.files

    def remove(self, filepath):
        del self.files[str(filepath)]


@pytest.mark.parametrize('register, option', [
    (register_backend, 'backend_args'), (FileClient.register_backend, 'file_client_args')])
def test_checkpoints_in_a_registered_backend(tmp_path, register, option):
    register('bucket', Bucket, force=True)
    Bucket.files.clear()
    train_toy(tmp_path / option, default_hooks=dict(checkpoint=dict(
        type='CheckpointHook', by_epoch=False, interval=3, max_keep_ckpts=2, out_dir='bucket',
        **{option: dict(backend='bucket')})))
    assert {*Bucket.files} == {f'bucket/{option}/iter_{i}.pth' for i in (6, 7)}
    saved = torch.load(io.BytesIO(Bucket.files[f'bucket/{option}/iter_7.pth']),
                       weights_only=False)
    assert saved['meta']['iter'] == 7
    assert not [*tmp_path.rglob('*.pth')]


class PlainLoop(BaseLoop):
    """A train loop of another package, with the attributes that mmengine's Runner reads only."""

    max_epochs, val_interval, val_begin = 1, 1, 1

    def __init__(self, runner, dataloader, max_iters):
        super().__init__(runner, dataloader)
        self.max_iters, self.iter, self.epoch = max_iters, 0, 0

    def run(self):
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        for data in itertools.islice(self.dataloader, self.max_iters):
            self.runner.call_hook('before_train_iter', batch_idx=self.iter, data_batch=data)
            losses = self.runner.model.train_step(data, optim_wrapper=self.runner.optim_wrapper)
            self.runner.call_hook('after_train_iter', batch_idx=self.iter, data_batch=data,
                                  outputs=losses)
            self.iter += 1
        self.runner.call_hook('after_train')
        return self.runner.model


def test_a_loop_without_stop_training(tmp_path):
    loop = dict(type=PlainLoop, max_iters=2)
    runner = train_toy(tmp_path / 'plain', train_cfg=loop)
    assert runner.iter == 2 and (tmp_path / 'plain/iter_2.pth').is_file()
    with pytest.raises(AssertionError, match='should contain `stop_training`'):
        train_toy(tmp_path / 'stopping', train_cfg=loop, custom_hooks=[
            dict(type='EarlyStoppingHook', monitor='mIoU')])


def test_metrics_that_were_not_measured_are_named_once(monkeypatch):
    found, hook = [], MetricHook()
    runner = SimpleNamespace(logger=SimpleNamespace(warning=found.append))
    hook.after_val_epoch(runner, {'coco/bbox_mAP': np.float64(-1), 'mIoU': float('nan'), 'ok': 0.})
    hook.after_test_epoch(runner, {'coco/bbox_mAP': -1., 'ok': 1})
    hook.after_test_epoch(runner, {})
    assert len(found) == 1 and found[0].startswith('coco/bbox_mAP -1, mIoU nan: not measured')
    hook.after_val_epoch(runner, {'coco/segm_mAP': -1., 'mIoU': float('nan')})
    assert len(found) == 2 and found[1].startswith('coco/segm_mAP -1: ')


@pytest.mark.parametrize('edits, message', [
    ({'model.backbone.archh': 'l1'}, "unexpected keyword argument 'archh'"),
    ({'default_hooks.timer.type': 'TimerHook'}, 'TimerHook is not in the'),
    ({'train_dataloader.sampler.typo': 1}, "unexpected keyword argument 'typo'")])
def test_errors_of_a_config_are_one_message(cfg, edits, message):
    cfg.merge_from_dict(edits)
    with pytest.raises(SystemExit) as info, exit_on_error():
        Runner.from_cfg(cfg).train()
    assert message in info.value.code
