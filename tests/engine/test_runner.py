"""The parts of a Runner that are built from a config."""
import inspect

import pytest
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.runner import IterBasedTrainLoop
from support.helpers import ROOT
from torch.utils.data import SequentialSampler

from mmeffformer.apis.options import exit_on_error, set_data_root
from mmeffformer.datasets import write_ade20k
from mmeffformer.datasets.repeatable import RepeatableBatches
from mmeffformer.engine.hooks import CheckpointHook, EarlyStoppingHook
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


@pytest.mark.parametrize('edits, message', [
    ({'model.backbone.archh': 'l1'}, "unexpected keyword argument 'archh'"),
    ({'default_hooks.timer.type': 'TimerHook'}, 'TimerHook is not in the'),
    ({'train_dataloader.sampler.typo': 1}, "unexpected keyword argument 'typo'")])
def test_errors_of_a_config_are_one_message(cfg, edits, message):
    cfg.merge_from_dict(edits)
    with pytest.raises(SystemExit) as info, exit_on_error():
        Runner.from_cfg(cfg).train()
    assert message in info.value.code
