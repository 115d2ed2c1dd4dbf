"""Kinds of operators, of hand-made networks and of known ones, as runtimes' profilers tell."""
import sys
from collections import Counter, defaultdict

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from mmeffformer.latency import observations, profile
from mmeffformer.latency.candidates import Candidate, Setting, make
from mmeffformer.latency.profile import Overhead, profiled
from mmeffformer.latency.profilers import KINDS, Modules, Ran, Sample, by_kind
from mmeffformer.utils.plots import stacked_bars

SETTING = Setting((32, 32))
ALL = pytest.mark.parametrize('runtime', profile.RUNTIMES)


class ConvNet(nn.Sequential):

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())


class Attention(nn.Module):

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(3, 24), nn.Linear(8, 3)
        self.bias = nn.Parameter(torch.randn(64, 64))

    def forward(self, x):
        q, k, v = self.qkv(x).split(8, 2)
        return self.proj((q @ k.transpose(1, 2) + self.bias).softmax(2) @ v)


class Tokens(nn.Module):

    def __init__(self):
        super().__init__()
        self.norm, self.mixer, self.act = nn.LayerNorm(3), Attention(), nn.GELU()

    def forward(self, x):
        x = x[:, :, ::4, ::4].flatten(2).transpose(1, 2)
        return x + self.act(self.mixer(self.norm(x)))


class Pooling(nn.Module):

    def forward(self, x):
        return nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x


def sampled(network, runtime, folder):
    torch.manual_seed(0)
    candidate = Candidate('timm:made by hand', runtime)  # exported as it is
    modules, _, profiler = profiled(network, candidate, SETTING, folder)
    profiler(1)
    profiler(3)
    first, second = profiler.collect()
    assert len(first.operators) == len(second.operators)
    return modules, second


def counted(network, runtime, folder):
    modules, sample = sampled(network, runtime, folder)
    return Counter(modules.kinds(sample.operators))


@ALL
def test_a_stem_is_a_patch_embedding_and_fused_norms_are_the_convolutions(runtime, tmp_path):
    counts = counted(ConvNet(), runtime, tmp_path)
    counts.pop('reshape', None)  # of layouts
    if runtime == 'pytorch':  # which fuses nothing by itself
        assert counts == {'patch embedding': 3, 'convolution': 1, 'norm': 1, 'activation': 1}
    else:
        assert counts == {'patch embedding': 1, 'convolution': 1}


@ALL
def test_attention_is_told_from_linear_layers(runtime, tmp_path):
    counts = counted(Tokens(), runtime, tmp_path)
    assert counts['linear'] == 2 and counts['norm'] == 1
    assert counts['convolution'] == counts['patch embedding'] == counts['pooling'] == 0
    assert counts['reshape'] >= 2
    # OpenVINO puts activation and residual into the linear layer, or makes one of both.
    assert runtime == 'openvino' or counts['activation'] == counts['other'] == 1
    # Both products, bias and softmax; OpenVINO may make one operator of them.
    assert counts['attention products'] == 4 or (
        runtime == 'openvino' and 1 <= counts['attention products'] < 4)


@ALL
def test_pooling_and_the_difference(runtime, tmp_path):
    counts = counted(Pooling(), runtime, tmp_path)
    counts.pop('reshape', None)
    assert counts == {'pooling': 1, 'other': 1}


@ALL
@pytest.mark.parametrize('network', [ConvNet, Tokens])
def test_kinds_sum_up_to_the_call(network, runtime, tmp_path):
    modules, sample = sampled(network(), runtime, tmp_path)
    kinds = by_kind(modules, sample)
    assert list(kinds) == list(KINDS)
    assert sum(kinds.values()) == pytest.approx(sample.whole_ms, rel=1e-9)
    assert sum(ran.ms for ran in sample.operators) + sample.between_ms == pytest.approx(
        sample.whole_ms, rel=1e-9)
    assert 0 < max(ran.ms for ran in sample.operators) < sample.whole_ms


def test_a_network_that_changes_cannot_be_profiled(tmp_path):

    class Changing(nn.Module):

        def forward(self, x):
            self.calls = getattr(self, 'calls', 0) + 1
            return x + 1 if self.calls % 3 else x * 2

    _, _, profiler = profiled(Changing(), Candidate('timm:made by hand'), SETTING, tmp_path)
    with pytest.raises(RuntimeError, match='does not run the same operators in every call'):
        profiler(3)


# The convolutions that are patch embeddings, and the names in exported files of one of them and
# of a convolution or linear layer in a block, with the modules these stand for.
RESNET = {'conv1', *(f'layer{i}.0.{name}' for i in (2, 3, 4)
                    for name in ('conv2', 'downsample.0'))}
NETWORKS = {
    'l1': ({'stem.0.conv', 'stem.1.conv', *(f'stages.{i}.downsample.conv' for i in (1, 2, 3))},
           ('/modules_in_order.0/stem/stem.0/conv/Conv', 'stem.0.conv'),
           ('/modules_in_order.0/stages.2/blocks.3/mlp/expand/conv/Conv',
            'stages.2.blocks.3.mlp.expand.conv')),
    's0': ({'stem.0.conv', 'stem.1.conv', 'stages.3.downsample.embed.conv',
            *(f'stages.{i}.downsample.conv' for i in (1, 2))},
           ('/modules_in_order.0/stages.3/downsample/embed/conv/Conv',
            'stages.3.downsample.embed.conv'),
           ('/modules_in_order.0/stages.2/blocks.4/token_mixer/stride_conv/conv/Conv',
            'stages.2.blocks.4.token_mixer.stride_conv.conv')),
    'timm:deit_small_patch16_224': (
        {'model.patch_embed.proj'}, ('/patch_embed/proj/Conv', 'model.patch_embed.proj'),
        ('/blocks.0/attn/qkv/MatMul/MatMulAddFusion', 'model.blocks.0.attn.qkv')),
    'timm:poolformer_s24': (
        {'stem.conv', *(f'stages_{i}.downsample.conv' for i in (1, 2, 3))},
        ('/stages_1/downsample/conv/Conv', 'stages_1.downsample.conv'),
        ('/stages_1/blocks/blocks.0/mlp/fc1/Conv', 'stages_1.blocks.0.mlp.fc1')),
    'timm:levit_256': (
        {f'model.stem.conv{i}.linear' for i in (1, 2, 3, 4)},
        ('/stem/conv4/linear/Conv', 'model.stem.conv4.linear'),
        ('/stages.0/blocks/blocks.0/attn/qkv/linear/MatMul',
         'model.stages.0.blocks.0.attn.qkv.linear')),
    'timm:mobilenetv2_100': (
        {'conv_stem', *(f'blocks.{i}.0.conv_dw' for i in (1, 2, 3, 5))},
        ('/blocks.1/blocks.1.0/conv_dw/Conv', 'blocks.1.0.conv_dw'),
        ('/blocks.1/blocks.1.1/conv_dw/Conv', 'blocks.1.1.conv_dw')),
    'timm:resnet50': (
        RESNET, ('/layer2/layer2.0/downsample/downsample.0/Conv', 'layer2.0.downsample.0'),
        ('/layer2/layer2.0/conv3/Conv', 'layer2.0.conv3')),
}


@pytest.mark.parametrize('model', NETWORKS)
def test_stems_are_told_from_blocks(model):
    convolutions, embedding, block = NETWORKS[model]
    network = make(Candidate(model), (64, 64))[0].eval()
    modules = Modules(network, torch.randn(1, 3, 64, 64))
    found = {name for name in modules.embeddings
             if isinstance(network.get_submodule(name), nn.Conv2d)}
    assert found == convolutions
    for (node, module), expected in ((embedding, 'patch embedding'), (block, 'convolution')):
        assert modules.find(node) == module
        kind, = modules.kinds([Ran('Conv', module, 1.)])
        assert kind == expected
    # No norm of a block is taken for one of an embedding before it.
    norms = {name for name in modules.embeddings if 'blocks' in name and 'norm' in name}
    assert not norms


def test_what_has_no_name_goes_with_the_one_before():
    network = ConvNet().eval()
    modules = Modules(network, torch.randn(1, 3, 32, 32))
    ran = [Ran('Conv', 'stem.0', 1.), Ran('ReorderOutput', '?', 1.), Ran('Gelu', '?', 1.),
           Ran('Conv', 'body.0', 1.), Ran('HardSigmoid', '?', 1.), Ran('Mul', '?', 1.),
           Ran('Conv', 'body.0', 1.), Ran('Subgraph', '?', 1.)]
    assert modules.kinds(ran) == [
        'patch embedding', 'reshape', 'patch embedding', 'convolution', 'activation',
        'activation', 'convolution', 'norm']


def test_what_the_profiler_takes_is_taken_off_operator_by_operator():
    turns = type('Turns', (), dict(plain_ms=[.3, .3, .3]))
    samples = [Sample(3., [Ran('Conv', '?', .003)] * 300)] * 3
    cost = profile.overhead(turns, samples)  # 1 us, then 10 us, of which 3 within
    assert cost == pytest.approx((.002, .007))
    kinds = dict.fromkeys(KINDS, 0.) | {'norm': 1., 'between operators': 2.}
    rest = cost.taken_off(kinds, {'norm': 100})
    assert rest['norm'] == pytest.approx(.8) and rest['between operators'] == pytest.approx(1.3)
    assert sum(kinds.values()) - sum(rest.values()) == pytest.approx(100 * sum(cost))
    assert Overhead().taken_off(kinds, {'norm': 100}) == kinds


def test_runtimes_that_do_not_tell_are_explained(monkeypatch):
    with pytest.raises(ValueError, match='compile does not tell .* choose from pytorch, onnx'):
        profile.check(Candidate('l1', 'compile'))
    monkeypatch.setitem(sys.modules, 'openvino', None)
    with pytest.raises(ValueError, match='openvino needs the package openvino'):
        profile.check(Candidate('l1', 'openvino'))


def entry(name, kinds, whole_ms, **others):
    return dict(name=name, runtime='pytorch', error=None, whole_ms=whole_ms, taken_off_ms=0.,
                kinds={kind: kinds.get(kind, [0.] * len(whole_ms)) for kind in KINDS}) | others


def test_the_table_marks_sums_that_are_off():
    good = entry('a', {'convolution': [8., 9., 7.], 'norm': [2., 2., 2.]}, [10., 11., 9.])
    off = entry('b', {'convolution': [12., 12., 12.]}, [10., 10., 10.], taken_off_ms=1.5)
    failed = entry('c', {}, [], error='RuntimeError: no\nway')
    columns, rows = profile.table(dict(candidates=[good, off, failed]))
    row = dict(zip(columns, rows[0]))
    assert row['convolution'] == '8.00 (80%)' and row['norm'] == '2.00 (20%)'
    assert (row['linear'], row['sum'], row['whole'], row['ratio']) == ('–', '10.0', '10.0', '1.00')
    row = dict(zip(columns, rows[1]))
    assert row['ratio'] == '1.20 !' and row['taken off'] == '1.5'
    assert rows[2][:2] == ['c', 'failed: RuntimeError: no way']
    assert profile.bars(dict(candidates=[good, failed]))['pytorch'].keys() == {'a'}


def test_load_refuses_what_is_no_profile(tmp_path):
    with pytest.raises(FileNotFoundError, match='expected what tools/latency_profile.py wrote'):
        profile.load(tmp_path)
    (tmp_path / 'results.json').write_text('{"candidates": []}')
    with pytest.raises(ValueError, match='not written by tools/latency_profile.py'):
        profile.load(tmp_path)


def test_what_is_compared_gives_outputs_of_one_shape():
    shapes = defaultdict(set)
    numbers = defaultdict(set)
    for trial in observations.trials((64, 64)):
        with torch.no_grad():
            output = trial.module(torch.randn(1, *trial.shape))
        shapes[trial.group].add(tuple(tuple(each.shape) for each in output)
                                if isinstance(output, tuple) else tuple(output.shape))
        numbers[trial.observation].add(trial.name)
        assert not trial.module.training
        folded = not any(isinstance(module, nn.BatchNorm2d) for module in trial.module.modules())
        assert folded != trial.torch_only
    assert all(len(each) == 1 for each in shapes.values()), shapes
    assert {key: len(each) for key, each in numbers.items()} == {1: 4, 2: 3, 3: 4, 4: 5}


def test_observations_compare_with_the_first_of_a_group():
    entries = [dict(observation=4, group='g', name=name, runtime='onnx', macs=None,
                    samples_ms=samples) for name, samples in
               (('none', [1., 2., 4.]), ('ReLU', [2., 4., 8.]))]
    columns, rows = observations.table(dict(observations=entries))
    assert [row[columns.index('×')] for row in rows] == ['1.00', '2.00']
    assert rows[1][columns.index('onnx, ms')] == '4.00'


def test_bars_show_every_part(tmp_path):
    parts = dict.fromkeys(KINDS, 1.)
    stacked_bars({'a': (parts, 9.), 'b': (parts, 11.)}, 'ms', 'title', tmp_path / 'x/bars.png',
                 'whole')
    picture = cv2.imread(str(tmp_path / 'x/bars.png'))
    assert picture.shape[1] > 1000
    colours = Counter(map(tuple, picture.reshape(-1, 3)[::3]))
    strong = [np.ptp(colour) > 60 for colour, count in colours.items() if count > 500]
    assert sum(strong) >= len(KINDS) - 1  # one of them is grey
