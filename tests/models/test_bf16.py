"""Training under bfloat16 autocast, on CPUs: losses fall, and nothing becomes infinite."""
import math
from copy import deepcopy

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import OPTIM_WRAPPERS, init_default_scope
from mmengine.runner import Runner

from mmeffformer.apis.options import set_data_root
from mmeffformer.datasets import write_ade20k, write_coco
from mmeffformer.engine.optim import Bf16OptimWrapper
from mmeffformer.models.attention import Attention, StridedAttention
from mmeffformer.utils.registry import MODELS

KINDS = ['EfficientFormer', 'EfficientFormerV2']
TINY = dict(widths=(16, 16, 24, 32), depths=(1, 1, 2, 2), attention_blocks=(0, 0, 1, 1))
NARROW = {f'model.{key}': 32 for key in (
    'neck.out_channels', 'rpn_head.in_channels', 'rpn_head.feat_channels',
    'roi_head.bbox_roi_extractor.out_channels', 'roi_head.mask_roi_extractor.out_channels',
    'roi_head.bbox_head.in_channels', 'roi_head.bbox_head.fc_out_channels',
    'roi_head.mask_head.in_channels', 'roi_head.mask_head.conv_out_channels')}


def detector(folder):
    write_coco(folder / 'data', train=4, val=1, size=(96, 128), progress=False)
    cfg = Config.fromfile('configs/demo/maskrcnn_effformer_l1_shapes.py')
    cfg.merge_from_dict(NARROW)
    return cfg


def segmentor(folder):
    write_ade20k(folder / 'data', train=4, val=1, size=(64, 96), progress=False)
    return Config.fromfile('tests/data/semfpn_tiny.py')


def trained(model, data, steps: int) -> list:
    """Take steps on one batch under bfloat16; return the losses of each, all of them finite."""
    wrapper = OPTIM_WRAPPERS.build(dict(
        type='mmeffformer.Bf16OptimWrapper',
        optimizer=torch.optim.AdamW(model.parameters(), 1e-3)))
    assert type(wrapper) is Bf16OptimWrapper
    counted = []

    def check(*_):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
        counted.append(len(gradients))

    wrapper.optimizer.register_step_pre_hook(check)
    losses = []
    for _ in range(steps):
        found = model.train_step(data, wrapper)
        losses.append({key: value.item() for key, value in found.items()})
        assert all(map(math.isfinite, losses[-1].values())), losses[-1]
    assert all(p.isfinite().all() for p in model.parameters())
    assert counted == [sum(p.requires_grad for p in model.parameters())] * steps
    return losses


# Each detector takes two minutes on a CPU without instructions for bfloat16.
@pytest.mark.parametrize('config, steps, named, kind', [
    (detector, 30, 'loss_rpn_cls', KINDS[0]),
    pytest.param(detector, 30, 'loss_rpn_cls', KINDS[1], marks=pytest.mark.slow),
    *[(segmentor, 15, 'loss', kind) for kind in KINDS]])
def test_a_model_learns_its_batch_by_heart(config, steps, named, kind, tmp_path, repo_root,
                                           monkeypatch):
    monkeypatch.chdir(repo_root)
    cfg = config(tmp_path)
    set_data_root(cfg, str(tmp_path / 'data'))
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    cfg.model.backbone = dict(type=f'mmeffformer.{kind}', arch=TINY)
    cfg.model.neck.in_channels = [*TINY['widths']]
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.train_dataloader.pop('batch_sampler', None)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    dtypes = set()
    model.neck.register_forward_hook(lambda _, x, outs: dtypes.update(o.dtype for o in outs))
    data = next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)))
    losses = [found[named] for found in trained(model, data, steps)]
    assert dtypes == {torch.bfloat16}
    assert sum(losses[-3:]) < .85 * sum(losses[:3]), losses


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('offset', [0., 40.])
@torch.no_grad()
def test_attention_weights_are_not_rounded_away(fused, offset, randomize):
    # A softmax that were summed in bfloat16 would lose what is less than a 256th of the sum.
    cfg = dict(norm_cfg=dict(type='BN'), act_cfg=dict(type='GELU'))
    attention = randomize(Attention(32, (24, 24))).eval()
    strided = randomize(StridedAttention(32, (24, 24), 'offset', 1, **cfg)).eval()
    x = torch.randn(1, 32, 24, 24)
    for module, args in ((attention, (x.flatten(2).transpose(1, 2), (24, 24))),
                         (strided, (x, ))):
        module.bias.table += offset  # of no effect on a softmax
        expected = deepcopy(module).double()(*(a.double() if a is args[0] else a for a in args))
        if fused:
            module.fuse()
        with torch.autocast('cpu', torch.bfloat16):
            out = module(*args)
        assert out.dtype == torch.bfloat16
        assert (out - expected).norm() < .03 * expected.norm()
