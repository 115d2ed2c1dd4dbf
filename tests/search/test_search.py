"""A whole search in a segmentor: what it evaluates, writes down, and leaves."""
import json
import shutil
from itertools import product

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from support.helpers import assert_close, made_up_table

from mmeffformer.datasets import write_ade20k
from mmeffformer.latency.timing import Spread
from mmeffformer.search.search import Search, Share
from mmeffformer.search.subnetwork import Subnetwork, smallest

WIDTHS = (16, 32, 48, 48)


def ms_of(part) -> float:
    """A made-up latency of a part."""
    cost = {'MB4D': 1., 'MB3D': 1.7, 'embedding': .3, 'stem': .5, 'overhead': 0.}[part.kind]
    return cost * sum(part.widths) / 16 + (part.kind == 'overhead')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """(a function that returns the config for a work dir, checkpoint, table)."""
    folder = tmp_path_factory.mktemp('search')
    write_ade20k(folder / 'data', train=8, val=4, size=(64, 96), progress=False)
    made_up_table(folder / 'table.json', (64, 96), WIDTHS, ms_of)

    def config(work_dir):
        cfg = Config.fromfile('tests/data/semfpn_super_tiny.py')
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            loader.dataset.data_root = str(folder / 'data')
        cfg.work_dir = str(work_dir)
        return cfg

    cfg = config(folder / 'train')
    Runner.from_cfg(cfg).train()
    return config, str(folder / 'train/iter_2.pth'), str(folder / 'table.json')


def search_in(made, work_dir, target=9., **options) -> Search:
    config, checkpoint, table = made
    return Search(config(work_dir), checkpoint, table, target, batches=2, **options)


@pytest.fixture(scope='module')
def slimmed(made, tmp_path_factory):
    """(a finished search, its path, the config written)."""
    search = search_in(made, tmp_path_factory.mktemp('slimmed'))
    steps = search.slim(report=lambda _: None)
    return search, steps, search.finish(steps, {}, {'l1': None})


def test_path_goes_down_to_the_target(slimmed):
    search, steps, _ = slimmed
    assert steps[0].network == search.start
    assert [step.ms for step in steps] == [search.ms(step.network) for step in steps]
    assert steps[-1].ms <= 9 < steps[-2].ms
    for before, after in zip(steps, steps[1:]):
        options = before.network.actions(search.supernet.importances())
        if after is steps[-1] and after.action not in options:
            options = before.network.neighbours()
        assert options[after.action] == after.network
        known = search.journal.accuracies
        ratios = {action: (before.accuracy - known[network.key()])
                  / (before.ms - search.ms(network)) for action, network in options.items()
                  if search.ms(network) < before.ms and network.key() in known}
        assert ratios[after.action] == min(ratios.values())


def test_ms_is_the_sum_of_the_parts(slimmed):
    search, _, _ = slimmed
    network = Subnetwork((['MB4D'], ['MB4D'], ['MB4D', 'I'], ['MB4D', 'MB3D']), (16, 16, 48, 32))
    assert search.ms(network) == pytest.approx(
        .5 + .3 * (2 + 4 + 5) + 1 + 1 + 3 + 2 + 1.7 * 2 + 1)


def test_what_is_written_is_what_was_evaluated(slimmed, tmp_path):
    search, steps, config = slimmed
    cfg = Config.fromfile(config)
    assert cfg.model.backbone.type == 'mmeffformer.EfficientFormer'
    assert cfg.model.neck.in_channels == list(steps[-1].network.widths)
    assert not cfg.custom_hooks and 'importance' not in str(cfg.optim_wrapper)
    cfg.work_dir = str(tmp_path)
    runner = Runner.from_cfg(cfg)
    runner.load_checkpoint(cfg.load_from, strict=True)
    loop = runner.val_loop
    metrics = loop.run()
    assert metrics['mIoU'] == steps[-1].accuracy
    assert torch.load(cfg.load_from, weights_only=True)['meta']['accuracy'] == metrics['mIoU']
    # mIoU is rounded; logits are not.
    data = runner.model.data_preprocessor(next(iter(loop.dataloader)), False)
    with torch.no_grad(), search.evaluation.placed(steps[-1].network) as model:
        logits = [each(data['inputs'], mode='tensor') for each in (runner.model.eval(), model)]
    assert_close(logits[:1], logits[1:], 1e-4)


def test_the_table_is_corrected_by_what_is_measured(made, tmp_path):
    search = search_in(made, tmp_path, 12.)
    search.measure = takes(search, 1.2)
    steps = search.slim(rounds=3, report=lambda _: None)
    assert search.correction == pytest.approx(1.2)
    last = steps[-1]
    assert last.ms == pytest.approx(1.2 * search.table.predict(last.network.arch))
    assert last.ms <= 12
    # Started again, it measures nothing and ends at the same.
    again = search_in(made, tmp_path, 12.)
    again.measure = None
    assert again.slim(rounds=3, report=lambda _: None) == steps
    assert again.correction == search.correction


def takes(search, factor):
    """Measure every network to take ``factor`` times what the table says."""
    return lambda networks, rounds: {
        name: Spread(factor * search.table.predict(arch), 0., 0.)
        for name, arch in networks.items()}


def test_a_target_that_measurements_put_out_of_reach(made, slimmed, tmp_path):
    """What was found stays, when the supernet is measured to be faster than the target."""
    target = .9 * slimmed[0].ms(slimmed[0].start)
    search, told = search_in(made, tmp_path, target), []
    search.measure = takes(search, .8)
    steps = search.slim(rounds=3, report=told.append)
    assert search.correction == 1 and steps[-1].ms <= target
    assert 'cannot be reached' in told[-1]
    again = search_in(made, tmp_path, target)
    again.measure = None
    assert again.slim(rounds=3, report=lambda _: None) == steps


def test_of_several_passes_the_nearest_counts(made, tmp_path):
    search, factors = search_in(made, tmp_path, 12.), iter([1.3, .7, 1.1, 1.4, 1.5])
    measured = {}

    def measure(networks, rounds):
        (name, arch), = networks.items()
        measured[name] = next(factors) * search.table.predict(arch)
        return {name: Spread(measured[name], 0., 0.)}

    search.measure = measure
    steps = search.slim(rounds=3, report=lambda _: None)
    assert 2 <= len(measured) <= 4
    nearest = min(measured, key=lambda name: abs(measured[name] / 12 - 1))
    assert steps[-1].network.key() == nearest
    again = search_in(made, tmp_path, 12.)
    again.measure = None
    assert again.slim(rounds=3, report=lambda _: None) == steps


class Killed:
    """An evaluation that is interrupted after some networks."""

    metric = 'mIoU'

    def __init__(self, evaluate, left, evaluated):
        self.evaluate, self.left, self.evaluated = evaluate, left, evaluated

    def __call__(self, network):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.evaluated.append(network.key())
        return self.evaluate(network)


def test_a_killed_search_goes_on(made, slimmed, tmp_path):
    """Killed at any evaluation, and started again: the same path, nothing evaluated twice."""
    _, expected, _ = slimmed
    evaluated = []

    for allowed in (1, 4, 100):
        search = search_in(made, tmp_path)
        search.evaluation = Killed(search.evaluation, allowed, evaluated)
        try:
            steps = search.slim(report=lambda _: None)
        except KeyboardInterrupt:
            continue
    assert steps == expected
    assert len(evaluated) == len({*evaluated}) > 5


def test_journal(slimmed):
    search, steps, _ = slimmed
    written = json.loads((search.work_dir / 'journal.json').read_text())
    assert written['arch'] == dict(
        widths=list(steps[-1].network.widths), depths=list(steps[-1].network.arch.depths),
        attention_blocks=list(steps[-1].network.arch.attention_blocks))
    assert written['metric'] == 'mIoU'
    assert [step['network'] for step in written['steps']] == [s.network.key() for s in steps]
    assert written['accuracies'] == search.journal.accuracies
    assert (search.work_dir / 'path.png').stat().st_size > 10000


def test_another_search_in_the_same_folder_is_refused(made, slimmed):
    with pytest.raises(ValueError, match='target 9.0 there, 8 now'):
        search_in(made, slimmed[0].work_dir, 8)


def test_damaged_ranking_is_told(made, slimmed, tmp_path):
    shutil.copytree(slimmed[0].work_dir, tmp_path / 'copy')
    (tmp_path / 'copy/channels.pth').write_bytes(b'PK\x03\x04')
    with pytest.raises(ValueError, match='channels.pth is a broken or truncated torch file'):
        search_in(made, tmp_path / 'copy')
    (tmp_path / 'copy/channels.pth').unlink()
    with pytest.raises(FileNotFoundError, match='channels.pth'):
        search_in(made, tmp_path / 'copy')


def test_targets_out_of_reach_are_told_at_once(made, slimmed, tmp_path):
    search, _, _ = slimmed
    low, high = search.ms(smallest(search.start)), search.ms(search.start)
    for target in (low - .1, high):
        with pytest.raises(ValueError, match=f'from {high:.3g} ms.* down to {low:.3g} ms'):
            search_in(made, tmp_path, target)
    assert not (tmp_path / 'journal.json').exists()


@pytest.mark.parametrize('measured', [{}, {'mIoU': float('nan')}])
def test_networks_that_find_nothing_count_as_0(slimmed, made, measured):
    """Also right after going on, when nothing has been evaluated yet."""
    search = search_in(made, slimmed[0].work_dir)
    search.evaluation.loop.evaluator.evaluate = lambda size: measured
    assert search.evaluation(search.start) == 0
    assert search.evaluation.metric == 'mIoU'


def test_target_as_a_share(made, tmp_path):
    search = search_in(made, tmp_path, Share(.5))
    assert search.target == pytest.approx(.5 * search.ms(search.start))


def test_wrong_models_are_refused(made, tmp_path):
    config, checkpoint, table = made
    cfg = config(tmp_path)
    cfg.model.backbone.arch.depths = (1, 1, 2, 3)
    with pytest.raises(ValueError, match='not of this config'):
        Search(cfg, checkpoint, table, 9.)
    cfg = config(tmp_path)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    with pytest.raises(ValueError, match='no val_dataloader and no val_evaluator'):
        Search(cfg, checkpoint, table, 9.)
    cfg = config(tmp_path)
    cfg.model.backbone.type = 'mmeffformer.EfficientFormer'
    with pytest.raises(ValueError, match='SuperEfficientFormer'):
        Search(cfg, checkpoint, table, 9.)
    with pytest.raises(ValueError, match="metric mAP: .*measures aAcc, mIoU, mAcc"):
        search_in(made, tmp_path / 'metric', metric='mAP')


def test_baselines(made, slimmed, tmp_path):
    with pytest.raises(ValueError, match='no 9 ms'):
        slimmed[0].narrow()
    told = []
    assert 'uniform' not in slimmed[0].baselines(told.append)
    assert 'uniform: uniform narrowing reaches no 9 ms' in told[0]
    search = search_in(made, tmp_path, 15.)
    narrow = search.narrow()
    assert narrow.network.choices == search.start.choices
    assert narrow.ms == search.ms(narrow.network) <= 15

    def alike(widths):  # a share of (16, 32, 48, 48), rounded up or down to 16s
        return any(all(abs(width - max(16, share / 100 * full)) < 16
                       for width, full in zip(widths, WIDTHS)) for share in range(101))

    assert alike(narrow.network.widths)
    others = [Subnetwork(search.start.choices, widths)
              for widths in product((16,), (16, 32), (16, 32, 48), (16, 32, 48)) if alike(widths)]
    assert not [other for other in others if narrow.ms < search.ms(other) <= 15]
    best = search.sample(3, tolerance=.2, report=lambda _: None)
    assert .8 * 15 <= best.ms <= 15
    assert best == search.sample(3, tolerance=.2, report=lambda _: None)
    assert best.accuracy == search.accuracy(best.network)


def test_supernet_is_not_changed(made, slimmed):
    search, _, _ = slimmed
    state = torch.load(made[1], weights_only=False)['state_dict']
    for key, value in search.supernet.state_dict().items():
        assert torch.equal(value, state[f'backbone.{key}']), key


def test_whole_network_has_the_weights_of_the_supernet(slimmed):
    search, steps, _ = slimmed
    path = search.write(steps[0], 'whole')
    state = torch.load(Config.fromfile(path).load_from, weights_only=True)['state_dict']
    model = search.model.state_dict()
    shared = [key for key in state if key in model]
    assert {'decode_head.conv_seg.weight', 'neck.lateral_convs.3.conv.weight'} < {*shared}
    assert all(torch.equal(state[key], model[key]) for key in shared
               if 'running' not in key and 'num_batches' not in key)
