"""The supernet: mixing as in the paper, sub-networks, branches that are not computed."""
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS
from support.helpers import assert_close, image
from torch import nn

from mmeffformer import EfficientFormer, SuperEfficientFormer
from mmeffformer.search.supernet import NEGLIGIBLE
from mmeffformer.search.weights import extract
from mmeffformer.utils.complexity import complexity
from mmeffformer.utils.registry import MODELS

ARCH = dict(widths=(16, 16, 24, 32), depths=(1, 2, 2, 2))


@pytest.fixture
def supernet(randomize):
    network = randomize(SuperEfficientFormer(ARCH))
    for i, path in enumerate(paths(network)):
        path.importance.data = torch.tensor([.5, -.3, .2][:len(path.kinds)]).roll(i)
    return network.eval()


def paths(network):
    return [path for stage in network.stages for path in stage.blocks]


def test_kinds_of_paths_are_those_of_the_paper():
    network = SuperEfficientFormer(ARCH)
    assert [path.kinds for path in paths(network)] == [('MB4D', 'I')] * 3 + [
        ('MB4D', 'MB3D', 'I')] * 4
    last = SuperEfficientFormer(ARCH, attention_stages=(3,))
    assert [len(path.kinds) for path in paths(last)] == [2] * 5 + [3] * 2
    for wrong in [(2,), (3, 2), (0, 3)]:
        with pytest.raises(ValueError, match='attention_stages'):
            SuperEfficientFormer(ARCH, attention_stages=wrong)
    with pytest.raises(ValueError, match='expansion'):
        SuperEfficientFormer(dict(ARCH, expansion=3))


@pytest.mark.parametrize('choices', [
    None,
    (['MB4D'], ['I', 'MB4D'], ['MB4D', 'I'], ['MB4D', 'MB4D']),
    (['MB4D'], ['MB4D', 'MB4D'], ['I', 'MB3D'], ['MB3D', 'MB3D'])])
def test_eval_runs_one_network_only(supernet, random_ranking, choices):
    called = []
    for name, module in supernet.named_modules():
        if name.endswith(('.MB4D', '.MB3D')):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    supernet.choose(choices)
    chosen = supernet.subnetwork(choices)
    plain = extract(supernet, chosen, random_ranking(supernet)).eval()
    assert type(plain) is EfficientFormer and plain.arch.widths == ARCH['widths']
    with torch.no_grad():
        assert_close(supernet(image(65, 96)), plain(image(65, 96)), 1e-5)
    assert called == [f'stages.{i}.blocks.{j}.branches.{kind}' for i, j, kind in chosen.blocks()]


def test_best_is_the_most_likely_of_all_allowed(supernet):
    worth = [path.importance.softmax(0) for path in paths(supernet)]

    def likelihood(change):
        return sum(path[1 if i >= change else 0].log() for i, path in enumerate(worth))

    change = max(range(3, 8), key=likelihood)
    kinds = [kind for stage in supernet.best() for kind in stage]
    assert kinds == ['MB4D'] * change + ['MB3D'] * (7 - change)
    paths(supernet)[5].importance.data[0] = paths(supernet)[6].importance.data[1] = 5.
    assert supernet.best()[3] == ('MB4D', 'MB3D')


def test_a_path_mixes_as_in_the_equation(supernet):
    path = supernet.stages[3].blocks[0]
    x, noise = image(32, 32)[:, :1].expand(-1, 32, -1, -1)[..., :3, :2], torch.rand(3)
    tau = .7
    weights = torch.softmax((path.importance + noise) / tau, 0)
    tokens = path.branches['MB3D'](x.permute(0, 2, 3, 1).reshape(1, 6, 32), (3, 2))
    expected = (weights[0] * path.branches['MB4D'](x) + weights[2] * x
                + weights[1] * tokens.reshape(1, 3, 2, 32).permute(0, 3, 1, 2))
    assert_close([path(x, weights, [True] * 3)], [expected])
    assert_close([path(x, torch.tensor([0., 0., 1.]), [0, 0, 1])], [x])


def seen_weights(supernet, times):
    """Return the weights (times, 3) of the first path of the last stage in training."""
    torch.manual_seed(0)
    seen, x = [], torch.zeros(1, 32, 1, 1)
    stage = supernet.stages[3].train()
    for path in stage.blocks:
        path.forward = lambda x, weights, used: (seen.append(weights.detach()), x)[1]
    for _ in range(times):
        stage.through(x, stage.blocks)
    return torch.stack(seen[::2])


def test_noise_is_uniform_and_drawn_for_every_path(supernet):
    weights = seen_weights(supernet, 1000)
    scores = weights.log() - weights.log()[:, -1:]
    path = supernet.stages[3].blocks[0]
    differences = scores[:, :2] - (path.importance[:2] - path.importance[2])
    # The difference of two U(0, 1) is triangular on [-1, 1], of variance 1 / 6.
    assert differences.abs().max() < 1
    assert differences.abs().max() > .9
    assert differences.var().item() == pytest.approx(1 / 6, rel=.1)
    assert differences.mean().abs() < .03


def test_temperature_sharpens(supernet):
    supernet.set_temperature(.01)
    weights = seen_weights(supernet, 200)
    assert weights.max(1).values.mean() > .95
    assert torch.all((weights == 0) | (weights > NEGLIGIBLE))
    assert_close([weights.sum(1)], [torch.ones(200)])
    with pytest.raises(ValueError, match='temperature 0'):
        supernet.set_temperature(0)


def test_training_reaches_every_weight_and_importance(supernet):
    supernet.train()
    sum(out.square().mean() for out in supernet(image(64, 64, 2))).backward()
    for name, parameter in supernet.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if name.endswith('importance'):
            assert parameter.grad.abs().max() > 0, name


def count_branches(supernet) -> list:
    """Return a list that gets one entry for each branch that is computed."""
    called = []
    for path in paths(supernet):
        for block in path.branches.values():
            block.register_forward_hook(lambda *_: called.append(1))
    return called


def test_branches_with_negligible_weights_are_not_computed(supernet):
    for path in paths(supernet):
        path.importance.data[-1] += 3.  # more than noise can compensate
    called = count_branches(supernet)
    supernet.train().set_temperature(.1)
    supernet(image(64, 64, 2))
    assert not called
    supernet.set_temperature(10.)
    supernet(image(64, 64, 2))
    assert len(called) == 3 + 2 * 4


def test_checkpointed_forward_gives_the_same_gradients(supernet):
    with_cp = SuperEfficientFormer(ARCH, with_cp=True)
    with_cp.load_state_dict(supernet.state_dict())
    for network in (supernet, with_cp):
        torch.manual_seed(0)
        sum(out.square().mean() for out in network.train()(image(64, 64, 2))).backward()
    for (name, parameter), other in zip(with_cp.named_parameters(), supernet.parameters()):
        largest = other.grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0,
                                   atol=1e-4 * max(largest, 1e-3), msg=name)
    assert_close([*with_cp.buffers()], [*supernet.buffers()])  # statistics are updated once


def test_chosen_network_trains_alone(supernet):
    supernet.train().choose((['MB4D'], ['I', 'MB4D'], ['MB4D', 'I'], ['MB3D', 'I']))
    sum(out.square().mean() for out in supernet(image(64, 64, 2))).backward()
    trained = {'.'.join(name.split('.')[1:6:2] + name.split('.')[5:6]) for name, parameter
               in supernet.named_parameters() if 'branches' in name and parameter.grad is not None}
    assert trained == {'0.0.MB4D.MB4D', '1.1.MB4D.MB4D', '2.0.MB4D.MB4D', '3.0.MB3D.MB3D'}
    supernet.zero_grad(set_to_none=True)
    supernet.choose(None)
    sum(out.square().mean() for out in supernet(image(64, 64, 2))).backward()
    assert all(path.importance.grad is not None for path in paths(supernet))


def test_wrong_choices_are_refused(supernet):
    with pytest.raises(ValueError, match='path 1 of stage 1'):
        supernet.choose((['MB3D'], ['MB3D', 'MB3D'], ['MB3D', 'I'], ['MB3D', 'I']))
    assert supernet.stages[0].choices is None
    with pytest.raises(RuntimeError, match='cannot be deployed: slim it'):
        supernet.switch_to_deploy()


def test_weights_of_a_plain_network_are_loaded(randomize, tmp_path):
    arch = dict(ARCH, attention_blocks=(0, 0, 0, 1))
    trained = randomize(EfficientFormer(arch, bias_grid=3))
    torch.save(trained.state_dict(), tmp_path / 'plain.pth')
    network = SuperEfficientFormer(arch, init_cfg=dict(
        type='Pretrained', checkpoint=str(tmp_path / 'plain.pth')))
    network.init_weights()
    network.choose((['MB4D'], ['MB4D'] * 2, ['MB4D'] * 2, ['MB4D', 'MB3D']))
    with torch.no_grad():
        assert_close(network.eval()(image(96, 64)), trained.eval()(image(96, 64)), 1e-5)


def test_complexity_is_that_of_the_network_run():
    network = SuperEfficientFormer(ARCH)
    whole = complexity(network, (64, 64))[-1]
    plain_network = EfficientFormer(dict(ARCH, attention_blocks=(0, 0, 2, 2)))
    assert whole.macs == complexity(plain_network, (64, 64))[-1].macs  # MB3D for equal importances


def test_hook_lowers_the_temperature_geometrically(supernet):
    runner = SimpleNamespace(model=nn.Module(), max_iters=101)
    runner.model.backbone = supernet
    hook = HOOKS.build(dict(type='mmeffformer.TemperatureHook', start=2., end=.5))
    for runner.iter, expected in ((0, 2.), (50, 1.), (100, .5)):
        hook.before_train_iter(runner, 0)
        assert [stage.temperature for stage in supernet.stages] == pytest.approx([expected] * 4)
    with pytest.raises(ValueError, match='temperatures from 0.1 to 1'):
        HOOKS.build(dict(type='mmeffformer.TemperatureHook', start=.1, end=1))


def test_mixing_in_eval_computes_all(supernet):
    paths(supernet)[0].importance.data[0] = -9.  # negligible, but computed
    called = count_branches(supernet)
    supernet.set_temperature(.1)
    with supernet.mixing(), torch.no_grad():
        once, again = (supernet(image(64, 64)) for _ in range(2))
    assert len(called) == 2 * (3 + 2 * 4)
    assert_close(once, again, 0)
    assert supernet.stages[0].temperature == .1
    chosen = supernet.best()
    supernet.choose(chosen)
    with supernet.mixing():
        assert supernet.stages[0].choices is None
    assert supernet.stages[0].choices == chosen[0]


@pytest.mark.parametrize('name', ['maskrcnn_super_l3', 'semfpn_super_l3', 'semfpn_super_shapes',
                                  'imagenet_super_l3'])
def test_configs_build_a_supernet(repo_root, name):
    cfg = Config.fromfile(repo_root / f'configs/search/{name}.py')
    cfg.model.backbone.init_cfg = None
    with torch.device('meta'):
        backbone = MODELS.build(cfg.model.backbone)
    assert isinstance(backbone, SuperEfficientFormer)
    assert list(backbone.out_channels) == cfg.model.neck.get(
        'in_channels', [cfg.model.get('head', {}).get('in_channels')])
    assert cfg.find_unused_parameters
    assert cfg.custom_hooks[0].type == 'mmeffformer.TemperatureHook'
