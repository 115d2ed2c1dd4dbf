"""Private parts of mmengine and torch: a test fails where a version has moved one of them."""
import inspect

import pytest
import torch
from mmengine.hooks import CheckpointHook
from mmengine.runner import EpochBasedTrainLoop, LogProcessor
from mmengine.runner import Runner as MMEngineRunner
from support.helpers import run_code
from torch.utils.data import DataLoader, Dataset

from mmeffformer.engine import mmengine_internals as internals


class Numbers(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return index


@pytest.fixture
def runner(tmp_path):
    loader = dict(dataset=Numbers(), sampler=dict(type='InfiniteSampler', shuffle=False),
                  batch_size=2, collate_fn=dict(type='default_collate'))
    return MMEngineRunner(
        torch.nn.Linear(1, 1), str(tmp_path), train_dataloader=loader,
        train_cfg=dict(by_epoch=False, max_iters=9, dynamic_intervals=[(3, 2)], val_interval=5),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=.1)),
        randomness=dict(seed=0, diff_rank_seed=True), resume=True,
        log_processor=LogProcessor(by_epoch=False), experiment_name='internals')


def test_private_attributes_of_a_runner(runner):
    assert internals.is_resuming(runner) and internals.diff_rank_seed(runner)
    assert not internals.is_training(runner)
    cfg = internals.train_dataloader_cfg(runner)
    assert cfg['batch_size'] == 2
    loader = DataLoader(Numbers(), batch_size=3)
    with internals.train_dataloader(runner, loader):
        assert runner.train_loop.dataloader is loader
    assert internals.train_dataloader_cfg(runner) is cfg and internals.is_training(runner)


def test_val_interval_follows_the_iteration(runner):
    loop = runner.train_loop
    assert loop.val_interval == 5
    loop._iter = 4
    internals.update_val_interval(loop)
    assert loop.val_interval == 2
    assert hasattr(EpochBasedTrainLoop, '_decide_current_val_interval')


def test_a_resumed_loop_takes_nothing_for_earlier_iterations(runner):
    """The loop that is run here, whatever its version, drops 5 batches and trains on 4."""
    loop, taken, trained = runner.train_loop, [], []
    loop.dataloader_iterator = internals.SkippedIterator(
        iter(lambda: taken.append(len(taken)) or taken[-1], None), 5)
    runner._hooks, runner._val_loop, loop._iter = [], None, 5

    def run_iter(batch):
        trained.append(batch)
        loop._iter += 1

    loop.run_iter = run_iter
    loop.run()
    assert taken == trained == [0, 1, 2, 3]


def test_parts_of_a_loader_are_replaced_in_spite_of_its_lock():
    loader = DataLoader(Numbers(), batch_size=3)
    with pytest.raises(ValueError, match='should not be set after'):
        loader.batch_sampler = [[5, 4]]
    assert internals.set_loader_parts(loader, batch_sampler=[[5, 4]]) is loader
    assert [batch.tolist() for batch in loader] == [[5, 4]]


@pytest.mark.parametrize('method, parameters', [
    ('_save_checkpoint_with_step', ['self', 'runner', 'step', 'meta']),
    ('_save_best_checkpoint', ['self', 'runner', 'metrics'])])
def test_overridden_private_methods_of_the_checkpoint_hook(method, parameters):
    assert [*inspect.signature(getattr(CheckpointHook, method)).parameters] == parameters


def test_attributes_of_the_checkpoint_hook(runner):
    hook = CheckpointHook(by_epoch=False, max_keep_ckpts=2, save_best=['a', 'b'], rule='less',
                          mispelt=1)
    assert hook.args == dict(mispelt=1) and hook.best_ckpt_path_dict == {}
    runner.message_hub.update_info('keep_ckpt_ids', [3, 4])
    hook.before_train(runner)
    assert [*hook.keep_ckpt_ids] == [3, 4]
    assert hook.best_ckpt_path_dict == dict(a=None, b=None)
    hook = CheckpointHook(save_best='a', rule='less')
    runner.message_hub.update_info('best_ckpt', 'best.pth')
    hook.before_train(runner)
    assert hook.best_ckpt_path == 'best.pth' and hook.file_backend.isfile(__file__)


def test_the_temporary_folder_is_one_for_all_children(tmp_path):
    printed = run_code("""
import multiprocessing, os, sys, tempfile
tempfile.tempdir = sys.argv[1]
from mmeffformer.engine.mmengine_internals import create_temp_dir

def child(queue):
    queue.put(create_temp_dir())

if __name__ == '__main__':
    folder, queue = create_temp_dir(), multiprocessing.SimpleQueue()
    process = multiprocessing.get_context('fork').Process(target=child, args=(queue,))
    process.start()
    assert queue.get() == folder and os.path.dirname(folder) == sys.argv[1]
    process.join()
    assert os.path.isdir(folder)
""", tmp_path)
    assert printed == '' and not [*tmp_path.iterdir()]


def test_importing_changes_nothing_in_mmengine_but_patch_mmengine_does():
    run_code("""
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.runner.checkpoint import CheckpointLoader
before = dict(CheckpointLoader._schemes), dict(MODULE2PACKAGE)
import mmeffformer
assert mmeffformer.deploy.fuse.__module__ == 'mmeffformer.models.fuse'
assert (CheckpointLoader._schemes, MODULE2PACKAGE) == before
for _ in range(2):
    mmeffformer.patch_mmengine()
    assert {f.__module__ for f in CheckpointLoader._schemes.values()} == {
        'mmeffformer.weights.safe_loading'}
    assert MODULE2PACKAGE['mmeffformer'] == 'mmeffformer'
""")
