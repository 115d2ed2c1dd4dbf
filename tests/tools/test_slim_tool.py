"""From a supernet to the training of a network found in it, as a user does it."""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest
import torch
from mmengine.config import Config
from support.helpers import made_up_table
from support.helpers import run_tool as run

from mmeffformer.datasets import write_ade20k

ROOT = Path(__file__).resolve().parents[2]
CONFIG = 'tests/data/semfpn_super_tiny.py'


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """(data root, trained supernet, latency table)."""
    folder = tmp_path_factory.mktemp('slim')
    write_ade20k(folder / 'data', train=8, val=4, size=(64, 96), progress=False)
    run('tools/train.py', CONFIG, '--data-root', folder / 'data', '--work-dir', folder / 'train')
    table = made_up_table(folder / 'table.json', (64, 96), (16, 32, 48, 48),
                          lambda part: sum(part.widths) / 16)
    return folder / 'data', folder / 'train/iter_2.pth', table


def command(made, work_dir, *more):
    data, checkpoint, table = made
    return ['tools/slim.py', CONFIG, checkpoint, '--data-root', data, '--table', table,
            '--work-dir', work_dir, '--batches', '2', *more]


def journal(work_dir) -> dict:
    return json.loads((work_dir / 'journal.json').read_text())


def test_search_and_training(made, tmp_path):
    printed = run(*command(made, tmp_path, '--target', '60%', '--rounds', '0', '--baselines',
                           '--beside', 'l1=30'))
    written = journal(tmp_path)
    assert written['settings']['target'] == '60 %'
    steps = written['steps']
    assert steps[-1]['ms'] <= .6 * steps[0]['ms'] < steps[-2]['ms']
    assert written['evaluations'] <= len(written['accuracies']) <= 2 * written['evaluations'] + 1
    for name in ('slimmed', 'uniform', 'random'):
        assert f'{name}: mIoU' in printed and f'tools/train.py {tmp_path / name}.py' in printed
        cfg = Config.fromfile(tmp_path / f'{name}.py')
        meta = torch.load(tmp_path / f'{name}.pth', weights_only=True)['meta']
        assert meta['arch'] == cfg.model.backbone.arch
        assert meta['accuracy'] == written['accuracies'][meta['choices']]
    assert cv2.imread(str(tmp_path / 'path.png')).shape[1] > 600
    run('tools/train.py', tmp_path / 'slimmed.py', '--work-dir', tmp_path / 'trained')
    assert (tmp_path / 'trained/iter_2.pth').exists()


def test_a_killed_search_ends_in_the_same_network(made, tmp_path):
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    rest = ('--target', '50%', '--rounds', '0')
    run(*command(made, whole, *rest))
    process = subprocess.Popen([sys.executable, *map(str, command(made, killed, *rest))], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:  # until it has evaluated a few networks
        if (killed / 'journal.json').exists() and len(journal(killed)['accuracies']) > 3:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(.01)
    process.wait()
    assert not (killed / 'slimmed.py').exists()
    before = journal(killed)['accuracies']
    assert 3 < len(before) < len(journal(whole)['accuracies'])
    run(*command(made, killed, *rest))
    assert journal(killed) == journal(whole)
    states = [torch.load(folder / 'slimmed.pth', weights_only=True)['state_dict']
              for folder in (whole, killed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_what_is_wrong_is_told(made, tmp_path):
    data, checkpoint, table = made
    told = run(*command(made, tmp_path, '--target', '1000'), expect=1)
    assert 'target 1000 ms cannot be reached: by the table slimming goes from' in told
    assert 'Traceback' not in told
    told = run(*command((data, checkpoint, tmp_path / 'none.json'), tmp_path, '--target', '50%'),
               expect=1)
    assert "none.json' does not exist; tools/latency_table.py makes one" in told
    told = run(*command((data, data / 'shapes.json', table), tmp_path, '--target', '50%'),
               expect=1)
    assert 'expected a torch checkpoint' in told and 'Traceback' not in told
    told = run(*command(made, tmp_path, '--target', 'fast'), expect=2)
    assert "'fast'" in told
    told = run(*command(made, tmp_path, '--target', '50%', '--beside', 'l9=3'), expect=1)
    assert "--beside 'l9=3': expected one of l1, l3, l7" in told
    assert not (tmp_path / 'journal.json').exists()
