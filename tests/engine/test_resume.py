"""Resuming a Runner: attributes of modules, and schedules that differ from the config's."""
import pickle

import pytest
import torch
from mmengine.logging import MMLogger
from support.toys import STEP, train_toy
from torch import nn

from mmeffformer.engine.module_state import snapshot
from mmeffformer.engine.runner import Runner


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Runner:
    return train_toy(tmp_path_factory.mktemp('run') / 'whole')


def attributes(model: nn.Module) -> dict:
    return {path: pickle.loads(value) for path, value in snapshot(model).items()}


@pytest.mark.parametrize('iteration', [1, 4])
def test_every_attribute_is_that_of_the_whole_run(whole, tmp_path, iteration):
    resumed = train_toy(tmp_path / f'from_{iteration}', resume=True,
                    load_from=f'{whole.work_dir}/iter_{iteration}.pth')
    assert whole.model.data_preprocessor.batches == 7 and len(whole.model.losses) == 7
    found, expected = attributes(resumed.model), attributes(whole.model)
    assert found == expected and ('data_preprocessor', 'factor') in found
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value)


def messages(monkeypatch) -> list:
    found = []
    monkeypatch.setattr(MMLogger, 'warning', lambda logger, text, *_: found.append(text))
    return found


@pytest.mark.parametrize('edits, named', [
    ({}, None),
    (dict(train_cfg=dict(by_epoch=False, max_iters=8)), 'max_iters 8 (checkpoint: 7)'),
    (dict(param_scheduler=[dict(STEP, milestones=[2, 6])]),
     'param_scheduler[0].milestones [2, 6] (checkpoint: [2, 5])'),
    (dict(param_scheduler=[dict(STEP, gamma=0.1)]), 'param_scheduler[0].gamma 0.1 (checkpoint: '
                                                    '0.5)'),
    (dict(param_scheduler=[dict(type='PolyLR', by_epoch=False)]),
     'param_scheduler[0].power 1.0 (checkpoint: absent)'),
    (dict(param_scheduler=[STEP, dict(STEP, begin=6)]), 'schedulers 2 (checkpoint: 1)'),
    (dict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.02))), 'lr 0.02 (checkpoint: 0.01)'),
    (dict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9))),
     'momentum 0.9 (checkpoint: 0)'),
], ids=str)
def test_another_schedule_is_named_once(whole, tmp_path, monkeypatch, edits, named):
    found = messages(monkeypatch)
    train_toy(tmp_path / 'other', resume=True, load_from=f'{whole.work_dir}/iter_6.pth', **edits)
    found = [text for text in found if 'differs from the checkpoint' in text]
    assert len(found) == (named is not None)
    assert named is None or named in found[0]
