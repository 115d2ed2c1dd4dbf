"""Kinds of operators in small networks, as reported by the profilers of the runtimes."""
import pytest
import torch
from torch import nn

from mmeffformer.latency import operators
from mmeffformer.latency.building import make
from mmeffformer.latency.candidates import Candidate, Setting

SETTING = Setting((64, 64))
ALL = pytest.mark.parametrize('runtime', operators.RUNTIMES)


class ConvNet(nn.Sequential):

    def __init__(self):
        super().__init__(nn.Conv2d(3, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
                         nn.Conv2d(64, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU())


class Attention(nn.Module):

    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.LayerNorm(3), nn.GELU()
        self.qkv, self.proj = nn.Linear(3, 24, bias=False), nn.Linear(8, 3)

    def forward(self, x):
        x = x[:, :, ::4, ::4].flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).split(8, 2)
        scores = torch.einsum('bqd,bkd->bqk', q, k)
        return x + self.act(self.proj(scores.softmax(2) @ v))


class Pooling(nn.Module):

    def forward(self, x):
        return nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x


def profiled(network, runtime, folder):
    torch.manual_seed(0)
    candidate = Candidate('timm:small', runtime)  # exported unchanged
    call, profile = operators.profiler(network, candidate, SETTING, folder)
    call()
    return profile(5)


@ALL
@pytest.mark.parametrize('network, present, absent', [
    (ConvNet, {'patch embedding', 'convolution'}, {'linear', 'attention products', 'pooling'}),
    (Attention, {'linear', 'attention products', 'norm', 'reshape'},
     {'convolution', 'patch embedding', 'pooling'}),
    (Pooling, {'pooling', 'other'}, {'convolution', 'linear', 'attention products', 'norm'}),
], ids=lambda value: getattr(value, '__name__', ''))
def test_kinds_of_small_networks(network, present, absent, runtime, tmp_path):
    kinds = profiled(network(), runtime, tmp_path)
    assert [*kinds] == [*operators.KINDS] and sum(kinds.values()) > 0
    assert all(kinds[kind] > 0 for kind in present), kinds
    assert all(kinds[kind] == 0 for kind in absent), kinds
    if network is ConvNet:  # exported files have both fused
        assert (kinds['norm'] > 0) == (kinds['activation'] > 0) == (runtime == 'pytorch')


@ALL
def test_kinds_add_up_to_the_call(runtime, tmp_path, monkeypatch):
    times = []
    original = operators._times_ms
    monkeypatch.setattr(operators, '_times_ms',
                        lambda *args: times.append(original(*args)) or times[-1])
    kinds = profiled(ConvNet(), runtime, tmp_path)
    assert all(ms >= 0 for kind, ms in kinds.items() if kind != 'between operators')
    if runtime != 'pytorch':  # whose call is itself an event of the profile
        assert sum(kinds.values()) == pytest.approx(sum(times[-1][-5:]) / 5)


@pytest.mark.parametrize('kind, types', {
    'convolution': ['aten::_slow_conv2d_forward', 'mkldnn::_convolution_pointwise',
                    'GroupConvolution'],
    'linear': ['Gemm', 'FullyConnected'], 'norm': ['MVN', 'LayerNormalization'],
    'activation': ['HSwish', 'aten::hardtanh_'], 'pooling': ['aten::_adaptive_avg_pool2d'],
    'attention products': ['aten::addmm', 'FusedMatMul', 'aten::_softmax'],
    'reshape': ['Convert', 'aten::copy_', 'aten::t', 'VariadicSplit', 'ReorderInput'],
    'other': ['aten::upsample_bilinear2d', 'Resize', 'aten::add']}.items())
def test_kinds_by_type(kind, types):
    assert {each: operators.kind_of(each) for each in types} == dict.fromkeys(types, kind)


@pytest.mark.parametrize('model, embeddings, linears', [
    ('l1', 5, 4),  # two in the stem and three between stages; one MB3D
    ('s0', 7, 0),  # and two depthwise ones: in stride attention and attention downsampling
    ('timm:resnet50', 7, 0)])  # the stem, and two in the first block of each later stage
def test_layers_that_shapes_identify(model, embeddings, linears):
    network = make(Candidate(model), (64, 64))[0].eval()
    found = [*operators.kinds_by_shape(network, torch.randn(1, 3, 64, 64)).values()]
    assert found.count('patch embedding') == embeddings and found.count('linear') == linears


def entry(name, kinds, samples_ms, error=None):
    return dict(name=name, runtime='pytorch', error=error, samples_ms=samples_ms, kinds=[
        {kind: kinds.get(kind, [0.] * len(samples_ms))[i] for kind in operators.KINDS}
        for i in range(len(samples_ms))])


def test_the_table_marks_sums_that_differ():
    good = entry('a', {'convolution': [8., 9., 7.], 'norm': [2., 2., 2.]}, [10., 11., 9.])
    bad = entry('b', {'convolution': [12., 12., 12.]}, [10., 10., 10.])
    failed = entry('c', {}, [], error='RuntimeError: no\nway')
    results = dict(candidates=[good, bad, failed])
    columns, rows = operators.table(results)
    row = dict(zip(columns, rows[0]))
    assert row['convolution'] == '8.00 (80%)' and row['norm'] == '2.00 (20%)'
    assert (row['linear'], row['sum'], row['whole'], row['ratio']) == ('–', '10.0', '10.0', '1.00')
    assert dict(zip(columns, rows[1]))['ratio'] == '1.20 !'
    assert rows[2][:2] == ['c', 'failed: RuntimeError: no way']
    assert [*operators.bars(results, 'pytorch')] == ['a', 'b']
    assert operators.bars(results, 'onnx') == {}
