"""The ranking of channels, and weights of sub-networks."""
import gc
import weakref

import pytest
import torch
from support.helpers import assert_close, image

from mmeffformer import SuperEfficientFormer
from mmeffformer.search.weights import (
    PaddedBackbone,
    channel_groups,
    extract,
    kept_channels,
    rank_channels,
)

WIDTHS = (16, 32, 32, 48)


@pytest.fixture
def supernet(randomize):
    network = SuperEfficientFormer(dict(widths=WIDTHS, depths=(1, 1, 2, 2)), out_norm_cfg=None)
    return randomize(network).eval()


@pytest.fixture
def ranking(supernet, random_ranking):
    return random_ranking(supernet)


def test_cut_channels_are_those_that_are_not_kept(supernet, ranking):
    """Cutting channels that no layer reads or normalises with others changes nothing."""
    network = supernet.subnetwork((['MB4D'], ['MB4D'], ['I', 'MB4D'], ['MB4D', 'MB4D']),
                                  (16, 16, 32, 32))
    made = extract(supernet, network, ranking).eval()
    kept = kept_channels(network, ranking)
    silenced = {name: value.clone() for name, value in supernet.state_dict().items()}
    for i, j, kind in network.blocks():
        block = f'stages.{i}.blocks.{j}.branches.{kind}'
        gone = ranking[f'hidden.{i}.{j}.{kind}'][4 * network.widths[i]:]
        silenced[f'{block}.mlp.project.conv.weight'][:, gone] = 0
        silenced[f'{block}.mlp.expand.conv.weight'][:, ranking[f'stage.{i}'][
            network.widths[i]:]] = 0
    for i in range(1, 4):  # embeddings
        gone = ranking[f'stage.{i - 1}'][network.widths[i - 1]:]
        silenced[f'stages.{i}.downsample.conv.weight'][:, gone] = 0
    supernet.load_state_dict(silenced)
    supernet.choose(network.choices)
    with torch.no_grad():
        whole, outs = supernet(image(64, 96)), made(image(64, 96))
        padded = PaddedBackbone(made, kept, WIDTHS)(image(64, 96))
    assert_close(outs, [out[:, channels] for out, channels in zip(whole, kept)], 1e-5)
    for wide, out, channels in zip(padded, outs, kept):
        rest = [c for c in range(wide.shape[1]) if c not in channels]
        assert torch.equal(wide[:, channels], out) and not wide[:, rest].any()


def test_every_tensor_of_an_attention_block(supernet, ranking):
    network = supernet.subnetwork(
        (['MB4D'], ['MB4D'], ['I', 'MB4D'], ['MB4D', 'MB3D']), (16, 32, 32, 32))
    state, whole = extract(supernet, network, ranking).state_dict(), supernet.state_dict()
    kept = kept_channels(network, ranking)[3]
    hidden = ranking['hidden.3.1.MB3D'][:128].sort().values
    expected = {
        'layer_scale1': (kept,), 'layer_scale2': (kept,), 'norm1.weight': (kept,),
        'norm1.bias': (kept,), 'norm2.weight': (kept,), 'norm2.bias': (kept,),
        'token_mixer.qkv.weight': (slice(None), kept), 'token_mixer.qkv.bias': (slice(None),),
        'token_mixer.proj.weight': (kept,), 'token_mixer.proj.bias': (kept,),
        'token_mixer.bias.table': (slice(None),),
        'mlp.expand.weight': (hidden[:, None], kept), 'mlp.expand.bias': (hidden,),
        'mlp.project.weight': (kept[:, None], hidden), 'mlp.project.bias': (kept,)}
    actual = {key.removeprefix('stages.3.blocks.1.'): value for key, value in state.items()
              if key.startswith('stages.3.blocks.1.')}
    assert actual.keys() == expected.keys()
    for key, index in expected.items():
        source = whole[f'stages.3.blocks.1.branches.MB3D.{key}']
        assert torch.equal(actual[key], source[index]), key


def losses(supernet, count=2):
    for i in range(count):
        yield lambda i=i: sum(out.square().mean() for out in supernet(image(64, 64 + 32 * i)))


def test_channels_without_effect_are_last(supernet):
    useless = {'hidden.1.0.MB4D': [3, 70, 127], 'hidden.3.1.MB3D': [0, 100], 'stem': [5]}
    readers = [supernet.stages[1].blocks[0].branches['MB4D'].mlp.project.conv,
               supernet.stages[3].blocks[1].branches['MB3D'].mlp.project, supernet.stem[1].conv]
    for reader, channels in zip(readers, useless.values()):
        reader.weight.data[:, channels] = 0
    ranking = rank_channels(supernet, losses(supernet))
    assert ranking.keys() == channel_groups(supernet).keys()
    for group, channels in useless.items():
        assert {*ranking[group][-len(channels):].tolist()} == {*channels}
    assert len(ranking['stage.3']) == 48 and len(ranking['hidden.2.1.MB3D']) == 128


def test_ranking_is_by_activation_times_gradient(supernet):
    """Compare with the sum for the output of a module that is alone in its group."""
    seen = []
    hidden = supernet.stages[1].blocks[0].branches['MB4D'].mlp.expand

    def watch(module, args, out):
        out.retain_grad()
        seen.append(out)

    handle = hidden.register_forward_hook(watch)
    ranking = rank_channels(supernet, losses(supernet, 1))
    handle.remove()
    product = (seen[0] * seen[0].grad).sum((2, 3)).abs().sum(0)
    assert torch.equal(ranking['hidden.1.0.MB4D'], product.double().argsort(descending=True))


def test_ranking_leaves_the_supernet_as_it_was(supernet):
    supernet.stem.requires_grad_(False)
    supernet.set_temperature(.3)
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    ranking = rank_channels(supernet, losses(supernet))
    assert len({*ranking['stem'].tolist()}) == 8 and not torch.equal(
        ranking['stem'], torch.arange(8))  # ranked though it is frozen
    assert not any(p.requires_grad for p in supernet.stem.parameters())
    assert all(p.grad is None for p in supernet.parameters())
    assert supernet.stages[0].temperature == .3
    assert all(torch.equal(value, before[name])
               for name, value in supernet.state_dict().items())


def test_ranking_keeps_no_activations(supernet):
    alive = []
    supernet.stages[3].downsample.register_forward_hook(
        lambda module, args, out: alive.append(weakref.ref(out)))
    rank_channels(supernet, losses(supernet))
    gc.collect()
    assert len(alive) == 2 and not any(reference() is not None for reference in alive)
