"""Hooks on a small segmentor, wrapped and not."""
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import HOOKS, init_default_scope
from mmengine.utils import digit_version
from support.helpers import assert_close, image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmeffformer.utils.registry import MODELS


@pytest.fixture
def model(repo_root, randomize):
    cfg = Config.fromfile(repo_root / 'tests/data/semfpn_tiny.py')
    init_default_scope(cfg.default_scope)
    return randomize(revert_sync_batchnorm(MODELS.build(cfg.model))).eval()


@pytest.mark.parametrize('wrap', [lambda model: model, nn.DataParallel])
def test_deploy_fuses_the_tested_model(model, wrap):
    expected = model.extract_feat(image(64, 64))
    HOOKS.build(dict(type='mmeffformer.DeployHook')).before_test(SimpleNamespace(model=wrap(model)))
    assert model.backbone.deployed
    assert not [m for m in model.backbone.modules() if isinstance(m, _BatchNorm)]
    with torch.no_grad():
        assert_close(model.extract_feat(image(64, 64)), expected, 1e-4)


@torch.no_grad()
def test_deploy_in_bfloat16(model):
    expected = model(image(64, 64), mode='tensor')
    hook = HOOKS.build(dict(type='mmeffformer.DeployHook', dtype='bf16'))
    for _ in range(2):
        hook.before_test(SimpleNamespace(model=model))
        assert model.backbone.deployed
        assert model.backbone.stem[0].conv.weight.dtype == torch.bfloat16
        found = model(image(64, 64), mode='tensor')
        assert found.dtype == torch.float32
        assert 0 < (found - expected).norm() < .02 * expected.norm()


@pytest.mark.parametrize('wrap', [lambda model: model, nn.DataParallel])
def test_channels_last(model, wrap):
    expected = model.extract_feat(image(64, 64))
    HOOKS.build(dict(type='mmeffformer.SpeedHook', channels_last=True)).before_run(
        SimpleNamespace(model=wrap(model)))
    outs = model.extract_feat(image(64, 64))
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in outs)
    assert_close(outs, expected, 1e-4)


@pytest.mark.parametrize('options', [True, dict(backend='eager', dynamic=True)])
def test_compile(model, options):
    before, plain = [*model.state_dict()], deepcopy(model)
    hook = HOOKS.build(dict(type='mmeffformer.SpeedHook', compile=options))
    if options is True:
        hook.compile = dict(backend='aot_eager')  # compiles as True does, but to no C++
    hook.before_run(SimpleNamespace(model=model))
    assert [*model.state_dict()] == before
    calls = torch._dynamo.utils.counters['stats']
    calls.clear()
    for network in (plain.train(), model.train()):
        sum(out.square().mean() for out in network.extract_feat(image(64, 64, 2))).backward()
    if digit_version(torch.__version__) >= digit_version('2.5'):  # earlier ones: in parts
        assert calls['unique_graphs'] == 2 and not torch._dynamo.utils.counters['graph_break']
    for compiled, eager in zip(model.parameters(), plain.parameters()):
        if eager.grad is not None and eager.dim() > 1:  # not a bias before a norm
            assert_close([compiled.grad], [eager.grad], 1e-3)


def test_nothing_changes_by_default(model, repo_root):
    cfg = Config.fromfile(repo_root / 'configs/detection/maskrcnn_effformer_l1.py')
    HOOKS.build(cfg.default_hooks.speed).before_run(SimpleNamespace(model=model))
    assert not model.backbone._compiled_call_impl
    assert model.backbone.stem[0].conv.weight.is_contiguous()
