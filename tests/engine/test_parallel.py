"""Two processes on CPUs compared with one process that has both batches."""
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from support.helpers import ROOT, run_code
from torch import nn

from mmeffformer import EfficientFormer, EfficientFormerV2
from mmeffformer.engine.launch import DataParallelOnCPUs, start_on_cpus

GN = dict(type='GN', num_groups=1)
TINY = dict(widths=(8, 8, 16, 16), depths=(1, 1, 1, 2), attention_blocks=(0, 0, 0, 1))
TINY_V2 = dict(widths=(8, 8, 16, 16), depths=(1, 1, 1, 2), attention_blocks=(0, 0, 1, 1))


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    """Return a function that calls a function of this file in both processes of a job.

    Both get the same arguments, or one item each where an argument is a tuple.
    """
    store = tmp_path_factory.mktemp('job') / 'store'
    spawn = multiprocessing.get_context('spawn')
    pools = [ProcessPoolExecutor(1, spawn, _join, (store, rank)) for rank in range(2)]

    def call(function, *args):
        # Pickled here, as torch would share the memory of tensors.
        futures = [pool.submit(_call_pickled, pickle.dumps((function, [
            arg[rank] if isinstance(arg, tuple) else arg for arg in args])))
            for rank, pool in enumerate(pools)]
        return [pickle.loads(future.result(timeout=300)) for future in futures]

    yield call
    for pool in pools:
        for process in pool._processes.values():
            process.kill()  # gloo's threads may abort a process that exits
        pool.shutdown()


def _join(store: Path, rank: int):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)


def _call_pickled(call: bytes) -> bytes:
    function, args = pickle.loads(call)
    return pickle.dumps(function(*args))


class Summed(nn.Module):
    """A backbone with a loss that is a sum over all images."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, x, samples, mode):
        return dict(loss=sum(out.sin().sum() for out in self.backbone(x)))


def gradients(model: nn.Module, images, samples, sums: bool = False) -> dict:
    """Return the gradients by name, and the running statistics."""
    wrapped = DataParallelOnCPUs(model, device_ids=[0]) if dist.is_initialized() else model
    losses = wrapped(images, samples, mode='loss')
    loss = losses['loss'] if isinstance(model, Summed) else model.parse_losses(losses)[0]
    if sums and dist.is_initialized():
        loss = loss * dist.get_world_size()  # gradients are averaged
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    found.update((name, value) for name, value in model.named_buffers() if 'running' in name)
    return found


def assert_as_one_process(pair, model: nn.Module, first: tuple, second: tuple,
                          sums: bool = False, tolerance: float = 1e-9):
    """Compare each tensor to ``tolerance`` of its largest value."""
    images, samples = torch.cat([first[0], second[0]]), [*first[1], *second[1]]
    ranks = pair(gradients, model, (first[0], second[0]), (first[1], second[1]), sums)
    expected = gradients(model, images, samples, sums)
    largest = max(value.abs().max().item() for value in expected.values())
    for found in ranks:
        assert {*found} == {*expected}
        for name, value in expected.items():
            scale = value.abs().max().item()
            if scale < 1e-5 * largest:  # a bias before a norm has rounding errors only
                scale = largest
            torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * scale,
                                       msg=lambda m, name=name: f'{name}: {m}')


def noise(*shape: int, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize('build, arch, with_cp, dtype, tolerance', [
    (EfficientFormer, TINY, False, torch.float64, 1e-9),
    (EfficientFormer, TINY, True, torch.float64, 1e-9),
    (EfficientFormer, TINY, False, torch.float32, 1e-5),
    (EfficientFormerV2, TINY_V2, False, torch.float64, 1e-9),
    (EfficientFormerV2, TINY_V2, True, torch.float64, 1e-9)])
def test_backbone_as_in_one_process(pair, randomize, build, arch, with_cp, dtype, tolerance):
    backbone = build(arch, norm_eval=True, with_cp=with_cp).train()
    # Three images and one.
    assert_as_one_process(pair, Summed(randomize(backbone)).to(dtype),
                          (noise(3, 3, 64, 96, dtype=dtype), []),
                          (noise(1, 3, 64, 96, dtype=dtype), []), True, tolerance)


def test_segmentor_as_in_one_process(pair, randomize):
    from mmseg.structures import SegDataSample
    init_default_scope('mmseg')
    cfg = Config.fromfile(ROOT / 'tests/data/semfpn_tiny.py').model
    cfg.backbone.update(norm_cfg=dict(type='BN'), norm_eval=True)
    cfg.neck.norm_cfg = cfg.decode_head.norm_cfg = GN
    cfg.decode_head.dropout_ratio = 0.

    def batch(seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 7, (2, 1, 64, 96), generator=generator)
        samples = [SegDataSample(metainfo=dict(img_shape=(64, 96)),
                                 gt_sem_seg=PixelData(data=label)) for label in labels]
        return noise(2, 3, 64, 96 + seed)[..., :96], samples

    # The loss is an average over pixels, and both batches have the same number.
    model = randomize(MODELS.build(cfg)).double().train()
    assert_as_one_process(pair, model, batch(0), batch(1))


def wrap_with_sync_bn(model: nn.Module) -> tuple:
    lines = []
    from mmeffformer.engine import launch
    launch.print_log = lambda text, *_, **__: lines.append(text)
    wrapped = DataParallelOnCPUs(model)
    return [type(part).__name__ for part in wrapped.module], lines


def test_sync_bn_is_reverted_on_cpus_with_one_warning(pair):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), nn.SyncBatchNorm(4))
    for kinds, lines in pair(wrap_with_sync_bn, model):
        assert kinds[1] == kinds[2] and 'Sync' not in kinds[1] and 'BatchNorm' in kinds[1]
        assert len(lines) == 1 and 'SyncBatchNorm needs GPUs' in lines[0]


@pytest.mark.parametrize('given, timeout', [({}, {}), (
    dict(dist_cfg=dict(timeout=90)), dict(timeout=timedelta(seconds=90)))])
def test_start_on_cpus(monkeypatch, given, timeout):
    calls = []
    monkeypatch.setattr(dist, 'init_process_group', lambda *args, **kw: calls.append((args, kw)))
    cfg = Config(dict(env_cfg=given, find_unused_parameters=True,
                      model_wrapper_cfg=dict(static_graph=True)))
    start_on_cpus(cfg)
    assert calls == [(('gloo',), timeout)]
    assert cfg.model_wrapper_cfg == dict(
        type='mmeffformer.DataParallelOnCPUs', find_unused_parameters=True,
        broadcast_buffers=False, static_graph=True)
    other = dict(type='OtherWrapper')
    cfg = Config(dict(env_cfg=given, model_wrapper_cfg=other))
    start_on_cpus(cfg)
    assert cfg.model_wrapper_cfg == other


@pytest.mark.parametrize('timeout', [0, '90'])
def test_invalid_timeout(timeout):
    with pytest.raises(ValueError, match='expected seconds, more than 0'):
        start_on_cpus(Config(dict(env_cfg=dict(dist_cfg=dict(timeout=timeout)))))


def test_exit_distributed_skips_exit_handlers_of_gloo_jobs_only(tmp_path):
    code = ('import atexit, os, sys, torch.distributed as dist\n'
            'from mmeffformer.engine.launch import create_temp_dir, exit_distributed\n'
            'folder = create_temp_dir(); assert os.path.isdir(folder)\n'
            'atexit.register(print, "handler")\n'
            'if sys.argv[1] == "gloo":\n'
            '    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}",\n'
            '                            rank=0, world_size=1)\n'
            'print(folder)\nexit_distributed()\nprint("returned")')
    folder, *rest = run_code(code, 'gloo', tmp_path / 'store').splitlines()[-1:]
    assert not rest and folder.startswith('/') and not Path(folder).exists()
    assert run_code(code, 'none', '').splitlines()[-2:] == ['returned', 'handler']
