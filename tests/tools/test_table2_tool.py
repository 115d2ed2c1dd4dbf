"""tools/table2.py, and that it reads what tools/train.py and tools/test.py leave."""
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import pytest
import torch
from support.helpers import ROOT
from support.helpers import run_tool as run

from mmeffformer.apis import table2
from mmeffformer.apis.runs import read_runs
from mmeffformer.datasets import write_ade20k

NAME = 'semfpn_effformer_l1'


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    """A row's config that takes seconds, trained, evaluated and evaluated as a converted one."""
    root = tmp_path_factory.mktemp('table2')
    data, work_dirs = root / 'shapes', root / 'work_dirs'
    write_ade20k(data, train=8, val=3, size=(64, 96), progress=False)
    config = root / f'configs/segmentation/{NAME}.py'
    config.parent.mkdir(parents=True)
    config.write_text((ROOT / 'tests/data/semfpn_tiny.py').read_text()
                      + 'auto_scale_lr = dict(base_batch_size=4)\n')
    options = ['--data-root', data, '--work-dir']
    run('tools/train.py', config, *options, work_dirs / NAME)
    trained = work_dirs / NAME / 'iter_2.pth'
    run('tools/test.py', config, trained, *options, work_dirs / NAME)
    state = torch.load(trained, map_location='cpu', weights_only=False)['state_dict']
    meta = dict(converted_from='theirs.pth', bias_mode='legacy')  # as tools/convert_checkpoint.py
    torch.save(dict(state_dict=state, meta=meta), root / 'l1.pth')
    run('tools/test.py', config, root / 'l1.pth', *options, work_dirs / 'converted' / NAME,
        '--cfg-options', 'model.backbone.bias_mode=legacy')
    return root


@pytest.fixture
def three_images(monkeypatch):
    """A Table 2 whose validation part has as many images as the drawn one."""
    monkeypatch.setitem(table2.TASKS, 'seg', replace(table2.TASKS['seg'], data=('shapes', 3)))


def collect(root, work_dirs):
    runs, problems = read_runs(work_dirs, {NAME})
    rows = table2.find_rows(['effformer_l1'])
    (entry,), left_out = table2.collect(root, runs, rows, ['seg'])
    assert problems == []
    return entry, left_out


def test_what_the_tools_leave_is_a_rows_result(measured, three_images):
    entry, left_out = collect(measured, measured / 'work_dirs')
    assert left_out == []
    trained, converted = entry.results
    assert (str(trained), str(converted)) == ('trained here', 'converted checkpoint')
    assert trained.measurement.checkpoint.endswith('iter_2.pth')
    record, = (measured / 'work_dirs' / NAME).glob('*/evaluation.json')
    record = json.loads(record.read_text())
    assert record['images'] == 3 and record['meta']['iter'] == 2
    assert trained.figures == {'mIoU': round(record['metrics']['mIoU'], 4)}
    assert 0 < trained.figures['mIoU'] < 100
    # Two iterations leave next to nothing in the biases, by which the modes differ.
    assert converted.figures['mIoU'] == pytest.approx(trained.figures['mIoU'], abs=1)


def test_a_trainings_own_validation_is_a_rows_result(measured, three_images, tmp_path):
    shutil.copytree(measured / 'work_dirs' / NAME, tmp_path / NAME)
    shutil.rmtree(next((tmp_path / NAME).glob('*/evaluation.json')).parent)
    entry, _ = collect(measured, tmp_path)
    result, = entry.results
    assert str(result) == 'trained here' and result.measurement.checkpoint is None
    assert result.measurement.images == (3, 3)
    scalars, = tmp_path.rglob('scalars.json')
    last = json.loads(scalars.read_text().splitlines()[-1])
    assert result.figures == {'mIoU': round(last['mIoU'], 4)}


def test_without_the_training_the_checkpoint_tells_of_it(measured, three_images, tmp_path):
    shutil.copytree(measured / 'work_dirs' / NAME, tmp_path / NAME)
    shutil.rmtree(next((tmp_path / NAME).rglob('scalars.json')).parents[1])
    entry, _ = collect(measured, tmp_path)
    # All but the number of processes, which is in the training's log alone.
    assert str(*entry.results) == (
        'trained here, batches of an unknown number of images instead of 4')


def test_several_processes_leave_one_record(measured, tmp_path):
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        port = listener.getsockname()[1]
    done = subprocess.run(
        ['bash', 'tools/dist_test.sh', measured / f'configs/segmentation/{NAME}.py',
         measured / 'work_dirs' / NAME / 'iter_2.pth', '2', '--data-root', measured / 'shapes',
         '--work-dir', tmp_path, '--cfg-options', 'env_cfg.dist_cfg.backend=gloo'],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
        env={**os.environ, 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
             'PORT': str(port), 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stdout[-3000:]
    record, = tmp_path.glob('*/evaluation.json')
    assert json.loads(record.read_text())['images'] == 3


def test_against_the_real_config_it_is_not(measured, three_images):
    entry, _ = collect(ROOT, measured / 'work_dirs')
    trained, _ = entry.results
    assert trained.caveats[0] == '2 of 40000 iterations'
    assert 'optim_wrapper.optimizer.lr=0.001 instead of 0.0002' in trained.caveats
    assert str(trained).endswith('more departures')


def test_report_of_drawn_data_has_no_results(measured, call, tmp_path):
    code, printed = call(*map(str, [
        'report', measured / 'work_dirs', '--row', 'effformer_l1', 'effformerv2_s0', '--markdown',
        tmp_path / 'a/table2.md', '--json', tmp_path / 'a/table2.json', '--plot',
        tmp_path / 'a/table2.png']))
    text = printed.out
    assert code == 0 and text == (tmp_path / 'a/table2.md').read_text()
    assert '| EfficientFormer-L1 | paper; here: not run | 38.9 |' in text
    assert '| EfficientFormerV2-S0 | paper: not published; here: not run | – |' in text
    assert text.count('is of 3 images, and the validation part of ADE20K has 2000') == 3
    assert ('| EfficientFormer-L1 | 12.3 | 11.4 | 31.5 | 31.5 | 15.6 | 1.3 | 1.29 | 83.2 | 20.0 |'
            in text)
    told = json.loads((tmp_path / 'a/table2.json').read_text())
    assert [(entry['backbone'], entry['task']) for entry in told['entries']] == [
        (name, task) for name in ('EfficientFormer-L1', 'EfficientFormerV2-S0')
        for task in ('det', 'seg')]
    network = told['entries'][0]['network']
    assert network['params'] == 31_511_432 and network['macs_shape'] == [800, 1344]
    assert cv2.imread(str(tmp_path / 'a/table2.png')).std() > 10


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls the tool within this process; returns its exit code, and what it printed."""
    def called(*options):
        monkeypatch.setattr(sys, 'argv', ['tools/table2.py', *options])
        code = 0
        try:
            runpy.run_path(str(ROOT / 'tools/table2.py'), run_name='__main__')
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr()
    return called


def test_plan_is_a_shell_script(call, tmp_path):
    code, printed = call('plan', '--task', 'seg')
    assert code == 0
    (tmp_path / 'plan.sh').write_text(printed.out)
    subprocess.run(['bash', '-n', tmp_path / 'plan.sh'], check=True)
    assert printed.out.count('tools/dist_train.sh configs/segmentation/') == 13
    assert 'detection' not in printed.out


@pytest.mark.parametrize('options, message', [
    (['report', 'nowhere'], 'table2.py: nowhere is no folder'),
    (['report', '--row', 'l9'], "row 'l9' is unknown; choose from resnet18"),
    (['plan', '--gpus', '0'], '--gpus 0: expected 1 or more'),
    ([], 'required: command'),
])
def test_mistakes_are_explained(call, options, message):
    code, printed = call(*options)
    assert code != 0 and message in f'{code} {printed.err}'
