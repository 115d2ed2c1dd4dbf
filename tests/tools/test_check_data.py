"""tools/check_data.py, run as a user runs it."""
import json

import pytest
from support import broken
from support.broken import ANNOTATIONS, IMAGES, LABEL_MAPS, break_file
from support.helpers import run_tool

DETECTOR = 'configs/demo/maskrcnn_effformer_l1_shapes.py'
TOOL = 'tools/check_data.py'
SEGMENTOR = 'configs/demo/semfpn_effformer_l1_shapes.py'


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    return broken.write_both(tmp_path_factory.mktemp('drawn'))


def test_clean_data(drawn):
    for config, root, name in ((DETECTOR, drawn / 'coco', 'CocoDataset'),
                               (SEGMENTOR, drawn / 'ade20k', 'BaseSegDataset')):
        printed = run_tool(TOOL, config, '--data-root', root, '--workers', 2)
        assert f'train: {name} of {root}/' in printed and f'\nval, test: {name} of' in printed
        assert printed.count(': 6 images') == printed.count(': 2 images') == 1
        assert printed.endswith('\nnothing is wrong\n')


def test_broken_data_of_a_detector(drawn, tmp_path):
    root = broken.copied(drawn / 'coco', tmp_path / 'coco')
    half = break_file(root / 'train/000000000002.jpg', IMAGES['half'][0])
    grey = [break_file(root / f'val/00000000000{i}.jpg', IMAGES['grey'][0]) for i in (1, 2)]
    path = root / 'annotations/instances_train.json'
    content = json.loads(path.read_text())
    item = content['annotations'][2]
    item.update(ANNOTATIONS['NaN'][0])
    path.write_text(json.dumps(content))
    printed = run_tool(TOOL, DETECTOR, '--data-root', root, '--workers', 1,
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

    printed = run_tool(TOOL, DETECTOR, '--data-root', root, '--splits', 'val')
    assert 'train:' not in printed
    assert printed.endswith('\nerrors: 0, notes: 2\n')


def test_broken_data_of_a_segmentor(drawn, tmp_path):
    root = broken.copied(drawn / 'ade20k', tmp_path / 'ade20k')
    path = break_file(root / 'annotations/validation/ADE_val_00000001.png',
                      LABEL_MAPS['one too high'][0])
    printed = run_tool(TOOL, SEGMENTOR, '--data-root', root, expect=1)
    assert (f'\n    val, test: {path}: 8 (72 px); expected 1 to 7, or 0 or 255 for what is ignored'
            in printed)
    assert printed.endswith('\nerrors: 1, notes: 0\n')


def test_wrong_arguments(tmp_path):
    printed = run_tool(TOOL, DETECTOR, '--data-root', tmp_path / 'gone', expect=1)
    assert ('check_data.py: The data set of this config is not there:\n'
            f'  {tmp_path}/gone does not exist') in printed and 'Traceback' not in printed
    printed = run_tool(TOOL, DETECTOR, '--workers', 0, expect=2)
    assert '--workers and --show: expected 1 or more' in printed
