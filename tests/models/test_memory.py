"""Strips, what is made again, and checkpoints against the plain formulas."""
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from support.helpers import assert_close, image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmeffformer import EfficientFormer, EfficientFormerV2
from mmeffformer.latency.timing import kept_bytes, peak_bytes
from mmeffformer.models import attention, memory
from mmeffformer.models.attention import attend, attend_mixed
from mmeffformer.models.efficientformer_v2 import FfnBlock
from mmeffformer.models.layers import MB4D, ConvNorm, PoolMixer
from mmeffformer.models.memory import all_kept, by_strips, statistics_kept

KINDS = [EfficientFormer, EfficientFormerV2]
ARCH = dict(widths=(16, 16, 24, 32), depths=(2, 2, 3, 3), attention_blocks=(0, 0, 1, 1))
CFG = dict(norm_cfg=dict(type='BN'), act_cfg=dict(type='GELU'))


@pytest.fixture
def counted(monkeypatch):
    """Calls of a block, each with the rows it was asked for."""

    def count(block):
        asked, forward = [], block.forward
        block.forward = lambda x, rows=None: asked.append(rows) or forward(x, rows)
        return asked

    return count


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('kind', [MB4D, FfnBlock])
@torch.no_grad()
def test_strips_change_nothing(kind, fused, randomize, counted, monkeypatch):
    block = randomize(kind(8, 32, 0., 1., **CFG)).eval()
    if fused:
        for module in [*block.mlp, block]:
            module.fuse()
    x = torch.randn(2, 8, 23, 9).to(memory_format=torch.channels_last)
    expected = block(x)
    asked = counted(block)
    monkeypatch.setattr(memory, 'STRIP_BYTES', 5 * 9 * 32 * 4)  # five rows
    out = by_strips(block, x, 32)
    assert_close([out], [expected], 1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert asked == 2 * [slice(0, 5), *[slice(1, 6)] * 3, slice(1, 4)]  # of each image


def test_when_there_are_no_strips(randomize, counted, monkeypatch):
    monkeypatch.setattr(memory, 'STRIP_BYTES', 5 * 9 * 32 * 4)
    block = randomize(MB4D(8, 32, 0., 1., **CFG)).eval()
    asked = counted(block)
    x = torch.randn(1, 8, 23, 9)
    by_strips(block, x.to(memory_format=torch.channels_last), 32)  # backward may follow
    with torch.no_grad():
        by_strips(block, x, 32)  # a strip of NCHW is not in one piece
        by_strips(block, x[:, :, :10].to(memory_format=torch.channels_last), 32)  # small
        by_strips(block.train(), x.to(memory_format=torch.channels_last), 32)  # statistics
    assert asked == [None] * 4  # each whole


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_a_backbone_in_strips(kind, randomize, monkeypatch):
    model = randomize(kind(ARCH)).eval().switch_to_deploy().to(memory_format=torch.channels_last)
    x = image(130, 97, batch=2).to(memory_format=torch.channels_last)
    expected = model(x)
    monkeypatch.setattr(memory, 'STRIP_BYTES', 2 ** 13)
    monkeypatch.setattr(attention, 'SCORE_BYTES', 2 ** 12)
    assert_close(model(x), expected, 1e-5)


class KeptNorm(_BatchNorm):
    """Stands for norms that wait for other processes: must not be called in backward."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        assert torch.is_grad_enabled()
        return super().forward(x)


@pytest.mark.parametrize('options', [
    {}, dict(norm_eval=True), dict(norm_cfg=dict(type='GN', num_groups=2)),
    dict(norm_cfg=dict(type='IN', affine=True, track_running_stats=True)),
    dict(norm_cfg=dict(type=KeptNorm)), dict(act_cfg=dict(type='RReLU')),
    dict(norm_cfg=dict(type=KeptNorm), act_cfg=dict(type='ELU', inplace=True))])
@pytest.mark.parametrize('kind', KINDS)
def test_what_is_made_again_changes_no_gradient_and_no_statistics(kind, options, randomize):
    lean = randomize(kind(ARCH, **options)).double().train()
    plain, x = deepcopy(lean), image(64, 96, batch=2, dtype=torch.float64)
    torch.manual_seed(1)
    sum(out.square().mean() for out in lean(x)).backward()
    torch.manual_seed(1)
    with all_kept():
        sum(out.square().mean() for out in plain(x)).backward()
    for (name, ours), theirs in zip(lean.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12, msg=name)
    for ours, theirs in zip(lean.buffers(), plain.buffers()):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize('kind', KINDS)
def test_second_derivatives(kind, randomize):
    model = randomize(kind(ARCH)).double().train()
    x = image(32, 32, batch=2, dtype=torch.float64).requires_grad_()
    found = []
    for context in (all_kept, torch.enable_grad):
        with context():
            loss = model(x)[1].square().mean()
            grad, = torch.autograd.grad(loss, x, create_graph=True)
            found.append(torch.autograd.grad(grad.square().sum(), x)[0])
    assert_close(found[1:], found[:1], 1e-9)


@pytest.mark.parametrize('kind', KINDS)
def test_about_half_is_kept_and_with_checkpoints_a_tenth(kind):
    x = image(128, 128, batch=2).to(memory_format=torch.channels_last)
    kept, peaks = [], []
    for with_cp, context in ((False, all_kept), (False, torch.enable_grad),
                             (True, torch.enable_grad)):
        model = kind(dict(ARCH, depths=(4, 4, 6, 6)), with_cp=with_cp).train()
        model.to(memory_format=torch.channels_last)
        with context():
            kept.append(kept_bytes(lambda model=model: model(x),
                                   [*model.parameters(), *model.buffers()]))
            peaks.append(peak_bytes(lambda model=model: model(x)))  # of the graph alive
    assert kept[1] < 0.56 * kept[0] and kept[2] < 0.15 * kept[0]
    assert peaks[1] < 0.65 * peaks[0] and peaks[2] < peaks[1]


@pytest.mark.parametrize('kind', KINDS)
def test_checkpoints_change_no_gradient_and_no_statistics(kind, randomize):
    plain, recomputing = (randomize(kind(ARCH, with_cp=with_cp)).train()
                          for with_cp in (False, True))
    for model in (plain, recomputing):
        with all_kept():
            sum(out.square().mean() for out in model(image(64, 64, batch=2))).backward()
    for a, b in zip(plain.parameters(), recomputing.parameters()):
        assert torch.equal(a.grad, b.grad)
    for a, b in zip(plain.buffers(), recomputing.buffers()):
        assert torch.equal(a, b)


def test_statistics_are_kept_and_come_back():
    norm = nn.BatchNorm2d(3, momentum=None)
    x = torch.randn(4, 3, 5, 5)
    with statistics_kept(norm):
        inside = norm(x)
    assert norm.num_batches_tracked == 0 and norm.running_mean.eq(0).all()
    assert torch.equal(inside, norm(x)) and norm.num_batches_tracked == 1


def test_pooling_has_the_gradient_of_torchs():
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    theirs = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x
    assert torch.equal(PoolMixer()(x), theirs)
    expected, = torch.autograd.grad(theirs, x, weights)
    assert_close(torch.autograd.grad(PoolMixer()(x), x, weights), [expected], 1e-12)
    assert torch.autograd.gradgradcheck(PoolMixer(), x)


@pytest.mark.parametrize('act', [dict(type='ReLU'), dict(type='GELU'), dict(type='SiLU'),
                                 dict(type='GELU', approximate='tanh'), dict(type='Hardswish')])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_activations_on_the_way_out_of_a_convolution(act, layout, randomize):
    layer = randomize(ConvNorm(4, 6, 3, 2, norm_cfg=dict(type='BN'), act_cfg=act)).eval()
    layer.to(memory_format=layout)
    inputs = [torch.randn(2, 4, 9, 7).to(memory_format=layout), torch.randn(1, 9, 4, 8)[:, 2:6],
              torch.randn(2, 4, 8, 9).transpose(2, 3), torch.randn(2, 7, 7, 4).permute(0, 3, 1, 2)]
    expected = [layer(x) for x in inputs]
    layer.fuse()
    assert bool(layer.post_op) == (act in (dict(type='ReLU'), dict(type='GELU'),
                                           dict(type='SiLU')))
    assert_close([layer(x) for x in inputs], expected, 1e-5)
    with torch.autocast('cpu', torch.bfloat16):
        assert layer(inputs[0]).dtype == torch.bfloat16
    assert layer.double()(inputs[0].double()).dtype == torch.float64


@pytest.mark.parametrize('context', [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize('queries, keys', [(6, 6), (4, 9)])
def test_attention_that_never_holds_all_scores(queries, keys, context, monkeypatch):
    q, k, v = (torch.randn(2, 3, n, d) for n, d in ((queries, 4), (keys, 4), (keys, 10)))
    bias = torch.randn(3, queries, keys)
    expected = (q @ k.transpose(2, 3) / 2 + bias).softmax(-1) @ v
    monkeypatch.setattr(attention, 'SCORE_BYTES', 4 * keys * 4)  # four queries
    with context():
        assert_close([attend(q, k, v, bias), attend(q, k, v, bias, fused=True)], [expected] * 2,
                     1e-5)


def test_mixed_attention_some_queries_at_a_time(monkeypatch):
    q, k, v = (torch.randn(2, 4, n, d) for n, d in ((7, 3), (7, 3), (7, 5)))
    bias, before, after = torch.randn(4, 7, 7), nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1)
    expected = after((before(q @ k.transpose(2, 3)) + bias).softmax(-1)) @ v
    assert_close([attend_mixed(q, k, v, bias, before, after)], [expected], 1e-5)
    monkeypatch.setattr(attention, 'SCORE_BYTES', 3 * 2 * 4 * 7 * 4)  # three queries
    sizes, mix = [], attention.mix_heads
    monkeypatch.setattr(attention, 'mix_heads',
                        lambda conv, x, b: sizes.append(x.shape[2]) or mix(conv, x, b))
    with torch.no_grad():
        assert_close([attend_mixed(q, k, v, bias, before, after)], [expected], 1e-5)
    assert sizes == [3, 3, 3, 3, 1, 1]
