"""The check on a GPU: its commands, verdicts and reports, without a GPU."""
import json
import os
import runpy
import shlex
import sys

import pytest
import torch
from support.helpers import ROOT, assert_parsed

PARTS = runpy.run_path(str(ROOT / 'tools/gpu_check.py'))['PARTS']
COMMANDS = sorted({command.format(out='out') for commands in PARTS.values() for command in commands
                   if command.startswith('tools/')})
JUNIT = """<testsuites><testsuite>
<testcase name="test_half[l1-bf16]"><properties><property name="error" value="0.02"/></properties>
</testcase>
<testcase name="test_half[s0-bf16]"><properties><property name="error" value="0.04"/></properties>
</testcase>
<testcase name="test_half[s0-fp16]"><properties><property name="error" value="0.003"/></properties>
</testcase>
<testcase name="test_jobs"><failure message="AssertionError: no&#10;more"/></testcase>
<testcase name="test_other"><skipped/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Return a function that runs the tool in this process, as if there were a GPU."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'a GPU')

    def run(parts, *arguments):
        tool = runpy.run_path(str(ROOT / 'tools/gpu_check.py'))
        monkeypatch.setitem(tool['main'].__globals__, 'PARTS', parts)
        monkeypatch.setattr(sys, 'argv', ['gpu_check.py', *arguments, '--out', str(tmp_path)])
        tool['main']()

    return run


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_are_parsed(command, monkeypatch):
    tool, *arguments = shlex.split(command)
    assert_parsed(tool, arguments, monkeypatch)


def test_paths_of_the_tests_exist():
    tests = [command for commands in PARTS.values() for command in commands
             if command.startswith('pytest')]
    assert len(tests) == 3 and all((ROOT / word).is_dir() for command in tests
                                   for word in command.split() if word.startswith('tests/'))


def test_a_failure_ends_nothing_else(check, tmp_path, capsys):
    (tmp_path / 'found').mkdir()
    (tmp_path / 'found/junit.xml').write_text(JUNIT)
    (tmp_path / 'found/results.md').write_text('| l1 | 1.5 |')
    (tmp_path / 'bad').mkdir()
    (tmp_path / 'bad/results.md').write_text('of an earlier run')
    os.utime(tmp_path / 'bad/results.md', (0, 0))
    copy = '-c "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[3])"'
    parts = dict(
        good=[f'{copy} {tmp_path}/found/junit.xml --junitxml {{out}}/junit.xml',
              f'{copy} {tmp_path}/found/results.md --out {{out}}'],
        bad=['-c "import sys; sys.exit(\'wrong\')" --out {out}', '-c "print(9)"'],
        slow=['-c "import time; print(1, flush=True); time.sleep(60)"', '-c "print(2)"'])
    with pytest.raises(SystemExit, match='not all passed'):
        check(parts, '--limit', '5')
    report = json.loads((tmp_path / 'gpu_check.json').read_text())
    assert report['machine']['gpu'] == 'a GPU'
    verdicts = {part: [each['verdict'] for each in found]
                for part, found in report['parts'].items()}
    assert verdicts == dict(good=['passed'] * 2, bad=['failed', 'passed'],
                            slow=['timed out'] * 2)
    text = (tmp_path / 'gpu_check.md').read_text()
    for found in ('# a GPU', '1 failure, 3 passed, 1 skipped', '- test_jobs: `AssertionError: no`',
                  '| test_half bf16 | 4.0e-02 |', '| test_half fp16 | 3.0e-03 |', '| l1 | 1.5 |',
                  '```text\nwrong\n```', '```text\n1\n```', '--out OUT/good'):
        assert found in text
    assert 'bad: failed after' in capsys.readouterr().out
    assert 'of an earlier run' not in text
    assert (tmp_path / 'bad/1.log').read_text() == '9\n'


def test_only_what_is_asked_for(check, tmp_path):
    check(dict(one=['-c "print(1)"'], two=['-c "print(2)"']), 'two')
    assert [*json.loads((tmp_path / 'gpu_check.json').read_text())['parts']] == ['two']
    with pytest.raises(SystemExit, match="part 'three' is unknown; choose from one, two"):
        check(dict(one=[], two=[]), 'three')


def test_without_a_gpu(check, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match='torch finds no GPU here'):
        check(dict(one=[]))
