"""``python -m mmeffformer run``: operators for programs that do not import mmeffformer."""
import os
import subprocess
import sys

import pytest

from mmeffformer import ops
from mmeffformer.__main__ import main
from mmeffformer.apis import run

# Imports mmcv.ops itself. So could the processes that multiprocessing and a shell start.
SCRIPT = '''
import importlib.util, multiprocessing, subprocess, sys

def show(name):
    print(name, importlib.util.find_spec('mmcv._ext').origin, flush=True)

if __name__ == '__main__':
    import mmcv.ops
    assert 'mmeffformer' not in sys.modules
    print(sys.argv[1:], mmcv.ops.nms.__module__, flush=True)
    spawn = multiprocessing.get_context('spawn').Process(target=show, args=['spawned'])
    spawn.start(), spawn.join()
    subprocess.run('python -c "import script; script.show(1)"', shell=True)
    sys.exit(3)
'''


def python(code, folder, *flags):
    """Run Python with code, in the launcher's environment and with a folder on its path."""
    env = run.environment()
    env['PYTHONPATH'] += f'{os.pathsep}{folder}'
    return subprocess.run([sys.executable, *flags, '-c', code], text=True, capture_output=True,
                          env=env)


def test_processes_that_import_mmcv_first(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, '-m', 'mmeffformer', 'run', 'python', script, '--option', 'a b', '--'],
        text=True, capture_output=True, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    file = ops.diagnose()[1]  # that of this package, or of a compiled mmcv
    assert done.stdout.splitlines() == ["['--option', 'a b', '--'] mmcv.ops.nms",
                                        f'spawned {file}', f'1 {file}']


def test_compiled_operators_are_used_first(tmp_path):
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv/__init__.py').touch()
    code = 'import importlib.util as u, sys; print(u.find_spec("mmcv._ext").origin)'
    assert python(code, tmp_path).stdout.strip() == ops._FILE
    compiled = tmp_path / 'mmcv/_ext.py'
    compiled.touch()
    assert python(code, tmp_path).stdout.strip() == str(compiled)


def test_interpreter_starts_as_before(tmp_path):
    (tmp_path / 'sitecustomize.py').write_text('import sys\nsys.own = __name__, __file__\n')
    done = python('import sys, sitecustomize; print(sys.own, sitecustomize.__file__); '
                  'print("torch" in sys.modules, "mmeffformer" in sys.modules, sys.path)',
                  tmp_path)
    own = str(tmp_path / 'sitecustomize.py')
    assert done.stdout.splitlines()[0] == f'{("sitecustomize", own)} {own}'
    assert done.stdout.splitlines()[1].startswith('False False')
    assert ops.STARTUP not in done.stdout and not done.stderr


def test_command_replaces_the_process(monkeypatch):
    """So signals reach it, and its exit status is that of the process."""
    calls = []
    monkeypatch.setattr(os, 'execvpe', lambda *args: calls.append(args))
    run.run(['mim', 'run', 'mmdet'])
    assert calls == [('mim', ['mim', 'run', 'mmdet'], run.environment())]


def test_environment(monkeypatch):
    monkeypatch.setenv('PYTHONPATH', 'mine')
    monkeypatch.setenv('PATH', '/usr/bin')
    found = run.environment()
    assert found['PYTHONPATH'].split(os.pathsep) == [ops.STARTUP, 'mine']
    assert found['PATH'].split(os.pathsep) == [os.path.dirname(sys.executable), '/usr/bin']
    changed = {name for name in found if found[name] != os.environ.get(name)}
    assert changed == {'PATH', 'PYTHONPATH'}
    monkeypatch.delenv('PYTHONPATH')  # an empty entry would be the current folder
    assert run.environment()['PYTHONPATH'] == ops.STARTUP


@pytest.mark.parametrize('arguments, status, words', [
    (['no-such-program', '-x'], 127, 'no-such-program: No such file or directory'),
    (['--', os.devnull], 126, f'{os.devnull}: Permission denied')])
def test_program_that_cannot_run(monkeypatch, capsys, arguments, status, words):
    monkeypatch.setattr(sys, 'argv', ['mmeffformer', 'run', *arguments])
    assert main() == status
    error = capsys.readouterr().err
    assert words in error and f'for example: {run.EXAMPLE}' in error


def test_command_is_required(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['mmeffformer', 'run'])
    with pytest.raises(SystemExit, match='2'):
        main()
    assert 'expected a command' in capsys.readouterr().err
