"""Finding the checkpoint that a run is resumed from."""
import os
import time

import pytest
import torch

from mmeffformer.engine.checkpoints import checkpoints, describe_resume_point, newest_checkpoint
from mmeffformer.engine.hooks import CheckpointHook


def save(path, complete=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state_dict=dict(weight=torch.ones(100))), path)
    if not complete:
        path.write_bytes(path.read_bytes()[:-200])
    return path


def test_newest_first_and_only_what_can_be_resumed(tmp_path):
    for name in ('iter_8', 'iter_12', 'iter_100', 'best_mIoU_iter_200', '.tmp-iter_300'):
        save(tmp_path / f'{name}.pth')
    (tmp_path / 'iter_999.pth').mkdir()
    assert [path.stem for path in checkpoints(tmp_path)] == ['iter_100', 'iter_12', 'iter_8']
    assert newest_checkpoint(tmp_path) == str(tmp_path / 'iter_100.pth')
    assert describe_resume_point(tmp_path) == \
        f'the last complete checkpoint is {tmp_path}/iter_100.pth'


def test_no_checkpoints(tmp_path):
    assert checkpoints(tmp_path / 'none') == [] and newest_checkpoint(tmp_path) is None
    assert describe_resume_point(tmp_path) == 'there is no earlier checkpoint'


def test_last_checkpoint_may_name_other_folders_and_patterns(tmp_path):
    save(tmp_path / 'work/iter_90.pth')  # of an earlier run
    save(tmp_path / 'out/step-40.pth')
    last = save(tmp_path / 'out/step-20.pth')
    (tmp_path / 'work/last_checkpoint').write_text(f'{tmp_path}/out/step-20.pth\n')
    os.utime(tmp_path / 'work/last_checkpoint', (time.time() + 9,) * 2)
    assert newest_checkpoint(tmp_path / 'work') == str(last)
    # Killed between the checkpoint and its record.
    newest = save(tmp_path / 'out/step-30.pth')
    os.utime(newest, (time.time() + 99,) * 2)
    assert newest_checkpoint(tmp_path / 'work') == str(newest)
    (tmp_path / 'work/last_checkpoint').write_text('')  # killed while it was written
    assert newest_checkpoint(tmp_path / 'work') == str(tmp_path / 'work/iter_90.pth')


def test_a_copied_work_dir_uses_its_own_checkpoints(tmp_path):
    for step, folder in ((4, 'copy'), (4, 'original'), (8, 'original')):
        save(tmp_path / folder / f'iter_{step}.pth')
    (tmp_path / 'copy/last_checkpoint').write_text(f'{tmp_path}/original/iter_4.pth')
    assert newest_checkpoint(tmp_path / 'copy') == str(tmp_path / 'copy/iter_4.pth')


def test_falls_back_as_often_as_needed(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr('mmeffformer.engine.checkpoints.print_log',
                        lambda text, *_, **__: warnings.append(text))
    for i in (1, 2, 3):
        save(tmp_path / f'epoch_{i}.pth', complete=i == 1)
    assert newest_checkpoint(tmp_path) == str(tmp_path / 'epoch_1.pth')
    for i, text in zip((3, 2), warnings, strict=True):
        assert f'epoch_{i}.pth is a broken or truncated' in text
        assert f'Resuming from an earlier checkpoint, {tmp_path}/epoch_1.pth' in text
    (tmp_path / 'epoch_1.pth').unlink()
    with pytest.raises(ValueError, match='of 2 checkpoints in .* none can be read(.|\n)*epoch_3'):
        newest_checkpoint(tmp_path)


def test_misspelt_arguments_are_reported_before_training():
    with pytest.raises(ValueError, match='CheckpointHook has no argument intervall'):
        CheckpointHook(intervall=1, max_keep_ckpts=2)
