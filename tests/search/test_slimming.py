"""The path of slimming with made-up latencies and accuracies, and its journal."""
import json

import pytest

from mmeffformer.search.slimming import LANDING, Journal, slim
from mmeffformer.search.subnetwork import Subnetwork

START = Subnetwork((['MB4D'] * 2, ['MB4D'] * 2, ['MB4D'] * 3, ['MB4D', 'MB3D']),
                   (32, 32, 48, 64))
IMPORTANCES = [[dict(MB4D=.5, I=.5)] * 2] * 2 + [[dict(MB4D=.4, MB3D=.3, I=.3)] * 3] * 2


def ms(network):
    return sum(width * sum(2 if kind == 'MB3D' else kind == 'MB4D' for kind in stage)
               for width, stage in zip(network.widths, network.choices)) / 10


def accuracy(network):
    """Return an accuracy that does not depend on the blocks of stage 3."""
    return 100 - sum(stage.count('I') * (0 if i == 2 else 5)
                     for i, stage in enumerate(network.choices)) - sum(
        (full - width) / 4 for full, width in zip(START.widths, network.widths))


def search(folder, target, evaluate=accuracy, ms=ms):
    return slim(START, IMPORTANCES, ms, target, evaluate, Journal(folder / 'journal.json', {}))


def test_the_action_with_the_least_drop_per_ms_is_taken(tmp_path):
    steps = search(tmp_path, 36.)
    # 6.4 + 6.4 + 14.4 + 6.4 + 12.8 ms. Paths of the first stages are worth 1, of the last 7 / 3.
    assert steps[0].ms == pytest.approx(46.4)
    assert steps[0].action == 'supernet' and steps[0].accuracy == 100
    # A path of stage 1 would cost 5 for 3.2 ms, its channels 4 for 3.2 ms; the exchange nothing.
    assert [step.action for step in steps[1:]] == [
        'MB3D 2 of stage 4 becomes MB4D', 'stage 1 narrows to 16', 'remove MB4D 1 of stage 1']
    assert [step.ms for step in steps[1:]] == pytest.approx([40., 36.8, 35.2])
    assert [step.accuracy for step in steps[1:]] == [100, 96, 91]


def test_path_ends_near_the_target(tmp_path):
    # The exchange would lead to 40 ms; only removing a block of stage 3 comes nearer.
    *_, last = search(tmp_path, 42.)
    assert last.action == 'remove MB4D 1 of stage 3' and last.ms == pytest.approx(41.6)
    assert (1 - LANDING) * 42 <= last.ms <= 42
    # Where nothing but the goal is too fast, what slimming would have done is done: the exchange.
    *_, last = search(tmp_path / 'other', 46.)
    assert last.action == 'MB3D 2 of stage 4 becomes MB4D'


def test_steps_without_a_gain_by_the_table(tmp_path):
    def flat(network):  # below 32 channels the first stage gets no faster
        return ms(network) + (max(0, 32 - network.widths[0]) * network.choices[0].count('MB4D')
                              + 16 * network.choices[0].count('I')) / 10

    *_, last = search(tmp_path, 22., ms=flat)
    assert last.ms <= 22


def test_journal_saves_every_evaluation(tmp_path):
    evaluated = []

    def evaluate(network):
        evaluated.append(network)
        if len(evaluated) == 5:
            raise MemoryError
        return accuracy(network)

    with pytest.raises(MemoryError):
        search(tmp_path, 36., evaluate)
    written = json.loads((tmp_path / 'journal.json').read_text())
    assert written['accuracies'] == {network.key(): accuracy(network)
                                     for network in evaluated[:4]}
    steps = search(tmp_path, 36., evaluate)
    # Nothing but the one that was lost is evaluated again.
    assert len({*evaluated}) == len(evaluated) - 1
    assert steps == search(tmp_path / 'at once', 36.)


@pytest.mark.parametrize('text', ['{"settings": {}}', '[]', '{"settings'])
def test_broken_journals_are_refused(tmp_path, text):
    (tmp_path / 'journal.json').write_text(text)
    with pytest.raises(ValueError, match='not the journal of a search'):
        Journal(tmp_path / 'journal.json', {})
    assert (tmp_path / 'journal.json').read_text() == text
