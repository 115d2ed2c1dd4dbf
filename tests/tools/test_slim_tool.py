"""From a supernet to the training of a network found in it, with the tools."""
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
from mmeffformer.latency import phone
from mmeffformer.latency.parts import grid, part_bytes
from mmeffformer.latency.table import Part, parts

ROOT = Path(__file__).resolve().parents[2]
CONFIG = 'tests/data/semfpn_super_tiny.py'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """(data root, trained supernet, latency table)."""
    folder = tmp_path_factory.mktemp('slim')
    write_ade20k(folder / 'data', train=8, val=4, size=(64, 96), progress=False)
    run('tools/train.py', CONFIG, '--data-root', folder / 'data', '--work-dir', folder / 'train')
    table = made_up_table(folder / 'table.json', (64, 96), (16, 32, 48, 48),
                          lambda part: sum(part.widths) / 16)
    return folder / 'data', folder / 'train/iter_2.pth', table


def command(trained, work_dir, *more):
    data, checkpoint, table = trained
    return ['tools/slim.py', CONFIG, checkpoint, '--data-root', data, '--table', table,
            '--work-dir', work_dir, '--batches', '2', *more]


def journal(work_dir) -> dict:
    return json.loads((work_dir / 'journal.json').read_text())


OPTIONS = ('--target', '60%', '--rounds', '0', '--baselines', '--beside', 'l1=30')


@pytest.fixture(scope='module')
def searched(trained, tmp_path_factory):
    """(work dir of a search, its output)."""
    folder = tmp_path_factory.mktemp('searched')
    return folder, run(*command(trained, folder, *OPTIONS))


def test_search_and_training(searched, tmp_path):
    folder, printed = searched
    written = journal(folder)
    assert written['settings']['target'] == '60 %'
    steps = written['steps']
    assert steps[-1]['ms'] <= .6 * steps[0]['ms'] < steps[-2]['ms']
    assert written['evaluations'] <= len(written['accuracies']) <= 2 * written['evaluations'] + 1
    for name in ('slimmed', 'uniform', 'random'):
        assert f'{name}: mIoU' in printed and f'tools/train.py {folder / name}.py' in printed
        cfg = Config.fromfile(folder / f'{name}.py')
        meta = torch.load(folder / f'{name}.pth', weights_only=True)['meta']
        assert meta['arch'] == cfg.model.backbone.arch
        assert meta['accuracy'] == written['accuracies'][meta['choices']]
    assert cv2.imread(str(folder / 'path.png')).shape[1] > 600
    run('tools/train.py', folder / 'slimmed.py', '--work-dir', tmp_path / 'trained')
    assert (tmp_path / 'trained/iter_2.pth').exists()


def made_up_ms(part) -> float:
    """Return ms in proportion to the multiply-accumulates of a part."""
    rows, cols = grid(part.stage, (64, 96))
    return .01 + (part.kind != 'overhead' and 1e-8 * rows * cols * part_bytes(part, (64, 96)))


def test_search_for_a_phone(trained, monkeypatch, tmp_path):
    """Its parts are exported, timed and imported; nothing is measured here."""
    monkeypatch.setattr(phone, '_export', lambda row, path, header: path.touch())
    header = phone.phone_header('executorch', (64, 96), (16, 32, 48, 48), 16)
    listed = phone.export_parts(header, tmp_path / 'parts')
    lines = [','.join(phone.COLUMNS)]
    for row in phone.rows_of(header):
        ms = (row.copies * made_up_ms(row.what) if isinstance(row.what, Part)
              else sum(map(made_up_ms, parts(row.what))))
        lines.append(f'{row.name}.pte,{row.name},{row.copies},{ms}')
    listed.write_text('\n'.join(lines))
    table = tmp_path / 'table.json'
    run('tools/latency_table.py', '--import', listed, '--device-name', 'Pixel', '--out', table)
    printed = run(*command((*trained[:2], table), tmp_path / 'slim', '--target', '70%'))
    assert 'executorch, 64 x 96 px, Pixel' in printed and 'nothing is measured' in printed
    steps = journal(tmp_path / 'slim')['steps']
    assert steps[-1]['ms'] <= .7 * steps[0]['ms'] < steps[-2]['ms']
    assert (tmp_path / 'slim/slimmed.py').exists()


def test_killed_search_ends_in_the_same_networks(trained, searched, tmp_path):
    """It evaluates no network twice."""
    whole, _ = searched
    process = subprocess.Popen([sys.executable, *map(str, command(trained, tmp_path, *OPTIONS))],
                               cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:  # until it has evaluated a few networks
        if (tmp_path / 'journal.json').exists() and len(journal(tmp_path)['accuracies']) > 3:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(.01)
    process.wait()
    assert not (tmp_path / 'slimmed.py').exists()
    before = journal(tmp_path)['accuracies']
    assert 3 < len(before) < len(journal(whole)['accuracies'])
    printed = run(*command(trained, tmp_path, *OPTIONS))
    evaluated = [key for key in journal(whole)['accuracies'] if f'{key}: mIoU' in printed]
    assert len(evaluated) == len(journal(whole)['accuracies']) - len(before)
    assert not {*evaluated} & {*before}
    assert journal(tmp_path) == journal(whole)
    for name in ('slimmed', 'uniform', 'random'):
        states = [torch.load(folder / f'{name}.pth', weights_only=True)['state_dict']
                  for folder in (whole, tmp_path)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_user_errors(trained, tmp_path):
    data, checkpoint, table = trained
    for files, options, message in [
            (trained, ['--target', '1000'],
             'target 1000 ms cannot be reached: by the table slimming goes from'),
            ((data, checkpoint, tmp_path / 'none.json'), ['--target', '50%'],
             "none.json' does not exist"),
            ((data, data / 'shapes.json', table), ['--target', '50%'],
             'expected a torch checkpoint'),
            (trained, ['--target', '50%', '--beside', 'l9=3'],
             "--beside 'l9=3': expected one of l1, l3, l7")]:
        printed = run(*command(files, tmp_path, *options), expect=1)
        assert message in printed and 'Traceback' not in printed
    assert not (tmp_path / 'journal.json').exists()
