"""The launch scripts: the commands they run, recorded by replacements of ``srun`` and ``python``,
and jobs of two processes on CPUs in which one process fails."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.helpers import ROOT, free_port

from mmeffformer.datasets import write_ade20k

TOOLS = ROOT / 'tools'
KNOWN = ('NNODES', 'NODE_RANK', 'MASTER_ADDR', 'PORT', 'GPUS', 'GPUS_PER_NODE', 'CPUS_PER_TASK',
         'SRUN_ARGS')
# With a space and a star, which a shell splits and expands unless they are quoted.
OPTIONS = ['--work-dir', 'my runs/*', '--cfg-options', 'train_cfg.max_epochs=1']


@pytest.fixture
def launched(tmp_path):
    """A function that runs a script and returns the arguments its ``program`` got."""

    def launch(program: str, script: str, *args: str, status: int = 0, **env: str) -> list:
        fake, record = tmp_path / program, tmp_path / 'arguments'
        fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{record}"\nexit {status}\n')
        fake.chmod(0o755)
        clean = {key: value for key, value in os.environ.items() if key not in KNOWN}
        done = subprocess.run(
            ['bash', TOOLS / script, *args], text=True, stderr=subprocess.PIPE, timeout=60,
            env={**clean, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', **env})
        assert done.returncode == status, done.stderr
        return record.read_text().splitlines()

    return launch


def torchrun(gpus, nnodes='1', node_rank='0', master_addr='127.0.0.1', port='29500'):
    return ['-m', 'torch.distributed.run', '--nnodes', nnodes, '--node_rank', node_rank,
            '--nproc_per_node', gpus, '--master_addr', master_addr, '--master_port', port]


def srun(gpus, per_node, cpus='5'):
    return ['-p', 'part', '--job-name', 'a job', '--gres', f'gpu:{per_node}', '--ntasks', gpus,
            '--ntasks-per-node', per_node, '--cpus-per-task', cpus, '--kill-on-bad-exit=1']


# script, its arguments before the number of GPUs, the tool that it starts
DIST = [('dist_train.sh', ['my config.py'], 'train.py'),
        ('dist_test.sh', ['my config.py', 'epoch 1.pth'], 'test.py')]
SLURM = ['part', 'a job', 'my config.py']


@pytest.mark.parametrize('env, expected', [
    ({}, torchrun('2')),
    (dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='10.0.0.1', PORT='29501'),
     torchrun('2', '2', '1', '10.0.0.1', '29501'))])
@pytest.mark.parametrize('script, files, tool', DIST)
def test_dist_starts_processes_on_machines_of_the_environment(
        launched, script, files, tool, env, expected):
    assert launched('python', script, *files, '2', *OPTIONS, **env) == [
        *expected, f'{TOOLS}/{tool}', *files, '--launcher', 'pytorch', *OPTIONS]


@pytest.mark.parametrize('env, expected', [
    ({}, srun('8', '8')),
    (dict(GPUS='16'), srun('16', '8')),
    (dict(GPUS='16', GPUS_PER_NODE='4', CPUS_PER_TASK='2'), srun('16', '4', '2')),
    (dict(GPUS='2'), srun('2', '2')),  # fewer than a machine has
    (dict(GPUS='3', GPUS_PER_NODE='4'), srun('3', '3')),
    (dict(SRUN_ARGS='--time 60 --exclusive'),
     [*srun('8', '8'), '--time', '60', '--exclusive']),
])
def test_slurm_takes_the_sizes_from_the_environment(launched, env, expected):
    assert launched('srun', 'slurm_train.sh', *SLURM, *OPTIONS, **env) == [
        *expected, 'python', '-u', f'{TOOLS}/train.py', 'my config.py', '--launcher', 'slurm',
        *OPTIONS]


@pytest.mark.parametrize('program, script, arguments', [
    *(('python', script, [*files, '2']) for script, files, _ in DIST),
    ('srun', 'slurm_train.sh', SLURM)])
def test_scripts_fail_as_their_program_does_and_print_their_usage(
        launched, program, script, arguments):
    launched(program, script, *arguments, status=3)
    done = subprocess.run(['bash', TOOLS / script], text=True, stderr=subprocess.PIPE)
    assert done.returncode == 2 and f'tools/{script} ' in done.stderr


# Each rank saves its weights after every iteration; rank 1 executes FAULT in the third.
PROBE = """
import os, signal, time
from pathlib import Path
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class Probe(Hook):
    priority = 'VERY_HIGH'

    def after_train_iter(self, runner, batch_idx, **kwargs):
        folder = Path(__file__).parent
        (folder / f'rank_{runner.rank}').write_text(str(os.getpid()))
        torch.save(runner.model.module.state_dict(),
                   folder / f'rank_{runner.rank}_iter_{runner.iter + 1}.pth')

    def before_train_iter(self, runner, batch_idx, **kwargs):
        if runner.rank == 1 and runner.iter == 2:
            while not (Path(runner.work_dir) / 'last_checkpoint').exists():  # by the other rank
                time.sleep(.1)
            exec(os.environ['FAULT'])
"""


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'shapes_ade20k'
    return write_ade20k(folder, train=8, val=2, size=(64, 96), progress=False) or folder


@pytest.fixture
def job(data, tmp_path):
    """A function that starts dist_train.sh with two processes, and a fault for rank 1, on the
    tiny segmentor: returns its process; what it prints goes to the file ``log``."""
    config = tmp_path / 'config.py'
    (tmp_path / 'probe.py').write_text(PROBE)
    config.write_text(f'_base_ = {str(ROOT / "tests/data/semfpn_tiny.py")!r}\n'
                      'custom_imports = dict(imports=["mmeffformer", "probe"])\n'
                      'custom_hooks = [dict(type="Probe")]\n'
                      'model = dict(decode_head=dict(norm_cfg=dict(type="SyncBN")))\n')
    started = []

    def start(fault: str) -> subprocess.Popen:
        path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
        with open(tmp_path / 'log', 'w') as log:
            started.append(subprocess.Popen(
                ['bash', 'tools/dist_train.sh', config, '2', '--data-root', data, '--work-dir',
                 tmp_path / 'work', '--cfg-options', 'train_cfg.max_iters=1000000',
                 'train_cfg.val_interval=1000000', 'train_dataloader.batch_size=2'],
                cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, 'PATH': path, 'PORT': str(free_port()), 'FAULT': fault,
                     'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(
                         [str(tmp_path), os.environ.get('PYTHONPATH', '')])}))
        return started[0]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def weights(folder: Path, rank: int, iteration: int) -> dict:
    """Return the parameters; BatchNorm statistics differ, as SyncBN is BN on CPUs."""
    state = torch.load(folder / f'rank_{rank}_iter_{iteration}.pth', weights_only=True)
    return {key: value for key, value in state.items() if 'running' not in key}


def same(a: dict, b: dict) -> bool:
    return {*a} == {*b} and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize('fault, message', [
    ('os.kill(os.getpid(), signal.SIGKILL)', 'Signal 9 (SIGKILL) received by PID'),
    ('raise ValueError("picture 7 is missing")', 'ValueError: picture 7 is missing'),
], ids=['killed', 'raises'])
def test_a_rank_that_dies_ends_the_job(job, tmp_path, fault, message):
    process = job(fault)
    while not (tmp_path / 'rank_1_iter_2.pth').exists() and process.poll() is None:
        time.sleep(.1)
    assert process.wait(60) == 1
    log = (tmp_path / 'log').read_text()
    assert message in log, log[-3000:]
    assert not (tmp_path / 'rank_0_iter_3.pth').exists()
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f'rank_{rank}').read_text()), 0)
    # Until then both had the same weights.
    first, second = (weights(tmp_path, rank, 2) for rank in range(2))
    assert same(first, second) and not same(first, weights(tmp_path, 0, 1))
    assert [path.name for path in (tmp_path / 'work').rglob('*.pth')] == ['iter_2.pth']
    assert log.count('Saving checkpoint at 2 iterations') == 1
    assert log.count('SyncBatchNorm needs GPUs') >= 1
    saved = torch.load(tmp_path / 'work/iter_2.pth', weights_only=False)['state_dict']
    assert same({key: saved[key] for key in first}, first)


def test_ranks_end_with_their_launcher():
    rank = ('import os, time; from mmeffformer.engine.launch import end_with_launcher; '
            'end_with_launcher(); print(os.getpid(), flush=True); time.sleep(600)')
    launcher = subprocess.Popen(
        [sys.executable, '-c', 'import subprocess, sys; '
         f'subprocess.run([sys.executable, "-c", {rank!r}])'], stdout=subprocess.PIPE, text=True)
    with launcher:
        pid = int(launcher.stdout.readline())
        os.kill(pid, 0)
        launcher.kill()
        assert launcher.stdout.read() == ''  # ends when the rank has closed it
