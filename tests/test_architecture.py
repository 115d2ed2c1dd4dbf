"""The imports between the rooms, and the length of files and functions.

The contracts are in pyproject.toml under ``tool.importlinter``.
"""
import ast
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports
from support.helpers import run_code

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for folder in ('mmeffformer', 'tools')
         for path in sorted((ROOT / folder).rglob('*.py')) if '.mim' not in path.parts]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_rooms_import_downwards_only():
    assert lint_imports(str(ROOT / 'pyproject.toml'), no_cache=True, no_logo=True) == 0


def test_networks_load_no_operators_and_no_detection_library():
    """A fresh process, as this one has imported everything."""
    code = ('import sys, mmeffformer; mmeffformer.EfficientFormer("l1"); '
            'print(*{"mmcv.ops", "mmcv._ext", "mmdet", "mmseg", "mmpretrain"} & {*sys.modules})')
    found = subprocess.run([sys.executable, '-c', code], text=True, capture_output=True,
                           check=True)
    assert found.stdout.split() == []


def test_files_have_at_most_400_lines():
    lengths = {name(path): len(path.read_text().splitlines()) for path in FILES}
    assert not {path for path, lines in lengths.items() if lines > 400}


def test_functions_have_at_most_50_lines():
    too_long = [(name(path), node.name) for path in FILES
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                and node.end_lineno - node.lineno >= 50]
    assert too_long == []


@pytest.mark.parametrize('given, expected', [(None, '1'), ('0', '0')])
def test_torch_is_asked_for_huge_pages(given, expected, monkeypatch):
    monkeypatch.delenv('THP_MEM_ALLOC_ENABLE', raising=False)
    if given:
        monkeypatch.setenv('THP_MEM_ALLOC_ENABLE', given)
    assert run_code('import os, mmeffformer; print(os.environ["THP_MEM_ALLOC_ENABLE"])'
                    ).split()[-1] == expected
