"""Every published layout against the network it belongs to."""
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from mmpretrain.models import EfficientFormer as MMPretrainEfficientFormer
from support.official import official, value
from timm.models.efficientformer import checkpoint_filter_fn
from torch import nn

from mmeffformer import EfficientFormer, EfficientFormerV2
from mmeffformer.models import ARCHS, ARCHS_V2
from mmeffformer.weights import LAYOUTS, LAYOUTS_V2, convert, load_weights

DATA = Path(__file__).parents[1] / 'data'
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


def test_official_detector_is_read_completely():
    state = {f'backbone.{key}': v for key, v in official('official_det_v1_l1').items()}
    net = EfficientFormer('l1', bias_grid=25)
    report = load_weights(net, {'state_dict': {**state, 'neck.w': torch.ones(1)}})
    assert report.layout == 'official-dense'
    assert len(report.loaded) == TENSORS['l1'] + 8
    assert not report.resampled and not report.unknown and not report.missing
    block = 'backbone.network.6.4.token_mixer.'
    assert {*report.dropped} == {'neck.w', block + 'attention_biases',
                                 block + 'attention_bias_idxs', block + 'attention_bias_idxs_seg'}
    table = net.stages[3].blocks[3].token_mixer.bias.table
    assert torch.equal(table, state[block + 'attention_biases_seg'].view(8, 25, 25))
    assert torch.equal(net.out_norms['2'].weight, state['backbone.norm4.weight'])


@torch.no_grad()
@pytest.mark.parametrize('name, height, width', [
    ('official_det_v1_l1', 256, 320), ('official_seg_v1_l1', 256, 320),
    ('official_det_v2_s0', 256, 320), ('official_seg_v2_s0', 256, 384)])
def test_legacy_mode_gives_the_outputs_of_the_authors_dense_networks(name, height, width):
    kind = EfficientFormerV2 if 'v2' in name else EfficientFormer
    grid = 25 if 'det' in name else 16
    x = np.random.default_rng(height * 10007 + width).normal(0, 1, (1, 3, height, width))
    x = torch.from_numpy(x.astype(np.float32))
    vectors = np.load(DATA / f'{name}_{height}x{width}.npz')
    worst = {}
    for mode in ('legacy', 'offset'):
        net = kind(name[-2:], bias_grid=grid, bias_mode=mode).eval()
        load_weights(net, official(name))
        levels = net(x)
        assert [tuple(level.shape) for level in levels] == [
            tuple(vectors[f'shape{i}']) for i in range(4)]
        errors = [(level[:, ::7, ::3, ::5] - torch.from_numpy(vectors[f'level{i}'])).abs().max()
                  / np.abs(vectors[f'level{i}']).max() for i, level in enumerate(levels)]
        worst[mode] = max(errors).item()
    assert worst['legacy'] < 1e-5
    assert worst['offset'] > 1e-3  # so the vectors distinguish the modes


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
    native = convert(state, net.arch, 'official-dense', 'mmeffformer')
    assert native.keys() == net.state_dict().keys()
    back = convert(native, net.arch, 'mmeffformer', 'official-dense')
    assert back.keys() == state.keys() - {*report.dropped}
    assert all(torch.equal(value, state[key]) for key, value in back.items())


def test_official_segmentor_has_its_own_grid():
    state = official('official_seg_v1_l1')
    net = EfficientFormer('l1', bias_grid=16)
    assert not load_weights(net, state).resampled
    table = net.stages[3].blocks[3].token_mixer.bias.table
    assert torch.equal(table.flatten(1), state['network.6.4.token_mixer.attention_biases_seg'])


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
    return {key: value.shape for key, value in net.state_dict().items()}


@pytest.mark.parametrize('layout, arch', [
    *product(('timm', 'mmpretrain', 'transformers', 'official'), ARCHS),
    *product(('timm', 'timm-features', 'official'), ARCHS_V2)])
def test_tables_name_exactly_the_tensors_of_the_libraries(layout, arch):
    v1 = arch in ARCHS
    with torch.device('meta'):
        shapes = published_shapes(layout, arch)
        native = (EfficientFormer(arch, **RAW) if v1 else EfficientFormerV2(arch)).state_dict()
    table = (LAYOUTS if v1 else LAYOUTS_V2)[layout].table((ARCHS if v1 else ARCHS_V2)[arch])
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


def test_anchor_keys():
    def of(layout, native_key, arch='l3'):
        return LAYOUTS[layout].table(ARCHS[arch])[native_key]

    assert of('official', 'stem.1.norm.running_var') == 'patch_embed.4.running_var'
    assert of('official', 'stages.2.downsample.conv.weight') == 'network.3.proj.weight'
    assert of('official', 'stages.3.blocks.1.mlp.project.conv.bias') == 'network.6.1.mlp.fc2.bias'
    assert of('official', 'stages.3.blocks.2.layer_scale2') == 'network.6.3.layer_scale_2'
    assert of('official-dense', 'out_norms.2.bias') == 'norm4.bias'
    assert of('mmpretrain', 'stages.3.blocks.2.layer_scale1') == 'network.3.4.ls1.weight'
    assert of('mmpretrain', 'stages.0.blocks.2.layer_scale1') == 'network.0.2.ls1.weight'
    assert of('timm', 'stages.3.blocks.0.norm1.weight', 'l7') == 'stages.3.blocks.1.norm1.weight'
    assert of('transformers', 'stages.3.blocks.2.mlp.expand.weight') \
        == 'encoder.last_stage.meta3D_layers.blocks.0.mlp.linear_in.weight'


def test_anchor_keys_of_v2():
    def of(layout, native_key):
        return LAYOUTS_V2[layout].table(ARCHS_V2['s0'])[native_key]

    assert of('official', 'stages.2.blocks.4.token_mixer.stride_conv.norm.bias') \
        == 'network.4.4.token_mixer.stride_conv.1.bias'
    assert of('official', 'stages.3.downsample.bias.table') == 'network.5.attn.attention_biases'
    assert of('official-dense', 'stages.3.blocks.2.token_mixer.bias.table') \
        == 'network.6.2.token_mixer.attention_biases_seg'
    assert of('timm', 'stages.3.downsample.q_local.weight') \
        == 'stages.3.downsample.attn.q.local.weight'
    assert of('timm', 'stages.3.blocks.1.mlp.mid.norm.running_mean') \
        == 'stages.3.blocks.1.mlp.mid.bn.running_mean'


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
    load_weights(net, converted)
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
