"""The V1 backbone against timm's and transformers' networks, and its own contract."""
import math

import pytest
import timm
import torch
from mmengine.utils import digit_version
from timm.models.efficientformer import Attention as TimmAttention
from torch import nn

from mmeffformer import EfficientFormer, load_weights

# A network of every kind of part that runs in milliseconds.
TINY = dict(widths=(8, 16, 16, 24), depths=(1, 1, 2, 3), attention_blocks=(0, 0, 1, 2))


def tiny(**kwargs) -> EfficientFormer:
    return EfficientFormer(TINY, **kwargs)


def image(height: int, width: int, batch: int = 1, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, dtype=dtype,
                       generator=torch.Generator().manual_seed(height * width))


def assert_close(actual, expected, relative: float = 1e-5):
    """Compare tensors relative to the largest value of each."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=relative * b.abs().max().item())


def timm_twin(arch: str, randomize, bias_grid=(7, 7)):
    """Return timm's network with random weights and ours with the same, both float64."""
    theirs = timm.create_model(f'efficientformer_{arch}')
    for block in theirs.stages[3].blocks:
        if hasattr(block, 'norm1'):
            dim = block.token_mixer.qkv.in_features
            block.token_mixer = TimmAttention(dim, resolution=bias_grid)
    randomize(theirs).double().eval()
    state = theirs.state_dict()
    if bias_grid[0] != bias_grid[1]:  # checkpoints hold square tables only
        state = {key: value.new_zeros(8, 49) if key.endswith('attention_biases') else value
                 for key, value in state.items()}
    ours = EfficientFormer(arch, bias_grid=bias_grid, out_norm_cfg=None).double().eval()
    load_weights(ours, state)
    biases = [block.token_mixer.attention_biases for block in theirs.stages[3].blocks
              if hasattr(block, 'norm1')]
    for bias, block in zip(biases, ours.stages[3].blocks[-len(biases):]):
        block.token_mixer.bias.table.data = bias.detach().clone().view(8, *bias_grid)
    return theirs, ours


def timm_features(model, x):
    """The four stages' outputs of timm's network, at any size of the last grid."""
    x = model.stem(x)
    features = []
    for stage in model.stages:
        x = stage(x)
        if x.dim() == 3:
            height, width = (-(-n // 2) for n in features[-1].shape[2:])
            x = x.transpose(1, 2).unflatten(2, (height, width))
        features.append(x)
    return features


@pytest.mark.parametrize('arch', ['l1', 'l3', 'l7'])
def test_features_equal_timm_at_224(arch, randomize):
    theirs, ours = timm_twin(arch, randomize)
    x = image(224, 224, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.forward_intermediates(x, intermediates_only=True)
        assert_close(ours(x), expected, 1e-9)


@pytest.mark.parametrize('grid', [(5, 9), (12, 4), (25, 25)])
def test_features_equal_timm_with_attention_built_for_another_grid(grid, randomize):
    theirs, ours = timm_twin('l1', randomize, grid)
    # The last row and column of tokens see only a part of their 32 px.
    x = image(grid[0] * 32 - 3, grid[1] * 32 - 31, dtype=torch.float64)
    with torch.no_grad():
        assert_close(ours(x), timm_features(theirs, x), 1e-9)


@pytest.mark.parametrize('train, side', [(False, 224), (True, 96)])
def test_gradients_of_every_parameter_equal_timm(train, side, randomize):
    theirs, ours = timm_twin('l1', randomize, (side // 32, side // 32))
    theirs.train(train)
    ours.train(train)
    x = image(side, side, batch=2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    loss = {}
    for model, features in ((theirs, timm_features(theirs, x)), (ours, ours(x))):
        generator.manual_seed(0)
        loss[model] = sum((f * torch.randn(f.shape, generator=generator, dtype=f.dtype)).sum()
                          for f in features)
        loss[model].backward()
    torch.testing.assert_close(loss[ours], loss[theirs])
    # Gradients have the names and shapes of weights, so loading renames them.
    expected = EfficientFormer('l1', bias_grid=side // 32, out_norm_cfg=None).double()
    load_weights(expected, {**theirs.state_dict(), **{
        key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}})
    actual = dict(ours.named_parameters())
    floor = 1e-6 * max(p.abs().max().item() for p in expected.parameters())
    for key, gradient in expected.named_parameters():
        largest = gradient.abs().max().item()
        # A convolution's bias has no effect on what a BatchNorm in training makes of it.
        assert largest > floor or (train and key.endswith('conv.bias')), key
        torch.testing.assert_close(actual[key].grad, gradient.detach(), rtol=0,
                                   atol=1e-5 * max(largest, floor), msg=key)


def test_features_equal_transformers_l1(randomize):
    from transformers.models.deprecated.efficientformer import (
        EfficientFormerConfig,
        EfficientFormerModel,
    )
    theirs = randomize(EfficientFormerModel(EfficientFormerConfig(layer_norm_eps=1e-5)))
    ours = EfficientFormer('l1', out_norm_cfg=None)
    load_weights(ours, theirs.state_dict())
    x = image(224, 224, dtype=torch.float64)
    with torch.no_grad():
        stem = theirs.double().eval().patch_embed(x)
        # Theirs lists what goes in, stages, embeddings in between, and the last stage's tokens.
        *states, tokens = theirs.encoder(stem, output_hidden_states=True).hidden_states
        assert_close(ours.double().eval()(x),
                     [*states[1::2], tokens.transpose(1, 2).unflatten(2, (7, 7))])


@pytest.mark.parametrize('arch, classifier', [
    ('l1', 12_289_928), ('l3', 31_406_000), ('l7', 82_229_328)])
def test_parameters_as_published(arch, classifier):
    # The published counts include a LayerNorm and two linear heads for 1000 classes.
    backbone = EfficientFormer(arch, out_norm_cfg=None)
    channels = backbone.out_channels[-1]
    top = 2 * channels + 2 * (channels * 1000 + 1000)
    assert sum(p.numel() for p in backbone.parameters()) + top == classifier


@pytest.mark.parametrize('height, width', [(32, 32), (33, 65), (64, 97), (95, 32), (130, 61)])
@pytest.mark.parametrize('train', [False, True])
def test_shapes(height, width, train):
    model = tiny().train(train)
    outs = model(image(height, width, batch=2))
    assert model.out_channels == TINY['widths']
    assert model.out_strides == (4, 8, 16, 32)
    assert [out.shape for out in outs] == [
        (2, channels, math.ceil(height / stride), math.ceil(width / stride))
        for channels, stride in zip(model.out_channels, model.out_strides)]
    assert all(out.isfinite().all() for out in outs)


@pytest.mark.parametrize('out_indices', [(3,), (0, 2), (1, 2, 3)])
def test_out_indices(out_indices, randomize):
    every, some = (randomize(tiny(**kwargs, out_norm_cfg=None)).eval()
                   for kwargs in ({}, {'out_indices': out_indices}))
    outs = every(image(64, 64))
    assert_close(some(image(64, 64)), [outs[i] for i in out_indices], 0)
    assert some.out_channels == tuple(TINY['widths'][i] for i in out_indices)
    assert some.out_strides == tuple((4, 8, 16, 32)[i] for i in out_indices)


def test_every_trained_parameter_gets_a_gradient_whatever_the_outputs():
    # Distributed training stops at parameters that wait for a gradient in vain.
    for out_indices in ((0,), (0, 1, 2), (1, 3)):
        model = tiny(out_indices=out_indices).train()
        sum(out.sum() for out in model(image(64, 64, batch=2))).backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        assert model.stages[out_indices[-1]].blocks[0].layer_scale1.requires_grad


@pytest.mark.parametrize('train', [False, True])
def test_memory_format_is_kept(train, randomize):
    model = randomize(tiny()).train(train)
    rowwise = model(image(96, 64, batch=2))
    assert all(out.is_contiguous() for out in rowwise)
    model.to(memory_format=torch.channels_last)
    inputs = []
    hooks = [module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
             for module in model.modules() if isinstance(module, nn.Conv2d)]
    outs = model(image(96, 64, batch=2).to(memory_format=torch.channels_last))
    for hook in hooks:
        hook.remove()
    assert len(inputs) == len(hooks) and all(
        x.is_contiguous(memory_format=torch.channels_last) for x in [*inputs, *outs])
    assert_close(outs, rowwise, 1e-4)


def test_channels_last_of_one_image_stays_channels_last():
    model = tiny(out_norm_cfg=None).eval().to(memory_format=torch.channels_last)
    outs = model(image(96, 160).to(memory_format=torch.channels_last))
    # A batch of one has two right answers for the first stride; only one passes for the format.
    assert all(out.stride(0) == out[0].numel() for out in outs)
    assert all(out.stride(1) == 1 for out in outs)


AUTOCAST = [('cpu', torch.bfloat16, 5e-2)]
if digit_version(torch.__version__) >= digit_version('2.3'):  # before, a CPU knows bfloat16 only
    AUTOCAST += [('cpu', torch.float16, 1e-2)]
if torch.cuda.is_available():
    AUTOCAST += [('cuda', torch.bfloat16, 5e-2), ('cuda', torch.float16, 1e-2)]


@pytest.mark.parametrize('device, dtype, relative', AUTOCAST)
def test_autocast(device, dtype, relative, randomize):
    model = randomize(tiny()).to(device)
    x = image(64, 96, batch=2).to(device)
    expected = model(x)
    with torch.autocast(device, dtype):
        outs = model(x)
    assert_close([out.float() for out in outs], expected, relative)
    sum(out.float().sum() for out in outs).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_checkpointing_changes_nothing_but_memory(randomize):
    plain, recomputing = (randomize(tiny(with_cp=with_cp)) for with_cp in (False, True))
    for model in (plain, recomputing):
        sum(out.square().mean() for out in model(image(64, 64, batch=2))).backward()
    for a, b in zip(plain.parameters(), recomputing.parameters()):
        assert torch.equal(a.grad, b.grad)
    kept = []
    for model in (plain, recomputing):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            model(image(64, 64, batch=2))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize('frozen', [-1, 0, 2, 4])
def test_frozen_stages(frozen):
    model = tiny(frozen_stages=frozen)
    assert model.train() is model and model.training
    parts = [model.stem, *model.stages]
    for part in parts[:frozen + 1]:
        assert not any(p.requires_grad for p in part.parameters())
        assert not any(module.training for module in part.modules())
    for part in parts[frozen + 1:]:
        assert all(p.requires_grad for p in part.parameters())
        assert all(module.training for module in part.modules())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    outs = model(image(64, 64, batch=2))
    if frozen < 4:
        sum(out.mean() for out in outs).backward()
    changed = {key for key, value in model.state_dict().items()
               if not torch.equal(value, before[key])}
    assert not any(key.startswith('stem') for key in changed) or frozen < 0
    assert {int(key.split('.')[1]) for key in changed if key.startswith('stages')} == {
        *range(max(frozen, 0), 4)}


def test_norm_eval_keeps_statistics():
    model = tiny(norm_eval=True).train()
    before = model.state_dict()['stem.0.norm.running_mean'].clone()
    model(image(64, 64, batch=2))
    assert torch.equal(model.state_dict()['stem.0.norm.running_mean'], before)
    assert model.stem[0].norm.weight.requires_grad
    assert model.stages[3].blocks[-1].training


def test_norm_and_activation_follow_their_configs():
    model = tiny(norm_cfg=dict(type='SyncBN', eps=1e-3), act_cfg=dict(type='SiLU'))
    norms = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(norms) == 2 + 3 + 2 * 4 and {norm.eps for norm in norms} == {1e-3}
    assert not [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.GELU))]
    assert len([m for m in model.modules() if isinstance(m, nn.SiLU)]) == 7
    frozen = tiny(norm_cfg=dict(type='BN', requires_grad=False))
    assert not frozen.stem[0].norm.weight.requires_grad


def test_drop_path_grows_with_depth_and_drops_whole_samples():
    model = tiny(drop_path_rate=0.6)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert [block.drop_path.p for block in blocks] == pytest.approx(
        [0.1 * i for i in range(7)])
    torch.manual_seed(0)
    block = blocks[-1].train()
    nn.init.ones_(block.layer_scale1)
    nn.init.zeros_(block.layer_scale2)
    x = torch.randn(400, 4, 24)
    kept = (block(x, (2, 2)) != x).flatten(1).any(1)
    assert 0.3 < kept.float().mean() < 0.5
    assert torch.equal(model.eval()(image(64, 64))[3], model(image(64, 64))[3])


def test_layer_scale_init_value():
    model = tiny(layer_scale_init_value=1e-3)
    scales = [p for key, p in model.named_parameters() if 'layer_scale' in key]
    assert len(scales) == 14 and all((p == 1e-3).all() for p in scales)


def test_in_channels():
    outs = EfficientFormer(TINY, in_channels=5)(torch.randn(2, 5, 64, 64))
    assert outs[0].shape == (2, 8, 16, 16)


def test_expansion():
    model = EfficientFormer(dict(TINY, expansion=2.5))
    assert model.stages[0].blocks[0].mlp.expand.conv.out_channels == 20
    assert model.stages[3].blocks[2].mlp.expand.out_features == 60


def test_registered_for_every_scope():
    from mmengine.registry import MODELS as ROOT
    for registry in (ROOT, __import__('mmdet.registry').registry.MODELS,
                     __import__('mmseg.registry').registry.MODELS,
                     __import__('mmpretrain.registry').registry.MODELS):
        built = registry.build(dict(type='mmeffformer.EfficientFormer', arch=dict(TINY)))
        assert type(built) is EfficientFormer


@pytest.mark.parametrize('kwargs, message', [
    (dict(arch='l2'), r"arch 'l2' is unknown; choose from l1, l3, l7 or pass a dict"),
    (dict(arch=3), 'arch 3 is neither a name nor a dict'),
    (dict(arch=dict(widths=(8, 8, 8, 8))), 'arch dict lacks depths'),
    (dict(arch=dict(TINY, heads=8)), 'arch dict has unknown keys heads'),
    (dict(arch=dict(TINY, widths=(8, 16, 16))), r'widths=\(8, 16, 16\): expected 4 integers'),
    (dict(arch=dict(TINY, widths=(7, 16, 16, 24))), 'the first must be even'),
    (dict(arch=dict(TINY, depths=(1, 0, 2, 3))), 'depths=.*at least 1'),
    (dict(arch=dict(TINY, attention_blocks=(0, 0, 0, 4))), 'stage 4 has only 3 blocks'),
    (dict(arch=dict(TINY, expansion=0)), 'expansion=0: expected a number that leaves every'),
    (dict(arch=dict(TINY, expansion=.01)), 'expansion=0.01: expected'),
    (dict(arch=dict(TINY, expansion=float('nan'))), 'expansion=nan: expected'),
    (dict(bias_grid=2.5), r'bias_grid=2.5: expected a positive integer or \(rows, cols\)'),
    (dict(out_indices=(0, 4)), r'out_indices=\(0, 4\): expected one or more of \(0, 1, 2, 3\)'),
    (dict(out_indices=(1, 0)), 'in increasing order'),
    (dict(out_indices=()), 'expected one or more'),
    (dict(frozen_stages=5), r'frozen_stages=5: expected -1 \(none\) to 4'),
    (dict(drop_path_rate=1.), 'drop_path_rate=1.0: expected 0 <= rate < 1'),
    (dict(bias_grid=0), r'bias_grid=0: expected a positive integer or \(rows, cols\)'),
    (dict(in_channels=0), 'in_channels=0: expected a positive integer'),
    (dict(norm_cfg=dict(type='Norm3000')), "norm_cfg type 'Norm3000' is unknown"),
    (dict(act_cfg=dict(type='Act3000')), "act_cfg type 'Act3000' is unknown"),
])
def test_wrong_arguments_are_explained(kwargs, message):
    with pytest.raises(ValueError, match=message):
        EfficientFormer(**{'arch': dict(TINY), **kwargs})


@pytest.mark.parametrize('shape, message', [
    ((1, 3, 31, 64), '31 x 64 px .*at least 32'),
    ((1, 3, 64, 16), '64 x 16 px .*at least 32'),
    ((1, 4, 64, 64), r'\(1, 4, 64, 64\): expected \(batch, 3, height, width\)'),
    ((3, 64, 64), r'\(3, 64, 64\): expected'),
])
def test_wrong_inputs_are_explained(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(shape))
