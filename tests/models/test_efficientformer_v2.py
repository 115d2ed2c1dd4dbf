"""The V2 backbone equals timm's networks, and on odd grids the formula of its attention."""
import pytest
import timm
import torch
import torch.nn.functional as F
from support.helpers import assert_close, assert_losses_close, image

from mmeffformer import EfficientFormerV2, load_weights
from mmeffformer.models.attention import AttentionDownsample, StridedAttention, expand_table

NORM, ACT = dict(type='BN'), dict(type='GELU')


def timm_twin(arch: str, randomize, size=(224, 224)):
    """Return timm's network for images of ``size`` with random weights, and the backbone with
    the same, in float64."""
    reference = timm.create_model(f'efficientformerv2_{arch}', img_size=size)
    randomize(reference).double().train()
    for norm in reference.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = 1
    with torch.no_grad():  # statistics of real activations, so that no softmax saturates
        reference(image(*size, dtype=torch.float64))
    reference.eval()
    grid = tuple(-(-n // 32) for n in size)
    backbone = EfficientFormerV2(arch, bias_grid=grid).double().eval()
    load_weights(backbone, reference.state_dict())
    return reference, backbone


@pytest.mark.parametrize('arch', ['s0', 's1', 's2', 'l'])
def test_features_equal_timm_at_224(arch, randomize):
    reference, backbone = timm_twin(arch, randomize)
    x = image(224, 224, dtype=torch.float64)
    with torch.no_grad():
        expected = reference.forward_intermediates(x, intermediates_only=True)
        assert_close(backbone(x), expected, 1e-9)


@pytest.mark.parametrize('size', [(160, 288), (384, 128), (512, 512)])
def test_features_equal_timm_built_for_another_size(size, randomize):
    reference, backbone = timm_twin('s0', randomize, size)
    x = image(*size, dtype=torch.float64)
    with torch.no_grad():
        expected = reference.forward_intermediates(x, intermediates_only=True)
        assert_close(backbone(x), expected, 1e-9)


@pytest.mark.parametrize('train', [False, True])
def test_gradients_of_every_parameter_equal_timm(train, randomize):
    reference, backbone = timm_twin('s0', randomize, (96, 96))
    reference.train(train)
    backbone.train(train)
    x = image(96, 96, batch=4, dtype=torch.float64)
    # A bias has no effect on what a BatchNorm in training makes of it, nor one that is
    # the same for all keys on a softmax.
    zero = ['k.conv.bias', 'k.norm.bias', 'talking_head1.bias'] + [
        'conv.bias', 'q_local.bias', 'stride_conv.norm.bias'] * train
    expected = reference.forward_intermediates(x, intermediates_only=True)
    assert_losses_close(reference, expected, backbone, backbone(x), zero)


@pytest.mark.parametrize('stride, size', [(2, (5, 7)), (2, (5, 4)), (1, (3, 5))])
def test_attention_on_odd_grids_is_its_formula(stride, size, randomize):
    grid = tuple(-(-n // stride) for n in size)
    mixer = randomize(StridedAttention(6, grid, 'offset', stride, NORM, ACT, heads=2, key_dim=3,
                                       value_dim=4)).double().eval()
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    inner = mixer.stride_conv(x) if stride > 1 else x
    q, k, v = (conv(inner).flatten(2) for conv in (mixer.q, mixer.k, mixer.v))
    scores = torch.stack([
        torch.einsum('bdq,bdk->bqk', q[:, 3 * h:3 * h + 3], k[:, 3 * h:3 * h + 3]) / 3 ** .5
        + expand_table(mixer.bias.table)[h] for h in range(2)], 1)
    mixed = torch.einsum('oh,bhqk->boqk', mixer.talking_head1.weight[..., 0, 0], scores) \
        + mixer.talking_head1.bias[:, None, None]
    mixed = torch.einsum('oh,bhqk->boqk', mixer.talking_head2.weight[..., 0, 0],
                         mixed.softmax(-1)) + mixer.talking_head2.bias[:, None, None]
    out = torch.cat([torch.einsum('bqk,bdk->bdq', mixed[:, h], v[:, 4 * h:4 * h + 4])
                     for h in range(2)], 1)
    out = out.view(2, 8, *grid) + mixer.v_local(v.view(2, 8, *grid))
    if stride > 1:
        out = F.interpolate(out, [2 * n for n in grid], mode='bilinear')[..., :size[0], :size[1]]
    assert_close([mixer(x)], [mixer.proj(F.gelu(out))], 1e-9)


@pytest.mark.parametrize('size', [(5, 7), (4, 3), (6, 4)])
def test_attention_downsampling_on_odd_grids_is_its_formula(size, randomize):
    down = randomize(AttentionDownsample(6, 10, size, 'offset', NORM, ACT, heads=2, key_dim=3,
                                         value_dim=4)).double().eval()
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    q, k, v = down.q(down.q_local(x) + x[:, :, ::2, ::2]), down.k(x), down.v(x)
    rows, cols = q.shape[2:]
    out = torch.empty(2, 8, rows, cols, dtype=torch.float64)
    for h in range(2):
        for y in range(rows):
            for z in range(cols):
                dy = (2 * y - torch.arange(size[0])).abs()
                dz = (2 * z - torch.arange(size[1])).abs()
                scores = (q[:, 3 * h:3 * h + 3, y, z, None, None]
                          * k[:, 3 * h:3 * h + 3]).sum(1) / 3 ** .5
                scores = scores + down.bias.table[h][dy][:, dz]
                weights = scores.flatten(1).softmax(-1)
                out[:, 4 * h:4 * h + 4, y, z] = torch.einsum(
                    'bk,bdk->bd', weights, v[:, 4 * h:4 * h + 4].flatten(2))
    expected = down.embed(x) + down.proj(F.gelu(out + down.v_local(v)))
    assert_close([down(x)], [expected], 1e-9)


def test_expansion_of_each_block():
    backbone = EfficientFormerV2('s1')
    hidden = [[block.mlp.expand.conv.out_channels // width for block in stage.blocks]
              for stage, width in zip(backbone.stages, backbone.arch.widths)]
    assert hidden == [[4, 4, 4], [4, 4, 4], [4, 4, 3, 3, 3, 3, 4, 4, 4], [4, 4, 3, 3, 4, 4]]


def test_attention_in_the_first_stages_is_refused():
    with pytest.raises(ValueError, match='has attention in its last two stages only'):
        EfficientFormerV2(dict(widths=(8, 16, 16, 24), depths=(1, 1, 1, 1),
                               attention_blocks=(0, 1, 1, 1)))
