"""Gradients, running statistics and memory in training."""
import pytest
import torch
import torch.nn.functional as F
from support.helpers import assert_close, image
from torch.func import functional_call, grad, hessian, vjp
from torch.utils.checkpoint import checkpoint

from mmeffformer import EfficientFormer, EfficientFormerV2
from mmeffformer.latency.timing import kept_bytes, peak_bytes
from mmeffformer.models.layers import GroupNorm, PoolMixer

KINDS = [EfficientFormer, EfficientFormerV2]
ARCH = dict(widths=(16, 16, 24, 32), depths=(2, 2, 3, 3), attention_blocks=(0, 0, 1, 1))


def loss_of(outs):
    return sum(out.square().mean() for out in outs)


@pytest.mark.parametrize('options', [
    {}, dict(norm_eval=True), dict(act_cfg=dict(type='RReLU')),
    dict(norm_cfg=dict(type='IN', affine=True, track_running_stats=True)),
    dict(norm_cfg=dict(type='BN', momentum=None), drop_path_rate=.5)])
@pytest.mark.parametrize('kind', KINDS)
def test_with_cp_changes_no_gradient_and_no_statistics(kind, options, randomize):
    plain, recomputing = (randomize(kind(ARCH, with_cp=with_cp, **options)).train()
                          for with_cp in (False, True))
    for model in (plain, recomputing):
        torch.manual_seed(1)
        loss_of(model(image(64, 64, batch=2))).backward()
    for (name, a), b in zip(plain.named_parameters(), recomputing.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, msg=name)
    for a, b in zip(plain.buffers(), recomputing.buffers()):
        assert torch.equal(a, b)


@pytest.mark.parametrize('kind', KINDS)
def test_with_cp_keeps_a_tenth(kind):
    x = image(128, 128, batch=2).to(memory_format=torch.channels_last)
    kept, peaks = [], []
    for with_cp in (False, True):
        model = kind(dict(ARCH, depths=(4, 4, 6, 6)), with_cp=with_cp).train()
        model.to(memory_format=torch.channels_last)
        kept.append(kept_bytes(lambda model=model: model(x),
                               [*model.parameters(), *model.buffers()]))
        peaks.append(peak_bytes(lambda model=model: model(x)))  # of the graph alive
    assert kept[1] < 0.15 * kept[0] and peaks[1] < 0.65 * peaks[0]


@pytest.mark.parametrize('train, with_cp', [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize('kind', KINDS)
def test_transforms_of_torch_func(kind, train, with_cp, randomize):
    model = randomize(kind(ARCH, with_cp=with_cp)).double().train(train)
    x = image(64, 32, dtype=torch.float64).requires_grad_()
    loss_of(model(x)).backward()
    buffers = [buffer.clone() for buffer in model.buffers()]
    gradients = grad(lambda parameters: loss_of(functional_call(model, parameters, (x,))))(
        dict(model.named_parameters()))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)
    loss, pull_back = vjp(lambda x: loss_of(model(x)), x.detach())
    assert_close(pull_back(torch.ones_like(loss)), [x.grad], 1e-9)
    assert_close([*model.buffers()], buffers, 0)


def test_torch_func_changes_the_statistics_that_it_is_given(randomize):
    model = randomize(EfficientFormer(ARCH)).train()
    x, state = image(64, 32, batch=2), {key: value.clone() for key, value in
                                        model.state_dict().items()}
    _, changed = grad(lambda scale, state: (
        loss_of(functional_call(model, state, (scale * x,))), state), has_aux=True)(
            torch.ones(()), {**state})
    model(x)
    assert_close([changed[key] for key, _ in model.named_buffers()], [*model.buffers()], 1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_gradients_of_a_fused_backbone(kind, randomize):
    model = randomize(kind(ARCH)).switch_to_deploy().requires_grad_()
    x = image(64, 96).requires_grad_()
    loss_of(model(x)).backward()
    loss, pull_back = vjp(lambda x: loss_of(model(x)), x.detach())
    assert_close(pull_back(torch.ones_like(loss)), [x.grad], 1e-5)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize('kind', KINDS)
def test_a_users_checkpoint_and_second_derivatives(kind, randomize):
    model = randomize(kind(ARCH)).double().eval()
    x = image(32, 64, dtype=torch.float64).requires_grad_()
    found = []
    for forward in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        gradient, = torch.autograd.grad(loss_of(forward(x)), x, create_graph=True)
        found.append([gradient, *torch.autograd.grad(gradient.square().sum(), x)])
    assert_close(found[1], found[0], 1e-9)


def test_pooling_has_the_gradient_of_torch():
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    out = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x
    assert torch.equal(PoolMixer()(x), out)
    expected, = torch.autograd.grad(out, x, weights)
    assert_close(torch.autograd.grad(PoolMixer()(x), x, weights), [expected], 1e-12)
    assert torch.autograd.gradgradcheck(PoolMixer(), x)

    def plain(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x

    found, expected = (hessian(lambda x, pool=pool: pool(x).pow(3).sum())(x)
                       for pool in (PoolMixer(), plain))
    assert_close([found], [expected], 1e-9)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_group_norm_after_frozen_layers(layout, randomize):
    norm = randomize(GroupNorm(2, 8))
    reference = torch.nn.GroupNorm(2, 8)
    reference.load_state_dict(norm.state_dict())
    x = torch.randn(2, 8, 5, 7)
    out, expected = norm(x.to(memory_format=layout)), reference(x)
    for each in (out, expected):
        each.square().sum().backward()
    assert out.is_contiguous(memory_format=layout)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close([norm.weight.grad, norm.bias.grad],
                               [reference.weight.grad, reference.bias.grad])
    torch.testing.assert_close(norm(x.to(memory_format=layout).requires_grad_()), expected)
