"""Two processes on CPUs, beside one process with their batches together."""
import math
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import List, Tuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmeffformer.models.syncbn import SyncBatchNorm, synchronised
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from support.helpers import assert_close
from torch import nn

from mmeffformer import EfficientFormer, EfficientFormerV2
from mmeffformer.apis.options import set_data_root
from mmeffformer.datasets import write_ade20k, write_coco
from mmeffformer.engine.launch import (
    DataParallelOnCPUs,
    FullyShardedDataParallel,
    fully_shard,
    start_on_cpus,
)
from mmeffformer.engine.runner import Runner
from mmeffformer.models import memory

ROOT = Path(__file__).resolve().parents[2]
SYNC = dict(type='SyncBN')
L7 = 'configs/detection/maskrcnn_effformer_l7.py'


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    """A function that calls a function of this file in both processes of a job, with the
    arguments, or one of each where an argument is a tuple, and returns both results."""
    store = tmp_path_factory.mktemp('job') / 'store'
    spawn = multiprocessing.get_context('spawn')
    pools = [ProcessPoolExecutor(1, spawn, _join, (store, rank)) for rank in range(2)]

    def call(function, *args):
        # torch would share the memory of tensors.
        futures = [pool.submit(_called, pickle.dumps((function, [
            arg[rank] if isinstance(arg, tuple) else arg for arg in args])))
            for rank, pool in enumerate(pools)]
        return [pickle.loads(future.result(timeout=300)) for future in futures]

    yield call
    for pool in pools:
        for process in pool._processes.values():
            process.kill()  # gloo's threads may abort a process that ends by itself
        pool.shutdown()


def _join(store: Path, rank: int):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)


def _called(call: bytes) -> bytes:
    function, args = pickle.loads(call)
    return pickle.dumps(function(*args))


def normed(norm: nn.Module, xs: List[torch.Tensor]) -> list:
    """Run batches of any sizes through a norm, and return gradients and statistics."""
    norm = synchronised(norm) if dist.is_initialized() else norm
    for x in xs:
        norm.zero_grad()
        x.requires_grad_()
        out = norm(x)
        (out.sin() * (1 + x.detach())).sum().backward()
    return [x.grad for x in xs] + [p.grad for p in norm.parameters()] + [*norm.buffers()]


def together(xs: Tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Put the values of each channel of (B, C, H, W) of any sizes into (N, C)."""
    return torch.cat([x.movedim(1, -1).flatten(0, -2) for x in xs])


@pytest.mark.parametrize('options', [{}, dict(affine=False), dict(momentum=None), dict(
    track_running_stats=False)], ids=str)
def test_sync_bn_joins_batches_of_different_sizes(pair, options):
    sizes = [[(3, 5, 8, 6), (2, 5, 1, 7)], [(1, 5, 4, 9), (0, 5, 3, 3)]]  # of each rank
    generator = torch.Generator().manual_seed(0)
    xs = tuple([torch.randn(size, generator=generator, dtype=torch.float64) * 3 + 20 * rank
                for size in sizes[rank]] for rank in range(2))
    expected = normed(nn.BatchNorm1d(5, dtype=torch.float64, **options),
                      [together(pieces) for pieces in zip(*xs)])
    first, second = pair(normed, nn.SyncBatchNorm(5, dtype=torch.float64, **options), xs)
    for i in range(2):
        torch.testing.assert_close(together((first[i], second[i])), expected[i])
    grads = 2 if options.get('affine', True) else 0
    for one, other, both in zip(first[2:2 + grads], second[2:2 + grads], expected[2:]):
        torch.testing.assert_close(one + other, both)
    for one, other, both in zip(first[2 + grads:], second[2 + grads:], expected[2 + grads:]):
        torch.testing.assert_close(one, both)
        torch.testing.assert_close(other, both)


def refused(norm: nn.Module, x: torch.Tensor) -> str:
    with pytest.raises(ValueError) as error:
        synchronised(norm)(x)
    return str(error.value)


def test_sync_bn_refuses_what_has_no_variance(pair):
    one, none = pair(refused, nn.SyncBatchNorm(4), (torch.ones(1, 4), torch.ones(0, 4)))
    assert 'one value per channel in all processes' in one
    assert 'input of shape (0, 4)' in none


def test_sync_bn_takes_the_place_of_torchs():
    norm = nn.SyncBatchNorm(3)
    weight = norm.weight
    model = synchronised(nn.Sequential(nn.BatchNorm2d(3), norm.eval()))
    assert model[1] is norm and type(norm) is SyncBatchNorm and norm.weight is weight
    assert not norm.training and type(model[0]) is nn.BatchNorm2d
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model.eval()(x), model[0](model[0](x)))


class Summed(nn.Module):
    """A backbone with a loss, which is a sum over all images."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, x, samples, mode):
        return dict(loss=sum(out.sin().sum() for out in self.backbone(x)))


def gradients(model: nn.Module, batch: tuple, wrapper: type, sums: bool):
    """Return gradients and statistics by name: of the batch of this process, or of several
    lists' images together where there is one process."""
    images, samples = batch
    weights = model.state_dict()
    if dist.is_initialized():
        wrapped = wrapper(model)
        model.load_state_dict(weights)
    else:
        wrapped = model
    losses = wrapped(images, samples, mode='loss')
    if isinstance(model, Summed):
        loss = losses['loss']
    else:
        loss, _ = model.parse_losses(losses)
    if sums and dist.is_initialized():
        loss = loss * dist.get_world_size()  # gradients are averaged
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    if wrapper is FullyShardedDataParallel and dist.is_initialized():
        found = {name: grad.full_tensor() for name, grad in found.items()}
    found.update((name, value) for name, value in model.named_buffers() if 'running' in name)
    return found


def assert_same(pair, model: nn.Module, first: tuple, second: tuple, sums: bool = False,
                tolerance: float = 1e-5, wrapper: type = DataParallelOnCPUs):
    """Compare two processes with one that has both their batches, each value to ``tolerance``
    of its tensor's largest."""
    batch = torch.cat([first[0], second[0]]), [*first[1], *second[1]]
    ranks = pair(gradients, model, (first, second), wrapper, sums)
    expected = gradients(model, batch, wrapper, sums)
    largest = max(value.abs().max().item() for value in expected.values())
    assert any('running_var' in name for name in expected)
    for found in ranks:
        assert {*found} == {*expected}
        for name, value in expected.items():
            scale = value.abs().max().item()
            if scale < 1e-5 * largest:  # as before a norm, where biases do nothing: errors
                scale = largest
            torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * scale,
                                       msg=lambda m, name=name: f'{name}: {m}')


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
    sharded = dict(type='mmeffformer.FullyShardedDataParallel')
    cfg = Config(dict(env_cfg=given, model_wrapper_cfg=sharded))
    start_on_cpus(cfg)
    assert cfg.model_wrapper_cfg == sharded


@pytest.mark.parametrize('timeout', [0, '90'])
def test_timeout_that_is_none(timeout):
    with pytest.raises(ValueError, match='expected seconds, more than 0'):
        start_on_cpus(Config(dict(env_cfg=dict(dist_cfg=dict(timeout=timeout)))))


TINY = dict(widths=(8, 8, 16, 16), depths=(1, 1, 1, 2), attention_blocks=(0, 0, 0, 1))
TINY_V2 = dict(widths=(8, 8, 16, 16), depths=(1, 1, 1, 2), attention_blocks=(0, 0, 1, 1))


def noise(*shape: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize('build, arch, with_cp, dtype, tolerance', [
    (EfficientFormer, TINY, False, torch.float64, 1e-9),
    (EfficientFormer, TINY, True, torch.float64, 1e-9),
    (EfficientFormer, TINY, False, torch.float32, 1e-5),
    (EfficientFormerV2, TINY_V2, False, torch.float64, 1e-9),
    (EfficientFormerV2, TINY_V2, True, torch.float64, 1e-9)])
def test_backbone_as_of_one_process(pair, randomize, build, arch, with_cp, dtype, tolerance):
    model = Summed(randomize(build(arch, norm_cfg=SYNC, with_cp=with_cp)).to(dtype))
    # Three images and one.
    assert_same(pair, model, (noise(3, 3, 64, 96, dtype=dtype), []),
                (noise(1, 3, 64, 96, dtype=dtype), []), True, tolerance)


def semfpn(sync: dict) -> Config:
    cfg = Config.fromfile(ROOT / 'tests/data/semfpn_tiny.py').model
    cfg.neck.norm_cfg = cfg.decode_head.norm_cfg = sync
    cfg.decode_head.dropout_ratio = 0.
    return cfg


def seg_batch(images: int, seed: int) -> tuple:
    from mmseg.structures import SegDataSample
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 7, (images, 1, 64, 96), generator=generator)
    samples = [SegDataSample(metainfo=dict(img_shape=(64, 96)),
                             gt_sem_seg=PixelData(data=label)) for label in labels]
    return torch.randn(images, 3, 64, 96, generator=generator, dtype=torch.float64), samples


def test_segmentor_as_of_one_process(pair, randomize):
    init_default_scope('mmseg')
    model = randomize(MODELS.build(semfpn(SYNC))).double()
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules()) > 20
    # The loss is an average over pixels: as many in both.
    assert_same(pair, model, seg_batch(2, 0), seg_batch(2, 1))


def small_maskrcnn() -> Config:
    """The demo's Mask R-CNN, smaller, with norms that are synchronised everywhere.

    mmdet averages a loss over the samples of its own process, and DistributedDataParallel
    over processes: the same as in one process only if all have as many. Here they have.
    """
    cfg = Config.fromfile(ROOT / 'configs/demo/maskrcnn_effformer_l1_shapes.py').model
    width, heads = 16, cfg.roi_head
    cfg.backbone.update(arch=TINY, out_norm_cfg=None)
    cfg.neck.update(in_channels=[*TINY['widths']], out_channels=width)
    cfg.rpn_head.update(in_channels=width, feat_channels=width)
    heads.bbox_roi_extractor.out_channels = heads.mask_roi_extractor.out_channels = width
    heads.bbox_head.update(in_channels=width, conv_out_channels=width, fc_out_channels=32)
    heads.mask_head.update(in_channels=width, conv_out_channels=width)
    for part in cfg.backbone, cfg.neck, heads.bbox_head, heads.mask_head:
        part.norm_cfg = SYNC
    # Samples are all there are, so none is drawn: every anchor, and of each image as many
    # proposals; of those, the objects themselves are the positive ones.
    cfg.train_cfg.rpn.sampler.num = cfg.train_cfg.rcnn.sampler.num = 10 ** 6
    cfg.train_cfg.rpn.assigner.neg_iou_thr = cfg.train_cfg.rpn.assigner.pos_iou_thr
    cfg.train_cfg.rpn_proposal.update(max_per_img=20, nms=dict(iou_threshold=.99))
    cfg.train_cfg.rcnn.assigner.update(pos_iou_thr=.99, neg_iou_thr=.99, min_pos_iou=.99)
    return cfg


def det_batch(images: int, seed: int) -> tuple:
    """Images with three objects each."""
    from mmdet.structures import DetDataSample  # in the other processes, after mmeffformer
    from mmdet.structures.mask import BitmapMasks
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(images):
        corners = torch.rand(3, 2, generator=generator, dtype=torch.float64) * 40
        sides = 10 + torch.rand(3, 2, generator=generator, dtype=torch.float64) * 14
        boxes = torch.cat([corners, corners + sides], 1)
        masks = np.zeros((3, 64, 96), np.uint8)
        for mask, box in zip(masks, boxes.int().tolist()):
            mask[box[1]:box[3], box[0]:box[2]] = 1
        samples.append(DetDataSample(
            metainfo=dict(img_shape=(64, 96), pad_shape=(64, 96), batch_input_shape=(64, 96)),
            gt_instances=InstanceData(
                bboxes=boxes, labels=torch.randint(0, 6, (3,), generator=generator),
                masks=BitmapMasks(masks, 64, 96)),
            ignored_instances=InstanceData(bboxes=boxes[:0])))
    return torch.randn(images, 3, 64, 96, generator=generator, dtype=torch.float64), samples


def test_detector_as_of_one_process(pair, randomize):
    init_default_scope('mmdet')
    model = randomize(MODELS.build(small_maskrcnn())).double()
    norms = [name for name, part in model.named_modules() if isinstance(part, nn.SyncBatchNorm)]
    for part in 'backbone.', 'neck.', 'roi_head.bbox_head.', 'roi_head.mask_head.':
        assert any(name.startswith(part) for name in norms), part
    assert_same(pair, model, det_batch(1, 0), det_batch(1, 1))


def evaluated(model: nn.Module, images: torch.Tensor) -> list:
    """Return what a divided model finds by strips, and its weights, which it divides again."""
    memory.STRIP_BYTES = 4096
    weights = model.state_dict()
    wrapped = FullyShardedDataParallel(model).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        outs = wrapped(images.to(memory_format=torch.channels_last))
    parts = [p.to_local() for p in wrapped.train().module.state_dict().values()
             if isinstance(p, DTensor)]
    return [*outs, sum(map(torch.numel, parts))]


def train_sharded(config: str, data: Path, work_dir: Path, edits: dict) -> dict:
    """Train, and return what this process has of the model and of the optimizer's moments,
    how many of its weights changed, and what the losses were."""
    from torch.distributed.fsdp import FSDPModule
    cfg = Config.fromfile(ROOT / config)
    set_data_root(cfg, str(data))
    cfg.merge_from_dict(dict(
        edits, launcher='pytorch', work_dir=str(work_dir), val_dataloader=None, val_cfg=None,
        val_evaluator=None,
        model_wrapper_cfg=dict(type='mmeffformer.FullyShardedDataParallel')))
    runner = Runner.from_cfg(cfg)
    model = runner.model.module
    before = [p.to_local().clone() for p in model.parameters()]
    runner.train()
    weights = {name: p.to_local() for name, p in model.named_parameters()}
    return dict(
        weights=sum(map(torch.numel, weights.values())),
        moments=sum(state['exp_avg'].to_local().numel()
                    for state in runner.optim_wrapper.optimizer.state.values()),
        units=sum(isinstance(part, FSDPModule) for part in model.backbone.modules()),
        changed=sum(int((a != b).sum()) for a, b in zip(before, weights.values())),
        neck=weights['neck.lateral_convs.3.conv.weight'],
        losses=[float(loss) for loss in runner.message_hub.get_scalar('train/loss').data[0]])


if fully_shard:
    from torch.distributed.tensor import DTensor

    @pytest.mark.parametrize('build, arch, with_cp', [
        (EfficientFormer, TINY, True), (EfficientFormerV2, TINY_V2, False)])
    def test_sharded_backbone_as_of_one_process(pair, randomize, build, arch, with_cp):
        model = Summed(randomize(build(arch, norm_cfg=SYNC, with_cp=with_cp)).double())
        assert_same(pair, model, (noise(3, 3, 64, 96, dtype=torch.float64), []),
                    (noise(1, 3, 64, 96, dtype=torch.float64), []), True, 1e-9,
                    FullyShardedDataParallel)

    def test_sharded_inference_on_images_of_different_sizes(pair, randomize):
        model = randomize(EfficientFormer(TINY)).eval()
        images = noise(1, 3, 32, 32), noise(1, 3, 256, 96)
        total = sum(p.numel() for p in model.parameters())
        for image, (*outs, numbers) in zip(images, pair(evaluated, model, images)):
            assert_close(outs, model(image))
            assert total / 3 < numbers < 2 * total / 3

    def test_units_that_are_not_there():
        with pytest.raises(ValueError, match='the model has no Bottleneck; it has .*Linear'):
            FullyShardedDataParallel(nn.Sequential(nn.Linear(2, 2)), units=['Bottleneck'])

    def test_l7s_detector_trains_sharded(pair, tmp_path):
        config, data, work_dir = L7, tmp_path / 'coco', tmp_path / 'work'
        write_coco(data, train=4, val=1, size=(64, 96), coco2017=True, progress=False)
        ranks = pair(train_sharded, config, data, work_dir, {
            'model.backbone.init_cfg': None, 'train_dataloader.num_workers': 0,
            'train_dataloader.persistent_workers': False, 'train_dataloader.batch_size': 1,
            'train_dataloader.dataset.pipeline': [
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
                dict(type='PackDetInputs')],  # not enlarged
            'param_scheduler': None, 'train_cfg.max_epochs': 1,
            'default_hooks.checkpoint': dict(save_optimizer=False, save_best=None)})
        cfg = Config.fromfile(ROOT / config).model
        init_default_scope('mmdet')
        model = MODELS.build(cfg)
        total = sum(p.numel() for p in model.parameters())
        assert total > 1e8
        for rank in ranks:
            for part in 'weights', 'moments':
                assert rank[part] == pytest.approx(total / 2, rel=1e-3), part
            assert rank['units'] == sum(model.backbone.arch.depths)
            assert rank['changed'] > .95 * rank['weights']
            assert len(rank['losses']) == 2 and all(math.isfinite(x) for x in rank['losses'])
        state = torch.load(work_dir / 'epoch_1.pth', weights_only=False)['state_dict']
        assert {type(value) for value in state.values()} == {torch.Tensor}
        model.load_state_dict(state)
        torch.testing.assert_close(model.neck.lateral_convs[3].conv.weight.data,
                                   torch.cat([rank['neck'] for rank in ranks]), rtol=0, atol=0)

    def test_sharded_training_resumes(pair, tmp_path):
        config, data = 'tests/data/semfpn_tiny.py', tmp_path / 'ade20k'
        write_ade20k(data, train=8, val=1, size=(64, 96), progress=False)
        edits = {'train_dataloader.batch_size': 1, 'train_cfg.max_iters': 4,
                 'model.backbone.norm_cfg': dict(type='GN', num_groups=1)}
        whole = pair(train_sharded, config, data, tmp_path / 'whole', edits)
        rest = pair(train_sharded, config, data, tmp_path / 'rest', dict(
            edits, resume=True, load_from=str(tmp_path / 'whole/iter_2.pth')))
        assert [rank['losses'][-2:] for rank in rest] == [rank['losses'][2:] for rank in whole]
        first, second = (torch.load(tmp_path / part / 'iter_4.pth', weights_only=False)
                         for part in ('whole', 'rest'))
        assert_equal(first['state_dict'], second['state_dict'])
        assert_equal(first['optimizer']['state'], second['optimizer']['state'])
        # As of the ordinary model and its optimizer.
        init_default_scope('mmseg')
        cfg = Config.fromfile(ROOT / config)
        cfg.merge_from_dict(edits)
        model = MODELS.build(cfg.model)
        model.load_state_dict(first['state_dict'])
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.load_state_dict(first['optimizer'])
        for p, state in optimizer.state.items():
            assert type(state['exp_avg']) is torch.Tensor and state['exp_avg'].shape == p.shape


else:

    def test_sharding_needs_a_newer_torch(pair):
        with pytest.raises(ValueError, match='needs torch 2.6 or newer, and this is'):
            FullyShardedDataParallel(nn.Linear(2, 2))


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert {*a} == {*b}
        for key in a:
            assert_equal(a[key], b[key])
    else:
        assert torch.equal(a, b)
