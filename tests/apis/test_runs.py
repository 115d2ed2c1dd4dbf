"""Reading what trainings and evaluations leave; tests/tools/test_table2.py reads real ones."""
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.visualization import LocalVisBackend

from mmeffformer.apis.runs import RECORD, differences, parse_config, read_runs, record_evaluation

CONFIG = dict(data_root='data/coco/', val_dataloader=dict(batch_size=1),
              train_cfg=dict(max_epochs=12), resume=False)
LOG = """\
    GPU number: 8
2026/11/21 10:18:05 - mmengine - INFO - Epoch(val)  [1][ 50/625]    eta: 0:00:00  time: 0.0788
2026/11/21 10:18:06 - mmengine - INFO - Epoch(val) [1][625/625]    coco/bbox_mAP: 0.3790
"""


def leave(work_dir, stamp, *scalars, record=None, log=LOG, name='net', **config):
    """A run's folder, its config and scalars written by mmengine."""
    run = work_dir / stamp
    cfg = Config({**CONFIG, **config})
    backend = LocalVisBackend(str(run / 'vis_data'))
    backend.add_config(cfg)
    for step in scalars:
        backend.add_scalars(step, step=step['step'])
    (run / f'{stamp}.log').write_text(log)
    if record:
        (run / RECORD).write_text(json.dumps(record))
    (work_dir / f'{name}.py').write_text(cfg.pretty_text)
    return run


def epoch(number, value, loss=1.):
    """What an epoch of training leaves in the scalars."""
    return (dict(step=100 * number, epoch=number, loss=loss),
            {'coco/bbox_mAP': value, 'step': number})


def test_the_last_validation_of_a_training(tmp_path):
    run = leave(tmp_path / 'a/net', '20260101_000000', *epoch(1, .2), *epoch(2, .379))
    (found,), problems = read_runs(tmp_path, {'net'})
    assert problems == []
    assert (found.name, found.metrics) == ('net', {'coco/bbox_mAP': .379})
    assert found.trained == (2, None)
    assert found.images == (4993, 5000)  # 625 batches of 8 x 1, the last perhaps not full
    assert (found.folder, found.checkpoint, found.training.gpus) == (run, None, [8])
    assert found.config == CONFIG


def test_a_resumed_training_is_one(tmp_path):
    work_dir = tmp_path / 'net'
    leave(work_dir, '20260101_000000', *epoch(1, .1), log='GPU number: 1', data_root='elsewhere')
    leave(work_dir, '20260102_000000', *epoch(1, .2))
    run = leave(work_dir, '20260103_000000', *epoch(2, .3), log='GPU number: 4', resume=True)
    (found,), _ = read_runs(tmp_path, {'net'})
    assert found.metrics == {'coco/bbox_mAP': .3} and found.folder == run
    # The first was begun anew, the second went on in the third, whose log has no validation.
    assert found.training.gpus == [8, 4]
    assert [cfg['data_root'] for cfg in found.training.configs] == ['data/coco/'] * 2
    assert found.images == (4993, 5000)


def test_an_evaluation_knows_its_training(tmp_path):
    leave(tmp_path / 'net', '20260101_000000', *epoch(12, .3))
    meta = dict(epoch=12, iter=87960, experiment_name='net_20260101_000000')
    record = dict(config='configs/net.py', checkpoint='net/epoch_12.pth', meta=meta, images=5000,
                  metrics={'coco/bbox_mAP': .38})
    run = leave(tmp_path / 'net', '20260102_000000', record=record)
    (trained, found), problems = read_runs(tmp_path, {'net'})
    assert problems == [] and trained.folder.name == '20260101_000000'
    assert (found.folder, found.images, found.trained) == (run, (5000, 5000), (12, 87960))
    assert found.training is trained.training

    # Where the training is not at hand, the checkpoint's own copy of its config is.
    record['meta'] = dict(meta, experiment_name='net_20250101_000000', cfg='resume = True')
    leave(tmp_path / 'other', '20260103_000000', record=record)
    found = read_runs(tmp_path / 'other', {'net'})[0][0].training
    assert (found.configs, found.gpus) == ([dict(resume=True)], [None])


def test_runs_of_other_configs_are_passed_over(tmp_path):
    leave(tmp_path / 'net', '20260101_000000', *epoch(1, .2), name='net_shapes')
    assert read_runs(tmp_path, {'net'}) == ([], [])


def test_without_a_log_the_number_of_images_is_unknown(tmp_path):
    run = leave(tmp_path / 'net', '20260101_000000', *epoch(1, .2))
    (run / f'{run.name}.log').unlink()
    (found,), _ = read_runs(tmp_path, {'net'})
    assert found.images is None and found.training.gpus == [None]


@pytest.mark.parametrize('spoil, message', [
    (lambda run: (run / RECORD).write_text('{"config": '), 'evaluation.json is broken'),
    (lambda run: (run / RECORD).write_text('[]'), 'evaluation.json is broken'),
    (lambda run: (run / RECORD).write_text('{"config": "net.py"}'), "KeyError('images')"),
    (lambda run: (run / RECORD).rename(run / f'{run.name}.json'), 'without evaluation.json'),
    (lambda run: (run / 'vis_data/config.py').write_text('a = dict(b='), 'config.py is broken'),
    (lambda run: (run / 'vis_data/scalars.json').write_text('{"step": 1, "loss": 2.0}\n'),
     'has not been validated yet'),
    (lambda run: ((run / 'vis_data/scalars.json').write_text('{"step": 1, "loss": 2.0}\n'),
                  (run.parent / 'other.py').touch()), 'configs of 2 names (net, other)'),
])
def test_what_is_broken_is_told_and_passed_over(tmp_path, spoil, message):
    record = dict(config='net.py', checkpoint='a.pth', meta={}, images=1, metrics={})
    leave(tmp_path / 'good', '20260101_000000', record=record)
    spoil(leave(tmp_path / 'net', '20260102_000000', record=record))
    found, (problem, *_) = read_runs(tmp_path, {'net'})
    assert message in problem and str(tmp_path / 'net') in problem
    assert tmp_path / 'good/20260101_000000' in [run.folder for run in found]


def test_no_folder():
    with pytest.raises(FileNotFoundError, match='nowhere is no folder'):
        read_runs('nowhere', {'net'})


def test_a_config_is_read_as_mmengine_wrote_it():
    cfg = dict(a=1, b=[dict(c=(.5, -1, None)), 'x' * 200, True], d={'e f': 1e-6, 2: []}, g=dict())
    assert parse_config(Config(cfg).pretty_text, 'x') == {
        **cfg, 'b': [dict(c=[.5, -1, None]), *cfg['b'][1:]]}


@pytest.mark.parametrize('text', [
    'a = __import__("os").mkdir({!r})', 'import os; os.mkdir({!r})', 'a = [open({!r}, "w")]',
    'a.b = 1', 'a = dict(1)', 'for a in 1: pass'])
def test_code_in_a_config_is_not_run(tmp_path, text):
    marker = tmp_path / 'ran'
    with pytest.raises(ValueError, match='the config in FILE is broken'):
        parse_config(text.format(str(marker)), 'FILE')
    assert not os.path.exists(marker)


def test_differences_are_named():
    expected = dict(data_root='data/coco/', model=dict(depth=50, norm=dict(type='BN')),
                    hooks=[dict(a=(1, 2)), dict(b=3)], data=dict(ann_file='data/coco/x.json'),
                    other=1)
    same = dict(data_root='/mnt/coco', model=dict(depth=50, norm=dict(type='BN')),
                hooks=[dict(a=[1, 2]), dict(b=3)], data=dict(ann_file='/mnt/coco/x.json'), other=2)
    keys = ('model', 'hooks', 'data')
    assert differences(same, expected, keys) == []
    altered = dict(same, model=dict(depth=18, norm=dict(type='BN', eps=1)), hooks=[dict(a=[1, 2])])
    assert differences(altered, expected, keys) == [
        'hooks.1.b=nothing instead of 3', 'model.depth=18 instead of 50',
        'model.norm.eps=1 instead of nothing']
    assert differences(altered, expected, keys, ('depth', 'norm', 'hooks.1.b')) == []
    assert differences(altered, expected, keys, ('epth', 'orm', 'b', 'eps')) == [
        'model.depth=18 instead of 50']


def test_records_are_of_what_was_evaluated(tmp_path):
    """With a stand-in for the runner, of which the tools' tests have real ones."""
    torch.save({'state_dict': {}, 'meta': {'epoch': 12, 'cfg': 'a = 1', 'hook_msgs': {}}},
               tmp_path / 'a.pth')
    runner = SimpleNamespace(log_dir=tmp_path, test_dataloader=SimpleNamespace(dataset=range(7)))
    path = record_evaluation(runner, 'configs/net.py', str(tmp_path / 'a.pth'),
                             {'mIoU': np.float32(.5), 'table': 'text'})
    record = json.loads(path.read_text())
    assert record == dict(config='configs/net.py', checkpoint=str(tmp_path / 'a.pth'), images=7,
                          meta=dict(epoch=12, cfg='a = 1'), metrics=dict(mIoU=.5))
