"""A whole search in a segmentor: its path, its corrections, its journal."""

import pytest
import torch

from mmeffformer.search.search import Search


def test_path_goes_down_to_the_target(slimmed):
    search, steps = slimmed
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


def measured_as(search, factor):
    """Return a measurement in which every network takes ``factor`` times the table's ms."""
    return lambda networks, rounds: {name: factor * search.table.predict(arch)
                                     for name, arch in networks.items()}


def assert_repeated(restart, target, steps, correction):
    """Start again: the journal has all measurements, and leads to the same path."""
    again = restart(target)
    again.measure = None
    assert again.slim(rounds=3) == steps and again.correction == correction


def test_table_is_corrected_by_measurements(restart, monkeypatch):
    search = restart(11.)
    monkeypatch.setattr(search, 'measure', measured_as(search, 1.2))
    steps = search.slim(rounds=3)
    assert search.correction == pytest.approx(1.2)
    last = steps[-1]
    assert last.ms <= 11
    assert last.ms == pytest.approx(1.2 * search.table.predict(last.network.arch))
    assert_repeated(restart, 11., steps, search.correction)


def test_target_that_measurements_put_out_of_reach(slimmed, restart, monkeypatch):
    """The path stays if the supernet is measured to be faster than the target."""
    target, messages = .9 * slimmed[0].ms(slimmed[0].start), []
    search = restart(target)
    monkeypatch.setattr(search, 'measure', measured_as(search, .8))
    monkeypatch.setattr('mmeffformer.search.search.print_log',
                        lambda text, **_: messages.append(text))
    steps = search.slim(rounds=3)
    assert search.correction == 1 and steps[-1].ms <= target
    assert 'cannot be reached' in messages[-1]
    assert_repeated(restart, target, steps, 1)


def test_nearest_of_several_paths_counts(restart, monkeypatch):
    search, factors = restart(12.), iter([1.3, .7, 1.1, 1.4, 1.5])
    measured = {}

    def measure(networks, rounds):
        (name, arch), = networks.items()
        measured[name] = next(factors) * search.table.predict(arch)
        return {name: measured[name]}

    monkeypatch.setattr(search, 'measure', measure)
    steps = search.slim(rounds=3)
    assert 2 <= len(measured) <= 4
    nearest = min(measured, key=lambda name: abs(measured[name] / 12 - 1))
    assert steps[-1].network.key() == nearest
    assert_repeated(restart, 12., steps, search.correction)


def test_other_searches_in_the_same_folder_are_refused(trained, slimmed):
    config, checkpoint, table = trained
    with pytest.raises(ValueError, match='target 9.0 there, 8 now'):
        Search(config(slimmed[0].work_dir), checkpoint, table, 8, batches=2)


def test_supernet_is_not_changed(trained, slimmed):
    state = torch.load(trained[1], weights_only=False)['state_dict']
    for key, value in slimmed[0].supernet.state_dict().items():
        assert torch.equal(value, state[f'backbone.{key}']), key
