"""The worker processes of data loaders, when their training is killed."""
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from support.helpers import FORKS
from support.toys import Numbers, toy_config

from mmeffformer.engine.runner import Runner


class Large(Numbers):
    """Samples that fill a pipe, so that workers wait until they are taken."""

    def __getitem__(self, index):
        return dict(inputs=torch.zeros(1 << 20), worker=os.getpid())


def hang(folder: Path, start_method: str) -> None:
    """Take a batch, write the workers' ids and wait."""
    loader = toy_config(folder).train_dataloader
    loader.update(num_workers=2, persistent_workers=True, dataset=dict(type=Large),
                  multiprocessing_context=start_method)
    batches = iter(Runner.build_dataloader(loader, seed=0))
    workers = {int(i) for _ in range(2) for i in next(batches)['worker']}
    (folder / 'tmp').write_text(' '.join(map(str, workers)))
    (folder / 'tmp').rename(folder / 'workers')
    time.sleep(60)


def ends_within(pid: int, seconds: float) -> bool:
    for _ in range(int(seconds * 20)):
        status = Path(f'/proc/{pid}/stat')
        try:
            if status.read_text().rpartition(')')[2].split()[0] == 'Z':
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize('number, start_method', [
    (signal.SIGTERM, 'fork'), (signal.SIGKILL, 'forkserver')])
def test_workers_end_with_a_killed_training(tmp_path, number, start_method):
    training = FORKS.Process(target=hang, args=(tmp_path, start_method))
    training.start()
    while not (tmp_path / 'workers').exists() and training.is_alive():
        time.sleep(0.05)
    workers = [*map(int, (tmp_path / 'workers').read_text().split())]
    assert len(workers) == 2 and not any(ends_within(pid, 0.1) for pid in workers)
    os.kill(training.pid, number)
    training.join()
    assert all(ends_within(pid, 3) for pid in workers)
