import runpy
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / 'tools/make_shapes.py'


@pytest.mark.parametrize('layout,name', [
    ('coco', 'val/000000000002.jpg'), ('coco2017', 'val2017/000000000002.jpg'),
    ('ade20k', 'annotations/validation/ADE_val_00000002.png')])
def test_command_line(tmp_path, monkeypatch, capsys, layout, name):
    argv = [str(TOOL), str(tmp_path / 'set'), '--layout', layout, '--train', '1', '--val', '2',
            '--size', '64', '96']
    monkeypatch.setattr(sys, 'argv', argv)
    runpy.run_path(str(TOOL), run_name='__main__')
    assert f'1 + 2 images in {tmp_path / "set"}' in capsys.readouterr().out
    assert (tmp_path / 'set' / name).is_file()
    monkeypatch.setattr(sys, 'argv', argv + ['--seed', '1'])
    with pytest.raises(SystemExit, match='already holds a set made with'):
        runpy.run_path(str(TOOL), run_name='__main__')
