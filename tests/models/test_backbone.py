"""The contract that both backbones keep."""
import pytest
import torch
from mmengine.utils import digit_version
from support.helpers import assert_close, image
from torch import nn
from torch.distributions import Normal, Uniform

from mmeffformer import EfficientFormer, EfficientFormerV2
from mmeffformer.models.attention import MB3D
from mmeffformer.search.supernet import SuperEfficientFormer

# Networks of every kind of part that run in milliseconds.
ARCH = dict(widths=(8, 16, 16, 24), depths=(1, 1, 2, 3), attention_blocks=(0, 0, 1, 2))
NORM = dict(type='GN', num_groups=1)


@pytest.fixture(params=[EfficientFormer, EfficientFormerV2])
def tiny(request):
    """A function that builds a tiny backbone, with V1's default output norms."""
    return lambda **kwargs: request.param(**{'arch': dict(ARCH), 'out_norm_cfg': NORM, **kwargs})


@pytest.mark.parametrize('kind, arch, classifier', [
    (EfficientFormer, 'l1', 12_289_928), (EfficientFormer, 'l3', 31_406_000),
    (EfficientFormer, 'l7', 82_229_328), (EfficientFormerV2, 's0', 3_600_256),
    (EfficientFormerV2, 's1', 6_185_560), (EfficientFormerV2, 's2', 12_710_112),
    (EfficientFormerV2, 'l', 26_322_288)])
def test_parameters_as_published(kind, arch, classifier):
    with torch.device('meta'):
        backbone = kind(arch, out_norm_cfg=None)
    # The published counts include a norm and two linear heads for 1000 classes.
    channels = backbone.out_channels[-1]
    top = 2 * channels + 2 * (channels * 1000 + 1000)
    assert sum(p.numel() for p in backbone.parameters()) + top == classifier


def is_drawn_from(values, distribution) -> bool:
    """Return what the test of Kolmogorov and Smirnov says, wrong for one sample in 100,000."""
    cdf = distribution.cdf(values.detach().flatten().sort().values)
    steps = torch.linspace(0, 1, len(cdf) + 1)
    return torch.maximum(cdf - steps[:-1], steps[1:] - cdf).max() < 2.47 * len(cdf) ** -.5


@pytest.mark.parametrize('kind', [EfficientFormer, EfficientFormerV2, SuperEfficientFormer])
def test_fresh_weights_have_the_distributions_of_the_authors(kind):
    torch.manual_seed(0)
    linear = 0
    for name, layer in kind(ARCH).named_modules():
        if isinstance(layer, nn.Linear) or name.endswith(('mlp.expand.conv', 'mlp.project.conv')):
            assert is_drawn_from(layer.weight, Normal(0, .02)) and not layer.bias.any(), name
            linear += 1
        elif isinstance(layer, nn.Conv2d):
            bound = layer.weight[0].numel() ** -.5
            assert is_drawn_from(layer.weight, Uniform(-bound, bound)), name
            assert is_drawn_from(layer.bias, Uniform(-bound, bound)), name
    assert linear == {EfficientFormer: 20, EfficientFormerV2: 14, SuperEfficientFormer: 34}[kind]


@pytest.mark.parametrize('out_indices', [(3,), (0, 2), (1, 2, 3)])
def test_out_indices(tiny, out_indices, randomize):
    every, some = (randomize(tiny(**kwargs, out_norm_cfg=None)).eval()
                   for kwargs in ({}, {'out_indices': out_indices}))
    outs = every(image(64, 64))
    assert_close(some(image(64, 64)), [outs[i] for i in out_indices], 0)
    assert some.out_channels == tuple(ARCH['widths'][i] for i in out_indices)
    assert some.out_strides == tuple((4, 8, 16, 32)[i] for i in out_indices)


def test_every_trained_parameter_gets_a_gradient_whatever_the_outputs(tiny):
    # Distributed training stops at parameters that wait for a gradient in vain.
    for out_indices in ((0,), (0, 1, 2), (1, 3)):
        model = tiny(out_indices=out_indices).train()
        sum(out.sum() for out in model(image(64, 64, batch=2))).backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        assert model.stages[out_indices[-1]].blocks[0].layer_scale2.requires_grad


@pytest.mark.parametrize('train', [False, True])
def test_memory_format_is_kept(tiny, train, randomize):
    model = randomize(tiny()).train(train)
    rowwise = model(image(96, 64, batch=2))
    assert all(out.is_contiguous() for out in rowwise)
    model.to(memory_format=torch.channels_last)
    inputs = []
    hooks = [module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
             for name, module in model.named_modules()
             if isinstance(module, nn.Conv2d) and 'talking_head' not in name]
    outs = model(image(96, 64, batch=2).to(memory_format=torch.channels_last))
    for hook in hooks:
        hook.remove()
    assert len(inputs) == len(hooks) and all(
        x.is_contiguous(memory_format=torch.channels_last) for x in [*inputs, *outs])
    assert_close(outs, rowwise, 1e-4)


def test_channels_last_of_one_image_stays_channels_last(tiny):
    model = tiny(out_norm_cfg=None).eval().to(memory_format=torch.channels_last)
    outs = model(image(96, 160).to(memory_format=torch.channels_last))
    # A batch of one has two right answers for the first stride; only one passes for the format.
    assert all(out.stride(0) == out[0].numel() for out in outs)
    assert all(out.stride(1) == 1 for out in outs)


AUTOCAST = [('cpu', torch.bfloat16, 1e-1)]
if digit_version(torch.__version__) >= digit_version('2.3'):  # before, a CPU knows bfloat16 only
    AUTOCAST += [('cpu', torch.float16, 2e-2)]
AUTOCAST += [pytest.param('cuda', dtype, relative, marks=pytest.mark.gpu)
             for dtype, relative in ((torch.bfloat16, 2e-1), (torch.float16, 3e-2))]


@pytest.mark.parametrize('device, dtype, relative', AUTOCAST)
def test_autocast(tiny, device, dtype, relative, randomize):
    model = randomize(tiny()).to(device)
    x = image(64, 96, batch=2).to(device)
    expected = model(x)
    with torch.autocast(device, dtype):
        outs = model(x)
    assert_close([out.float() for out in outs], expected, relative)
    sum(out.float().sum() for out in outs).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('frozen', [-1, 0, 2, 4])
def test_frozen_stages(tiny, frozen):
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


def test_norm_eval_keeps_statistics(tiny):
    model = tiny(norm_eval=True).train()
    before = model.state_dict()['stem.0.norm.running_mean'].clone()
    model(image(64, 64, batch=2))
    assert torch.equal(model.state_dict()['stem.0.norm.running_mean'], before)
    assert model.stem[0].norm.weight.requires_grad
    assert model.stages[3].blocks[-1].training


def test_drop_path_grows_with_depth_and_drops_whole_samples(tiny):
    model = tiny(drop_path_rate=0.6)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert [block.drop_path.p for block in blocks] == pytest.approx(
        [0.1 * i for i in range(7)])
    torch.manual_seed(0)
    block = blocks[-1].train()
    nn.init.ones_(block.layer_scale1)
    nn.init.zeros_(block.layer_scale2)
    tokens = isinstance(block, MB3D)
    x = torch.randn(400, 4, 24) if tokens else torch.randn(400, 24, 2, 2)
    kept = (block(x, *[(2, 2)] * tokens) != x).flatten(1).any(1)
    assert 0.3 < kept.float().mean() < 0.5
    assert torch.equal(model.eval()(image(64, 64))[3], model(image(64, 64))[3])


def test_registered_for_every_scope(tiny):
    from mmengine.registry import MODELS as ROOT
    for registry in (ROOT, __import__('mmdet.registry').registry.MODELS,
                     __import__('mmseg.registry').registry.MODELS,
                     __import__('mmpretrain.registry').registry.MODELS):
        kind = type(tiny())
        built = registry.build(dict(type=f'mmeffformer.{kind.__name__}', arch=dict(ARCH)))
        assert type(built) is kind


@pytest.mark.parametrize('kwargs, message', [
    (dict(arch='l2'), r"arch 'l2' is unknown; choose from (l1, l3, l7|s0, s1, s2, l) or pass a"),
    (dict(arch=3), 'arch 3 is neither a name nor a dict'),
    (dict(arch=dict(widths=(8, 8, 8, 8))), 'arch dict lacks depths'),
    (dict(arch=dict(ARCH, heads=8)), 'arch dict has unknown keys heads'),
    (dict(arch=dict(ARCH, widths=(8, 16, 16))), r'widths=\(8, 16, 16\): expected 4 integers'),
    (dict(arch=dict(ARCH, widths=(7, 16, 16, 24))), 'the first must be even'),
    (dict(arch=dict(ARCH, depths=(1, 0, 2, 3))), 'depths=.*at least 1'),
    (dict(arch=dict(ARCH, attention_blocks=(0, 0, 0, 4))), 'stage 4 has only 3 blocks'),
    (dict(arch=dict(ARCH, expansion=0)), 'expansion=0: expected numbers that leave every'),
    (dict(arch=dict(ARCH, expansion=(4, 4, 4))), 'one entry for each of the 4 stages'),
    (dict(arch=dict(ARCH, expansion=(4, 4, 4, (4, 3)))),
     'stage 4 has 3 blocks, but 2 numbers are given'),
    (dict(bias_mode='new'), "bias_mode='new': expected one of offset, legacy"),
    (dict(bias_grid=2.5), r'bias_grid=2.5: expected a positive integer or \(rows, cols\)'),
    (dict(out_indices=(0, 4)), r'out_indices=\(0, 4\): expected one or more of \(0, 1, 2, 3\)'),
    (dict(out_indices=(1, 0)), 'in increasing order'),
    (dict(frozen_stages=5), r'frozen_stages=5: expected -1 \(none\) to 4'),
    (dict(drop_path_rate=1.), 'drop_path_rate=1.0: expected 0 <= rate < 1'),
    (dict(in_channels=0), 'in_channels=0: expected a positive integer'),
    (dict(norm_cfg=dict(type='Norm3000')), r"norm_cfg={'type': 'Norm3000'} cannot be built"),
    (dict(act_cfg=dict(type='Act3000')), r"act_cfg={'type': 'Act3000'} cannot be built"),
])
def test_wrong_arguments_are_explained(tiny, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny(**kwargs)
