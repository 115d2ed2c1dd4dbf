"""tools/make_shapes.py, run as a user runs it."""
import pytest
from support.helpers import run_tool


@pytest.mark.parametrize('layout, name', [
    ('coco', 'val/000000000002.jpg'), ('coco2017', 'val2017/000000000002.jpg'),
    ('ade20k', 'annotations/validation/ADE_val_00000002.png')])
def test_command_line(tmp_path, layout, name):
    command = ['tools/make_shapes.py', tmp_path / 'set', '--layout', layout, '--train', 1,
               '--val', 2, '--size', 64, 96]
    assert f'1 + 2 images in {tmp_path / "set"}' in run_tool(*command)
    assert (tmp_path / 'set' / name).is_file()
    assert 'already holds a set made with' in run_tool(*command, '--seed', 1, expect=1)
