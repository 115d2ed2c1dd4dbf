"""The tools in tools/dev that have no test with what they check."""
import runpy
import sys

import pytest
from support.helpers import ROOT, run_tool


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """Return the functions of the tool, and run it without downloads."""
    tool = runpy.run_path(str(ROOT / 'tools/dev/bundle_wheels.py'))

    def fetch(name, version, python, out):
        (out / f'{name}-{version}.whl').write_bytes(bytes(2 ** 19))

    def run(*arguments):
        monkeypatch.setitem(tool['main'].__globals__, 'fetch', fetch)
        monkeypatch.setattr(sys, 'argv', ['bundle_wheels.py', *arguments, '--out',
                                          str(tmp_path / 'wheels')])
        tool['main']()
        return {path.name.rpartition('-')[0] for path in (tmp_path / 'wheels').iterdir()}

    return tool, run


def test_what_the_machine_lacks_is_bundled(bundle, tmp_path, capsys):
    tool, run = bundle
    assert {'mmcv', 'torch', 'numpy'} & {*tool['needs'](['onedl-mmcv'], '3.12')} == {'numpy'}
    everything, without_timm = run(), run('--present', 'torch', 'torchvision')
    assert {'timm', 'safetensors'} <= without_timm - everything
    assert not {'torch', 'torchvision', 'sympy', 'mmeffformer'} & without_timm
    (tmp_path / 'freeze.txt').write_text('numpy==2.5.2\nopencv_python==4\n# a note\n-e .\ntorch\n')
    found = run('--present', str(tmp_path / 'freeze.txt'))
    assert not {'numpy', 'opencv-python', 'torch'} & found and 'pillow' in found
    printed = capsys.readouterr().out
    assert f'{len(found)} wheels, {len(found) / 2:.1f} MiB' in printed
    assert f'--target site {tmp_path}/wheels/*.whl' in printed
    (tmp_path / 'wheels/notes.txt').write_text('not a wheel')
    run()
    assert (tmp_path / 'wheels/notes.txt').exists()
    with pytest.raises(SystemExit, match='--present freeze.txt: neither a file nor an installed'):
        run('--present', 'freeze.txt')
    with pytest.raises(SystemExit, match='MiB is more than --limit 3. Name with --present what'):
        run('--limit', '3')


def test_a_package_without_a_wheel(bundle, tmp_path):
    with pytest.raises(ValueError, match='nonesuch-package==1 has no wheel for Python 3.12'):
        bundle[0]['fetch']('nonesuch-package', '1', '3.12', tmp_path)


def test_roi_align_is_timed():
    printed = run_tool('tools/dev/time_roi_align.py', '--shape', '64', '64',
                       '--rois', '8', '--rounds', '1')
    assert '8 RoIs to 14 x 14, and backward: weighted sums' in printed
