"""Every published layout against the network it belongs to."""
import json
from itertools import product

import pytest
import timm
import torch
import transformers
from mmpretrain.models import EfficientFormer as MMPretrainEfficientFormer
from support.official import DATA, official, parity_error, value
from timm.models.efficientformer import checkpoint_filter_fn
from torch import nn

from mmeffformer import EfficientFormer, EfficientFormerV2
from mmeffformer.models import ARCHS, ARCHS_V2
from mmeffformer.weights import LAYOUTS, LAYOUTS_V2, convert, load_weights

# Every tensor a backbone of the arch has, without output norms.
TENSORS = {'l1': 274, 'l3': 447, 'l7': 635, 's0': 559, 's1': 713, 's2': 1045, 'l': 1377}
RAW = dict(out_norm_cfg=None)


def fill(net: nn.Module) -> nn.Module:
    """Give all weights and statistics of a reference network random values."""
    state = {key: tensor if 'idxs' in key else value(key, tuple(tensor.shape))
             for key, tensor in net.state_dict().items()}
    net.load_state_dict(state)
    net.double().eval()  # mmpretrain's returns None
    return net


def timm_net(arch):
    return fill(timm.create_model(f'efficientformer_{arch}'))


def mmpretrain_net(arch, dense=True):
    kwargs = dict(out_indices=(0, 1, 2, 3), reshape_last_feat=True) if dense else {}
    return fill(MMPretrainEfficientFormer(arch, **kwargs))


def transformers_net(arch):
    spec = ARCHS[arch]
    config = transformers.EfficientFormerConfig(
        depths=list(spec.depths), hidden_sizes=list(spec.widths), dim=spec.widths[-1],
        hidden_size=spec.widths[-1], num_meta3d_blocks=spec.attention_blocks[-1])
    return fill(transformers.EfficientFormerForImageClassificationWithTeacher(config))


def image() -> torch.Tensor:
    return torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)).double()


def assert_same_features(net: EfficientFormer, expected):
    with torch.no_grad():
        features = net.double().eval()(image())
    assert len(features) == len(expected) == 4
    for feature, reference in zip(features, expected):
        assert feature.shape == reference.shape
        assert (feature - reference).abs().max() <= 1e-5 * reference.abs().max()


@torch.no_grad()
def timm_features(state):
    net = timm.create_model('efficientformer_l1').double()
    net.eval()
    net.load_state_dict(state)
    return net.forward_intermediates(image(), intermediates_only=True)


def test_timm():
    reference = timm_net('l1')
    net = EfficientFormer('l1', **RAW)
    report = load_weights(net, reference.state_dict())
    assert_same_features(net, timm_features(reference.state_dict()))
    assert (report.layout, report.prefix, report.resampled, report.unknown, report.missing) == (
        'timm', '', {}, (), ())
    assert len(report.loaded) == TENSORS['l1']
    assert {*report.dropped} == {
        'norm.weight', 'norm.bias', 'head.weight', 'head.bias', 'head_dist.weight',
        'head_dist.bias', 'stages.3.blocks.4.token_mixer.attention_bias_idxs'}


def test_official_against_timms_own_reading():
    state = official('official_cls_v1_l1')
    net = EfficientFormer('l1', **RAW)
    report = load_weights(net, {'model': state, 'epoch': 299})
    expected = checkpoint_filter_fn(state, None)
    indices = 'stages.3.blocks.4.token_mixer.attention_bias_idxs'
    expected[indices] = timm.create_model('efficientformer_l1').state_dict()[indices]
    assert_same_features(net, timm_features(expected))
    assert (report.layout, report.prefix) == ('official', 'model')
    assert len(report.loaded) == TENSORS['l1']
    assert len(report.dropped) == 7 and not report.unknown and not report.missing


@torch.no_grad()
def test_mmpretrain_dense_with_its_norms():
    reference = mmpretrain_net('l1')
    net = EfficientFormer('l1')
    report = load_weights(net, {'state_dict': {
        f'backbone.{key}': v for key, v in reference.state_dict().items()}, 'meta': {}})
    assert_same_features(net, reference(image()))
    assert (report.layout, report.prefix) == ('mmpretrain-dense', 'state_dict.backbone.')
    assert len(report.loaded) == TENSORS['l1'] + 8
    assert report.dropped == ('backbone.network.3.5.token_mixer.attention_bias_idxs',)
    assert not report.unknown and not report.missing


def test_mmpretrain_classifier_norm_is_no_output_norm():
    state = mmpretrain_net('l1', dense=False).state_dict()
    net = EfficientFormer('l1')
    report = load_weights(net, state)
    assert report.layout == 'mmpretrain'
    assert 'norm3.weight' in report.dropped and not report.unknown
    assert sorted(report.missing) == sorted(
        f'out_norms.{i}.{leaf}' for i in range(4) for leaf in ('weight', 'bias'))
    assert torch.equal(net.out_norms['3'].weight, torch.ones(448))


@torch.no_grad()
def test_transformers():
    reference = transformers_net('l1')
    net = EfficientFormer('l1', **RAW)
    report = load_weights(net, reference.state_dict())
    eps = reference.config.layer_norm_eps  # 1e-12, where everyone else has 1e-5
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    hidden = reference(image(), output_hidden_states=True).hidden_states
    stages = [hidden[i] for i in (1, 3, 5)]
    last = []
    reference.efficientformer.layernorm.register_forward_pre_hook(
        lambda module, args: last.append(args[0]))
    reference(image())
    stages.append(last[0].transpose(1, 2).unflatten(2, (7, 7)))
    assert_same_features(net, stages)
    assert (report.layout, report.prefix) == ('transformers', 'efficientformer.')
    assert len(report.loaded) == TENSORS['l1'] and not report.unknown and not report.missing
    assert {'classifier.weight', 'efficientformer.layernorm.bias'} < {*report.dropped}


@pytest.mark.parametrize('name', ['det_v1_l1', 'seg_v1_l1', 'det_v2_s0', 'seg_v2_s0'])
def test_legacy_mode_gives_the_outputs_of_the_authors_dense_networks(name):
    kind = EfficientFormerV2 if 'v2' in name else EfficientFormer
    errors = {}
    for mode in ('legacy', 'offset'):
        net = kind(name[-2:], bias_grid=25 if 'det' in name else 16, bias_mode=mode).eval()
        load_weights(net, official(f'official_{name}'))
        errors[mode] = parity_error(net, name)
    assert errors['legacy'] < 1e-5
    assert errors['offset'] > 1e-3  # so the vectors distinguish the modes


@pytest.mark.parametrize('task, grid', [('det', 25), ('seg', 16)])
@pytest.mark.parametrize('arch', [*ARCHS, *ARCHS_V2])
def test_every_dense_layout_of_the_authors_loads_completely(arch, task, grid):
    version, kind = ('v1', EfficientFormer) if arch in ARCHS else ('v2', EfficientFormerV2)
    state = official(f'official_{task}_{version}_{arch}')
    net = kind(arch, bias_grid=grid, bias_mode='legacy')
    report = load_weights(net, state)
    assert report.layout == 'official-dense'
    assert len(report.loaded) == len(net.state_dict()) == TENSORS[arch] + 8 * (version == 'v1')
    assert not report.resampled and not report.unknown and not report.missing
    assert all(key.rsplit('.')[-1] in ('attention_biases', 'attention_bias_idxs',
                                       'attention_bias_idxs_seg') for key in report.dropped)
    back = convert(net.state_dict(), net.arch, 'mmeffformer', 'official-dense')
    assert back.keys() == state.keys() - {*report.dropped}
    assert all(torch.equal(value, state[key]) for key, value in back.items())


@torch.no_grad()
def test_official_v2_and_timm_v2():
    state = official('official_cls_v2_s0')
    net = EfficientFormerV2('s0')
    report = load_weights(net, {'model': state})
    reference = timm.create_model('efficientformerv2_s0', num_classes=0)
    missing, unexpected = reference.load_state_dict(
        convert(state, net.arch, 'official', 'timm'), strict=False)
    assert not unexpected
    assert all(key.startswith('norm.') or key.endswith('idxs') for key in missing)
    reference.double().eval()
    expected = reference.forward_intermediates(image(), intermediates_only=True)
    assert_same_features(net, expected)
    assert (report.layout, report.prefix) == ('official', 'model')
    assert len(report.loaded) == TENSORS['s0'] and not report.unknown and not report.missing
    again = EfficientFormerV2('s0')
    assert load_weights(again, reference.float().state_dict()).layout == 'timm'
    assert_same_features(again, expected)


def published_shapes(layout, arch):
    """Return ``{key: shape}`` of a network, as the library of the layout builds it."""
    version, prefix = ('v1', '') if arch in ARCHS else ('v2', 'v2')
    if layout == 'official':
        return json.loads((DATA / 'keys' / f'official_cls_{version}_{arch}.json').read_text())
    if layout == 'transformers':
        spec = ARCHS[arch]
        net = transformers.EfficientFormerModel(transformers.EfficientFormerConfig(
            depths=list(spec.depths), hidden_sizes=list(spec.widths), dim=spec.widths[-1],
            num_meta3d_blocks=spec.attention_blocks[-1]))
    elif layout == 'mmpretrain':
        net = MMPretrainEfficientFormer(arch)
    else:
        net = timm.create_model(f'efficientformer{prefix}_{arch}',
                                features_only=layout == 'timm-features')
    return {key.removeprefix('model.'): value.shape for key, value in net.state_dict().items()}


@pytest.mark.parametrize('layout, arch', [
    *product(('timm', 'timm-features', 'mmpretrain', 'transformers', 'official'), ARCHS),
    *product(('timm', 'timm-features', 'official'), ARCHS_V2)])
def test_tables_name_exactly_the_tensors_of_the_libraries(layout, arch):
    v1 = arch in ARCHS
    with torch.device('meta'):
        shapes = published_shapes(layout, arch)
        native = (EfficientFormer(arch, **RAW) if v1 else EfficientFormerV2(arch)).state_dict()
    layouts, archs = (LAYOUTS, ARCHS) if v1 else (LAYOUTS_V2, ARCHS_V2)
    if layout not in layouts:  # timm's multi-scale networks of V1 have the keys of the others
        layout = 'timm'
    table = layouts[layout].table(archs[arch])
    assert table.keys() == native.keys()
    assert len({*table.values()}) == len(native) == TENSORS[arch]
    for native_key, key in table.items():
        shape = tuple(native[native_key].shape)
        if native_key.endswith('bias.table'):
            shape = (shape[0], shape[1] * shape[2])
        elif not v1 and 'layer_scale' in native_key and layout == 'official':
            shape += (1, 1)
        assert tuple(shapes[key]) == shape, key
    rest = {key for key in shapes if key not in table.values()}
    assert all('bias_idxs' in key or key.split('.')[0] in (
        'norm', 'norm3', 'layernorm', 'head', 'head_dist', 'dist_head') for key in rest)


@pytest.mark.parametrize('kind, layout', [
    (kind, name) for kind, layouts in ((EfficientFormer, LAYOUTS), (EfficientFormerV2, LAYOUTS_V2))
    for name in layouts if name != 'mmeffformer'])
def test_round_trip_is_bit_exact(kind, layout):
    net = kind(dict(widths=(8, 16, 24, 32), depths=(1, 2, 1, 3), attention_blocks=(0, 0, 0, 2)),
               **{} if kind is EfficientFormer else RAW)
    arch = net.arch
    state = {key: value(key, tuple(v.shape)) for key, v in net.state_dict().items()}
    converted = convert(state, arch, 'mmeffformer', layout)
    back = convert(converted, arch, layout, 'mmeffformer')
    kept = {key for key in state if layout.endswith('dense') or not key.startswith('out_norms')}
    assert back.keys() == kept
    assert all(torch.equal(back[key], state[key]) for key in kept)
    assert convert(back, arch, 'mmeffformer', layout).keys() == converted.keys()
    assert load_weights(net, converted).layout == layout
    assert all(torch.equal(net.state_dict()[key], state[key]) for key in kept)


def test_convert_errors():
    arch, net = ARCHS['l1'], EfficientFormer('l1', bias_grid=(3, 4))
    state = net.state_dict()
    with pytest.raises(ValueError, match="layout 'tim' is unknown; choose from mmeffformer, off"):
        convert(state, arch, 'mmeffformer', 'tim')
    with pytest.raises(ValueError, match='a bias table of a 3 x 4 grid: timm holds tables of'):
        convert(state, arch, 'mmeffformer', 'timm')
    with pytest.raises(ValueError, match='stem.conv1.weight is missing, so this is not a comp'):
        convert({}, arch, 'timm', 'mmeffformer')
