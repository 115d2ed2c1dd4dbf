"""Jobs of one and two processes on a GPU."""
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.helpers import ROOT, free_port, image, scalars
from torch import nn

from mmeffformer import EfficientFormer, EfficientFormerV2
from mmeffformer.datasets import write_ade20k

pytestmark = pytest.mark.gpu
TINY = dict(widths=(8, 8, 16, 16), depths=(1, 1, 1, 2), attention_blocks=(0, 0, 1, 1))


def gradients(kind, rank, world_size, backend, store, queue):
    """Put the gradients of a rank's share of four images, and the statistics after them."""
    os.environ.update(LOCAL_RANK='0')
    torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group(backend, init_method=f'file://{store}', rank=rank,
                            world_size=world_size)
    torch.manual_seed(0)
    model = kind(TINY, norm_cfg=dict(type='SyncBN')).cuda()
    wrapped = nn.parallel.DistributedDataParallel(model, device_ids=[0])
    mine = image(64, 96, batch=4).chunk(world_size)[rank].cuda()
    sum(out.sin().sum() for out in wrapped(mine)).backward()
    found = [p.grad for p in model.parameters()] + [
        value for name, value in model.named_buffers() if 'running' in name]
    queue.put((rank, [value.cpu().numpy() for value in found]))
    dist.barrier()


def run_job(kind, world_size, backend, folder):
    """Return gradients and statistics by rank."""
    spawn = multiprocessing.get_context('spawn')
    queue, store = spawn.Queue(), folder / f'{backend}{world_size}'
    ranks = [spawn.Process(target=gradients, args=(kind, rank, world_size, backend, store, queue))
             for rank in range(world_size)]
    for rank in ranks:
        rank.start()
    found = dict(queue.get(timeout=120) for _ in ranks)
    for rank in ranks:
        rank.join(30)
        rank.kill()
    return [[torch.from_numpy(value) for value in found[rank]] for rank in range(world_size)]


@pytest.mark.parametrize('kind', [EfficientFormer, EfficientFormerV2])
def test_two_processes_with_synchronised_norms_as_one(kind, tmp_path):
    # NCCL accepts one process per GPU.
    (one, ), two = run_job(kind, 1, 'nccl', tmp_path), run_job(kind, 2, 'gloo', tmp_path)
    count = len([*kind(TINY).parameters()])
    largest = max(value.abs().max().item() for value in one[:count])
    for found in two:  # of a sum of losses, gradients are averaged
        for value, expected in zip(found, [*(grad / 2 for grad in one[:count]), *one[count:]]):
            scale = expected.abs().max().item()  # a bias before a norm has rounding errors only
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-3 * (
                scale if scale > 1e-5 * largest else largest))


def test_a_job_of_one_process_trains_through_nccl(tmp_path):
    write_ade20k(tmp_path / 'ade', train=8, val=2, size=(64, 96), progress=False)
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    done = subprocess.run(
        ['tools/dist_train.sh', 'tests/data/semfpn_tiny.py', '1', '--work-dir', tmp_path / 'job',
         '--data-root', tmp_path / 'ade', '--amp', 'bfloat16'], cwd=ROOT, timeout=300, text=True,
        env={**os.environ, 'PATH': path, 'PORT': str(free_port())}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-3000:]
    assert 'SyncBatchNorm needs GPUs' not in done.stdout
    assert any('mIoU' in line for line in scalars(tmp_path / 'job'))
