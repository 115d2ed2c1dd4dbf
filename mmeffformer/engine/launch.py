"""The processes of a job: how they start, wrap the model and end."""
import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from datetime import timedelta
from typing import Any, Callable, Optional

import torch.distributed as dist
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from torch import nn

from ..utils.registry import MODEL_WRAPPERS
from .mmengine_internals import create_temp_dir


def end_with_launcher() -> None:
    """Have this process killed when the process that started it ends, on Linux.

    Otherwise a rank whose launcher was killed would keep training, or wait for the other ranks,
    and a data worker whose training was killed would wait until its batch is taken.
    """
    if sys.platform == 'linux':
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def init_worker(init: Optional[Callable[[int], None]], worker: int) -> None:
    """Have a data worker end with its training, then call ``init``, its own function."""
    end_with_launcher()
    threading.Thread(target=_exit_after_parent, daemon=True).start()
    if init:
        init(worker)


def _exit_after_parent() -> None:
    """Wait for the end of the training, which did not start a worker if a fork server did."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def start_on_cpus(cfg: Config) -> None:
    """Join the processes of a job on CPUs and set the model wrapper for CPUs in ``cfg``.

    mmengine does both for GPUs only. ``env_cfg.dist_cfg.timeout`` in the config is the number of
    seconds that one process waits for the others, as on GPUs (default: torch's 30 minutes).

    Raises:
        ValueError: The timeout is not a positive number.
    """
    timeout = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout')
    if timeout is None:
        options = {}
    elif isinstance(timeout, (int, float)) and timeout > 0:
        options = dict(timeout=timedelta(seconds=timeout))
    else:
        raise ValueError(f'env_cfg.dist_cfg.timeout={timeout!r}: expected seconds, more than 0')
    dist.init_process_group('gloo', **options)
    wrapper = cfg.get('model_wrapper_cfg') or {}
    if wrapper.get('type', 'MMDistributedDataParallel') == 'MMDistributedDataParallel':
        cfg.model_wrapper_cfg = {
            'broadcast_buffers': False,
            'find_unused_parameters': cfg.get('find_unused_parameters', False),
            **wrapper, 'type': 'mmeffformer.DataParallelOnCPUs'}


@MODEL_WRAPPERS.register_module()
class DataParallelOnCPUs(MMDistributedDataParallel):
    """mmengine's MMDistributedDataParallel on CPUs.

    torch has no SyncBatchNorm on CPUs, so it is reverted to BatchNorm with a warning.

    Args:
        module: The model.
        device_ids: Ignored; mmengine passes the index of a GPU.
        **kwargs: Other arguments of MMDistributedDataParallel.
    """

    def __init__(self, module: nn.Module, device_ids: Any = None, **kwargs):
        if any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
            print_log('SyncBatchNorm needs GPUs: on CPUs it is reverted to BatchNorm, with the '
                      "statistics of each process's own batch", 'current', level=30)
            module = revert_sync_batchnorm(module)
        super().__init__(module, **kwargs)


def exit_distributed() -> None:
    """Exit a process of a gloo job with status 0, without Python's exit handlers.

    In other processes this does nothing. gloo's threads now and then abort a process that exits
    in the ordinary way (torch 2.12), which would make the job fail after all its work was done.
    The exit handlers that matter are run here: output is flushed, the workers of data loaders
    are killed and their temporary folder is removed. Call it last.
    """
    if not (dist.is_initialized() and dist.get_backend() == 'gloo'):
        return
    dist.barrier()  # an exit ends the connections of processes that still compute
    for worker in multiprocessing.active_children():
        worker.kill()
    shutil.rmtree(create_temp_dir(), ignore_errors=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
