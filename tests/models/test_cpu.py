"""Faster inference on CPUs equals the plain formulas."""
import pytest
import torch
from support.helpers import assert_close, image
from torch import nn

from mmeffformer import EfficientFormer, EfficientFormerV2
from mmeffformer.models import attention, cpu
from mmeffformer.models.attention import attend, attend_mixed
from mmeffformer.models.cpu import by_strips
from mmeffformer.models.efficientformer_v2 import FfnBlock
from mmeffformer.models.layers import MB4D, ConvNorm

KINDS = [EfficientFormer, EfficientFormerV2]
ARCH = dict(widths=(16, 16, 24, 32), depths=(2, 2, 3, 3), attention_blocks=(0, 0, 1, 1))
CFG = dict(norm_cfg=dict(type='BN'), act_cfg=dict(type='GELU'))


def record_rows(block) -> list:
    """Return a list to which each call of a block appends the rows that it computes."""
    asked, forward = [], block.forward
    block.forward = lambda x, rows=None: asked.append(rows) or forward(x, rows)
    return asked


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('kind', [MB4D, FfnBlock])
@torch.no_grad()
def test_strips_change_nothing(kind, fused, randomize, monkeypatch):
    block = randomize(kind(8, 32, 0., 1., **CFG)).eval()
    if fused:
        for module in [*block.mlp, block]:
            module.fuse()
    x = torch.randn(2, 8, 23, 9).to(memory_format=torch.channels_last)
    expected = block(x)
    asked = record_rows(block)
    monkeypatch.setattr(cpu, 'STRIP_BYTES', 5 * 9 * 32 * 4)  # five rows
    out = by_strips(block, x, 32)
    assert_close([out], [expected], 1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert asked == 2 * [slice(0, 5), *[slice(1, 6)] * 3, slice(1, 4)]  # of each image


def test_when_strips_do_not_apply(randomize, monkeypatch):
    monkeypatch.setattr(cpu, 'STRIP_BYTES', 5 * 9 * 32 * 4)
    block = randomize(MB4D(8, 32, 0., 1., **CFG)).eval()
    asked = record_rows(block)
    x = torch.randn(1, 8, 23, 9)
    by_strips(block, x.to(memory_format=torch.channels_last), 32)  # backward may follow
    with torch.no_grad():
        by_strips(block, x, 32)  # a strip of NCHW is not in one piece
        by_strips(block, x[:, :, :10].to(memory_format=torch.channels_last), 32)  # small
        by_strips(block.train(), x.to(memory_format=torch.channels_last), 32)  # statistics
        monkeypatch.setattr(cpu, 'ENABLED', False)
        by_strips(block.eval(), x.to(memory_format=torch.channels_last), 32)
        monkeypatch.setattr(cpu, 'ENABLED', True)
        block.compile(backend='eager')  # or it would be compiled for each kind of strip
        by_strips(block, x.to(memory_format=torch.channels_last), 32)
    assert asked == [None] * 6  # all rows at once


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_a_backbone_in_strips(kind, randomize, monkeypatch):
    model = randomize(kind(ARCH)).eval().switch_to_deploy().to(memory_format=torch.channels_last)
    x = image(130, 97, batch=2).to(memory_format=torch.channels_last)
    expected = model(x)
    monkeypatch.setattr(cpu, 'STRIP_BYTES', 2 ** 13)
    monkeypatch.setattr(cpu, 'SCORE_BYTES', 2 ** 12)
    assert_close(model(x), expected, 1e-5)


@pytest.mark.parametrize('act', [dict(type='ReLU'), dict(type='GELU'), dict(type='SiLU'),
                                 dict(type='GELU', approximate='tanh'), dict(type='HSwish')])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_activations_within_a_convolution(act, layout, randomize, monkeypatch):
    layer = randomize(ConvNorm(4, 6, 3, 2, norm_cfg=dict(type='BN'), act_cfg=act)).eval()
    layer.to(memory_format=layout)
    inputs = [torch.randn(2, 4, 9, 7).to(memory_format=layout), torch.randn(1, 9, 4, 8)[:, 2:6],
              torch.randn(2, 4, 8, 9).transpose(2, 3), torch.randn(2, 7, 7, 4).permute(0, 3, 1, 2)]
    expected = [layer(x) for x in inputs]
    layer.fuse()
    assert bool(layer.post_op) == (act in (dict(type='ReLU'), dict(type='GELU'),
                                           dict(type='SiLU')))
    assert cpu.fuses_activation(inputs[0])  # else torch has moved its operator
    assert_close([layer(x) for x in inputs], expected, 1e-5)
    monkeypatch.setattr(cpu, 'ENABLED', False)
    assert_close([layer(x) for x in inputs], expected, 1e-5)
    monkeypatch.undo()
    with torch.autocast('cpu', torch.bfloat16):
        assert layer(inputs[0]).dtype == torch.bfloat16
    assert layer.double()(inputs[0].double()).dtype == torch.float64


@pytest.mark.parametrize('context', [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize('queries, keys', [(6, 6), (4, 9)])
def test_attention_that_never_holds_all_scores(queries, keys, context, monkeypatch):
    q, k, v = (torch.randn(2, 3, n, d) for n, d in ((queries, 4), (keys, 4), (keys, 10)))
    bias = torch.randn(3, queries, keys)
    expected = (q @ k.transpose(2, 3) / 2 + bias).softmax(-1) @ v
    monkeypatch.setattr(cpu, 'SCORE_BYTES', 4 * keys * 4)  # four queries
    with context():
        assert_close([attend(q, k, v, bias), attend(q, k, v, bias, fused=True)], [expected] * 2,
                     1e-5)


def test_mixed_attention_some_queries_at_a_time(monkeypatch):
    q, k, v = (torch.randn(2, 4, n, d) for n, d in ((7, 3), (7, 3), (7, 5)))
    bias, before, after = torch.randn(4, 7, 7), nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1)
    expected = after((before(q @ k.transpose(2, 3)) + bias).softmax(-1)) @ v
    assert_close([attend_mixed(q, k, v, bias, before, after)], [expected], 1e-5)
    monkeypatch.setattr(cpu, 'SCORE_BYTES', 3 * 2 * 4 * 7 * 4)  # three queries
    sizes, mix = [], attention.mix_heads
    monkeypatch.setattr(attention, 'mix_heads',
                        lambda conv, x, b: sizes.append(x.shape[2]) or mix(conv, x, b))
    with torch.no_grad():
        assert_close([attend_mixed(q, k, v, bias, before, after)], [expected], 1e-5)
    assert sizes == [3, 3, 3, 3, 1, 1]
