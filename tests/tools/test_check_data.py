"""tools/check_data.py, run as a user runs it."""
import pytest
from support import broken
from support.broken import IMAGES, LABEL_MAPS, break_file
from support.helpers import run_tool

DETECTOR = 'configs/demo/maskrcnn_effformer_l1_shapes.py'
TOOL = 'tools/check_data.py'
SEGMENTOR = 'tests/data/semfpn_tiny.py'


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    return broken.write_both(tmp_path_factory.mktemp('drawn'))


def test_sound_data(drawn):
    printed = run_tool(TOOL, DETECTOR, '--data-root', drawn / 'coco', '--workers', 2)
    assert '\nnote: val_dataloader: 2 samples; circle 1, triangle 1, star 1, ring 2\n' in printed
    assert 'coco/bbox_mAP 1, ' in printed and printed.endswith('\nerrors: 0, warnings: 0\n')
    assert 'test_dataloader' not in printed  # the same as val_dataloader


def test_broken_data(drawn, tmp_path):
    root = broken.copied(drawn / 'ade20k', tmp_path / 'ade20k')
    path = break_file(root / 'annotations/validation/ADE_val_00000001.png',
                      LABEL_MAPS['one too high'][0])
    half = break_file(root / 'images/training/ADE_train_00000001.jpg', IMAGES['half'][0])
    printed = run_tool(TOOL, SEGMENTOR, '--data-root', root, expect=1)
    assert f'\nerror: LoadImageFromFile failed on {half} ' in printed
    assert f'with label map {path}: label values [7] are neither classes (0 to 6) nor' in printed
    assert '1 label maps have 7, neither a class nor ignore_index=255 of IoUMetric' in printed
    assert printed.endswith('\nerrors: 3, warnings: 1\n') and 'Traceback' not in printed
    printed = run_tool(TOOL, SEGMENTOR, '--data-root', root, '--splits', 'val', expect=1)
    assert 'train_dataloader' not in printed


def test_wrong_arguments(tmp_path):
    printed = run_tool(TOOL, DETECTOR, '--data-root', tmp_path / 'gone', expect=1)
    assert ('check_data.py: The data set of this config is not there:\n'
            f'  {tmp_path}/gone does not exist') in printed and 'Traceback' not in printed
    printed = run_tool(TOOL, DETECTOR, '--workers', 0, expect=2)
    assert '--workers and --limit: expected 1 or more' in printed
