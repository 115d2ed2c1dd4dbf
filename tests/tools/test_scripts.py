"""What the launch scripts hand on, recorded by stand-ins for ``srun`` and ``python``."""
import os
import subprocess
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
KNOWN = ('NNODES', 'NODE_RANK', 'MASTER_ADDR', 'PORT', 'GPUS', 'GPUS_PER_NODE', 'CPUS_PER_TASK',
         'SRUN_ARGS')
# With a space and a star, which a careless script would split and expand.
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


# script, what it takes before the number of GPUs, the tool it starts
DIST = [('dist_train.sh', ['my config.py'], 'train.py'),
        ('dist_test.sh', ['my config.py', 'epoch 1.pth'], 'test.py')]
SLURM = ['part', 'a job', 'my config.py']
TRAIN = ['python', '-u', f'{TOOLS}/train.py', 'my config.py', '--launcher', 'slurm']


@pytest.mark.parametrize('script, files, tool', DIST)
def test_dist_starts_the_processes_of_one_machine(launched, script, files, tool):
    assert launched('python', script, *files, '2', *OPTIONS) == [
        *torchrun('2'), f'{TOOLS}/{tool}', *files, '--launcher', 'pytorch', *OPTIONS]


@pytest.mark.parametrize('script, files, tool', DIST)
def test_dist_takes_the_machines_from_the_environment(launched, script, files, tool):
    found = launched('python', script, *files, '8', NNODES='2', NODE_RANK='1',
                     MASTER_ADDR='10.0.0.1', PORT='29501')
    assert found == [*torchrun('8', '2', '1', '10.0.0.1', '29501'), f'{TOOLS}/{tool}', *files,
                     '--launcher', 'pytorch']


@pytest.mark.parametrize('script, files, tool', DIST)
def test_dist_fails_as_its_processes_do(launched, script, files, tool):
    launched('python', script, *files, '2', status=3)


def test_slurm_asks_for_eight_gpus_of_one_machine(launched):
    assert launched('srun', 'slurm_train.sh', *SLURM, *OPTIONS) == [
        *srun('8', '8'), *TRAIN, *OPTIONS]


@pytest.mark.parametrize('env, expected', [
    (dict(GPUS='16'), srun('16', '8')),
    (dict(GPUS='16', GPUS_PER_NODE='4', CPUS_PER_TASK='2'), srun('16', '4', '2')),
    (dict(GPUS='2'), srun('2', '2')),  # less than a machine has
    (dict(GPUS='3', GPUS_PER_NODE='4'), srun('3', '3')),
    (dict(SRUN_ARGS='--time 60 --exclusive'),
     [*srun('8', '8'), '--time', '60', '--exclusive']),
])
def test_slurm_takes_the_sizes_from_the_environment(launched, env, expected):
    assert launched('srun', 'slurm_train.sh', *SLURM, **env) == [*expected, *TRAIN]


def test_slurm_fails_as_its_job_does(launched):
    launched('srun', 'slurm_train.sh', *SLURM, status=3)
