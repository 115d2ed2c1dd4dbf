"""The doctor on a working environment and on simulated problems."""
import subprocess
import sys

import pytest

from mmeffformer import ops
from mmeffformer.__main__ import main
from mmeffformer.apis import doctor
from mmeffformer.datasets import write_ade20k, write_coco


def findings(data):
    return {finding.subject: finding for finding in doctor.examine(data)}


def test_working_environment(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'mmeffformer', 'doctor', '--data', tmp_path],
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    assert 'problem' not in done.stdout
    for words in ('mmdet configs', 'mmseg configs', 'mmpretrain configs',
                  "type='mmeffformer.EfficientFormer'", "type='mmeffformer.EfficientFormerV2'"):
        assert words in done.stdout


def test_operators_in_use_are_named(tmp_path):
    found = findings(tmp_path)['operators']
    assert not found.remedy
    stand_ins = ops.diagnose()[0] == 'torchvision'
    for words in ('torchvision', 'python -m mmeffformer run COMMAND'):
        assert (words in found.found) == stand_ins


@pytest.mark.parametrize('state, remedy', [
    (('broken', 'undefined symbol: xyz'), 'install one built for this torch'),
    (('absent', ''), 'pip install')])
def test_broken_or_absent_operators(monkeypatch, tmp_path, state, remedy):
    monkeypatch.setattr(ops, 'diagnose', lambda: state)
    found = findings(tmp_path)['operators']
    assert state[1] in found.found and remedy in found.remedy


def test_originals_and_forks_side_by_side(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, 'version', lambda name: '1.0')
    found = findings(tmp_path)['mmdet']
    assert 'mmdet 1.0' in found.found and 'onedl-mmdetection 1.0' in found.found
    assert 'pip uninstall mmdet onedl-mmdetection' in found.remedy


def test_library_that_fails_to_import(monkeypatch, tmp_path):
    def fail(name):
        raise ImportError(f'{name} wants another numpy')

    monkeypatch.setattr(doctor, 'import_module', fail)
    found = findings(tmp_path)
    assert 'wants another numpy' in found['mmseg'].found
    assert 'versions are incompatible' in found['mmseg'].remedy
    assert 'import mmdet' in found['in mmdet configs'].remedy


def test_backbone_that_does_not_resolve(monkeypatch, tmp_path):
    monkeypatch.setattr('mmdet.registry.MODELS.get', lambda name: None)
    found = findings(tmp_path)
    assert found['in mmdet configs'].remedy and not found['in mmseg configs'].remedy


def test_data_folders(tmp_path):
    subject = f'data {tmp_path / "coco"}'
    assert 'not found' in findings(tmp_path)[subject].found
    write_coco(tmp_path / 'coco', train=1, val=1, size=(64, 64), coco2017=True, progress=False)
    assert findings(tmp_path)[subject] == (subject, 'complete', '')
    (tmp_path / 'coco/annotations/instances_val2017.json').unlink()
    assert 'instances_val2017.json' in findings(tmp_path)[subject].remedy
    subject = f'data {tmp_path / "ade/ADEChallengeData2016"}'
    write_ade20k(tmp_path / 'ade/ADEChallengeData2016', train=1, val=1, size=(64, 64),
                 progress=False)
    assert findings(tmp_path)[subject] == (subject, 'complete', '')


def test_problems_give_exit_code_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, 'argv', ['mmeffformer', 'doctor', '--data', str(tmp_path)])
    monkeypatch.setattr(ops, 'diagnose', lambda: ('broken', 'undefined symbol'))
    assert main() == 1
    assert '1. operators: pip uninstall this mmcv' in capsys.readouterr().out
