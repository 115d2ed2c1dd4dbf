"""The content of a wheel. `make wheel-test` installs one and tries it."""
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from mmengine.config import Config

from mmeffformer import patch_mmengine

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """The wheel of this tree, built from a copy."""
    folder = tmp_path_factory.mktemp('wheel')
    for name in ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'model-index.yml'):
        (folder / 'tree').mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / 'tree')
    for name in ('mmeffformer', 'configs', 'tools'):
        shutil.copytree(ROOT / name, folder / 'tree' / name,
                        ignore=shutil.ignore_patterns('.mim'))
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps',
                    '--no-build-isolation', '-w', folder, folder / 'tree'], check=True)
    path, = folder.glob('*.whl')
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_configs_and_tools_are_inside(wheel):
    names = set(wheel.namelist())
    for path in [*ROOT.glob('configs/**/*.py'), *ROOT.glob('configs/**/*.yml'),
                 *ROOT.glob('tools/**/*.py'), *ROOT.glob('tools/*.sh'), ROOT / 'model-index.yml']:
        assert f'mmeffformer/.mim/{path.relative_to(ROOT)}' in names
    assert not any('tests/' in name or '__pycache__' in name for name in names)
    assert {'mmeffformer/models/efficientformer.py', 'mmeffformer/py.typed',
            'mmeffformer/ops/startup/sitecustomize.py'} <= names


def test_no_openmmlab_library_is_required_by_name(wheel):
    name, = (name for name in wheel.namelist() if name.endswith('dist-info/METADATA'))
    metadata = message_from_string(wheel.read(name).decode())
    required = [line for line in metadata.get_all('Requires-Dist') if 'extra' not in line]
    assert {line.split('>')[0].strip() for line in required} == {
        'torch', 'torchvision', 'numpy', 'rich', 'safetensors', 'huggingface_hub'}
    assert {'onedl', 'openmmlab', 'test'} <= {*metadata.get_all('Provides-Extra')}
    assert metadata['License'] == 'Apache-2.0' or metadata['License-Expression'] == 'Apache-2.0'


@pytest.mark.parametrize('base, kind', [
    ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', 'RetinaNet'),
    ('mmseg::sem_fpn/fpn_r50_4xb2-80k_cityscapes-512x1024.py', 'EncoderDecoder'),
    ('mmeffformer::segmentation/semfpn_effformer_l3.py', 'EncoderDecoder')])
def test_configs_inherit_from_the_libraries(base, kind, tmp_path, monkeypatch):
    monkeypatch.setattr('subprocess.check_call', lambda *args: pytest.fail(f'runs {args}'))
    monkeypatch.setattr('os.system', lambda *args: pytest.fail(f'runs {args}'))
    config = tmp_path / 'mine.py'
    config.write_text(f"_base_ = '{base}'\n")
    patch_mmengine()
    assert Config.fromfile(config).model.type == kind
