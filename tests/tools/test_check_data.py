"""tools/check_data.py, once as a user runs it, and its other ways in this process."""
import json
import runpy
import sys

import pytest
from support import broken
from support.broken import ANNOTATIONS, IMAGES, LABEL_MAPS, break_file
from support.helpers import ROOT
from support.helpers import run_tool as run

DETECTOR = 'configs/demo/maskrcnn_effformer_l1_shapes.py'
SEGMENTOR = 'configs/demo/semfpn_effformer_l1_shapes.py'


@pytest.fixture
def here(monkeypatch, capsys):
    """A function that runs the tool and returns (exit status or message, what it printed)."""

    def run_here(*command):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, 'argv', ['tools/check_data.py', *map(str, command)])
        with pytest.raises(SystemExit) as info:
            runpy.run_path('tools/check_data.py', run_name='__main__')
        printed = capsys.readouterr()
        return info.value.code, printed.out or printed.err

    return run_here


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    return broken.write_both(tmp_path_factory.mktemp('drawn'))


def test_clean_data(here, drawn):
    for config, root, name in ((DETECTOR, drawn / 'coco', 'CocoDataset'),
                               (SEGMENTOR, drawn / 'ade20k', 'BaseSegDataset')):
        status, printed = here(config, '--data-root', root, '--workers', 2)
        assert status == 0
        assert f'train: {name} of {root}/' in printed and f'\nval, test: {name} of' in printed
        assert printed.count(': 6 images') == printed.count(': 2 images') == 1
        assert printed.endswith('\nnothing is wrong\n')


def test_broken_data_of_a_detector(here, drawn, tmp_path):
    root = broken.copied(drawn / 'coco', tmp_path / 'coco')
    half = break_file(root / 'train/000000000002.jpg', IMAGES['half'][0])
    grey = [break_file(root / f'val/00000000000{i}.jpg', IMAGES['grey'][0]) for i in (1, 2)]
    path = root / 'annotations/instances_train.json'
    content = json.loads(path.read_text())
    item = content['annotations'][2]
    item.update(ANNOTATIONS['NaN'][0])
    path.write_text(json.dumps(content))
    printed = run('tools/check_data.py', DETECTOR, '--data-root', root, '--workers', 1,
                  '--show', 1, '--out', tmp_path / 'report.json', expect=1)
    assert '\n\nerror: truncated image (1)\n  training: ' in printed
    assert f'\n    train: {half} (image 2): ' in printed
    assert (f'\n    train: {path} (image {item["image_id"]}, annotation {item["id"]}): box [3, nan'
            in printed)
    assert (f'\n    val, test: {grey[0]} (image 1)\n    and 1 more\n') in printed
    assert printed.index('error: box not finite') < printed.index('note: grey image (2)')
    assert printed.endswith('\nerrors: 2, notes: 2\n')
    report = json.loads((tmp_path / 'report.json').read_text())
    assert sorted(fault['file'] for fault in report['faults']) == sorted(
        map(str, [half, path, *grey]))

    status, printed = here(DETECTOR, '--data-root', root, '--splits', 'val')
    assert status == 0 and 'train:' not in printed
    assert printed.endswith('\nerrors: 0, notes: 2\n')


def test_broken_data_of_a_segmentor(here, drawn, tmp_path):
    root = broken.copied(drawn / 'ade20k', tmp_path / 'ade20k')
    path = break_file(root / 'annotations/validation/ADE_val_00000001.png',
                      LABEL_MAPS['one too high'][0])
    status, printed = here(SEGMENTOR, '--data-root', root)
    assert status == 1
    assert (f'\n    val, test: {path}: 8 (72 px); expected 1 to 7, or 0 or 255 for what is ignored'
            in printed)
    assert printed.endswith('\nerrors: 1, notes: 0\n')


def test_wrong_arguments(here, tmp_path):
    message, _ = here(DETECTOR, '--data-root', tmp_path / 'gone')
    assert message.startswith('check_data.py: The data set of this config is not there:\n'
                              f'  {tmp_path}/gone does not exist')
    status, printed = here(DETECTOR, '--workers', 0)
    assert status == 2 and '--workers and --show: expected 1 or more' in printed
