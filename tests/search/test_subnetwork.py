"""Networks of a supernet as data, and the three actions that make them faster."""
import math

import pytest

from mmeffformer.models import Arch
from mmeffformer.search.subnetwork import Subnetwork, smallest, worth

CHOICES = (('MB4D', 'I'), ('MB4D', 'MB4D'), ('MB4D', 'I', 'MB3D'), ('MB3D', 'I', 'MB3D'))
WIDTHS = (32, 48, 80, 40)


def importances(choices=CHOICES, **of):
    """Equal ones, but the share of identity given as of{stage}{path}."""
    found = []
    for i, stage in enumerate(choices):
        found.append([])
        for j in range(len(stage)):
            kinds = ('MB4D', 'I') if i < 2 else ('MB4D', 'MB3D', 'I')
            identity = of.get(f'of{i}{j}', .3)
            found[-1].append({kind: (1 - identity) / (len(kinds) - 1) for kind in kinds}
                             | {'I': identity})
    return found


def test_arch():
    network = Subnetwork(CHOICES, WIDTHS)
    assert network.arch == Arch((32, 48, 80, 40), (1, 2, 2, 2), (0, 0, 1, 2))
    assert network.key() == 'a-|aa|a-b|b-b/32-48-80-40'
    assert [*network.blocks()] == [
        (0, 0, 'MB4D'), (1, 0, 'MB4D'), (1, 1, 'MB4D'), (2, 0, 'MB4D'), (2, 2, 'MB3D'),
        (3, 0, 'MB3D'), (3, 2, 'MB3D')]


@pytest.mark.parametrize('stage, path, kind, message', [
    (3, 2, 'MB4D', 'from 4D to 3D once'),  # after an MB3D of its stage
    (3, 0, 'MB4D', 'from 4D to 3D once'),  # after that of an earlier stage
    (0, 0, 'I', 'stage 1 without a block'),
    (1, 0, 'MB2D', "'MB2D'")])
def test_rules(stage, path, kind, message):
    choices = [[*each] for each in CHOICES]
    choices[stage][path] = kind
    with pytest.raises(ValueError, match=message):
        Subnetwork(choices, WIDTHS)


def test_actions_take_what_is_worth_least():
    network = Subnetwork(CHOICES, WIDTHS)
    actions = network.actions(importances(of11=.6, of31=.9))  # the latter is I already
    assert [*actions] == ['remove MB4D 2 of stage 2', 'MB3D 3 of stage 3 becomes MB4D',
                          'stage 1 narrows to 16']
    removed, exchanged, narrowed = actions.values()
    assert removed == Subnetwork((CHOICES[0], ('MB4D', 'I'), *CHOICES[2:]), WIDTHS)
    assert exchanged == Subnetwork((*CHOICES[:2], ('MB4D', 'I', 'MB4D'), CHOICES[3]), WIDTHS)
    assert narrowed == Subnetwork(CHOICES, (16, 48, 80, 40))


def test_the_least_important_stage_is_the_one_with_the_least_sum():
    # Sums of (1 - i) / i: 7/3, then 2 * 7/3; two paths at .6 count 2/3 each.
    actions = Subnetwork(CHOICES, WIDTHS).actions(importances(of20=.6, of22=.6))
    assert [*actions][-1] == 'stage 3 narrows to 64'
    # A width that is not a multiple of 16 narrows to the next lower one.
    actions = Subnetwork(CHOICES, WIDTHS).actions(importances(of30=.6, of32=.6))
    assert [*actions][-1] == 'stage 4 narrows to 32'


def test_worth():
    assert worth({'MB4D': .3, 'MB3D': .5, 'I': .2}) == pytest.approx(4)
    a_4d, a_identity = .7, -.4  # the ratio of the softmax of the paper's alphas
    shares = [math.exp(a) / (math.exp(a_4d) + math.exp(a_identity)) for a in (a_4d, a_identity)]
    assert worth({'MB4D': shares[0], 'I': shares[1]}) == pytest.approx(math.exp(1.1))


def test_actions_end_at_the_smallest_network():
    network, steps = Subnetwork(CHOICES, WIDTHS), 0
    while actions := network.actions(importances()):
        network, steps = [*actions.values()][steps % len(actions)], steps + 1
    assert network.widths == (16, 16, 16, 16)
    assert network.arch == smallest(network).arch == Arch((16,) * 4, (1,) * 4)
    # Widths lose 1 + 2 + 4 + 2 times up to 16 channels, 3 blocks go, and of three MB3D, which
    # go or are exchanged, two or three are exchanged.
    assert 9 + 3 + 2 <= steps <= 9 + 3 + 3


def test_within():
    kinds = [[('MB4D', 'I')] * 2] * 2 + [[('MB4D', 'MB3D', 'I')] * 3] * 2
    network = Subnetwork(CHOICES, WIDTHS)
    network.check_within(WIDTHS, kinds)
    with pytest.raises(ValueError, match=r'expected 1 to \(32, 48, 64, 40\)'):
        network.check_within((32, 48, 64, 40), kinds)
    with pytest.raises(ValueError, match='2 paths in stage 1: expected 3'):
        network.check_within(WIDTHS, [[('MB4D', 'I')] * 3, *kinds[1:]])
    with pytest.raises(ValueError, match='choice MB3D for path 3 of stage 3'):
        network.check_within(WIDTHS, [*kinds[:2], [('MB4D', 'I')] * 3, kinds[3]])
