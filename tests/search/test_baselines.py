"""Uniform narrowing and random search."""
from itertools import product

import pytest

from mmeffformer.search.baselines import baselines, narrow_uniformly, search_randomly
from mmeffformer.search.subnetwork import Subnetwork

WIDTHS = (16, 32, 48, 48)


def is_uniform(widths):
    """Return whether widths are a share of ``WIDTHS``, rounded to a multiple of 16."""
    return any(all(abs(width - max(16, share / 100 * full)) < 16
                   for width, full in zip(widths, WIDTHS)) for share in range(101))


def test_uniform_narrowing(restart):
    search = restart(15.)
    narrow = narrow_uniformly(search)
    assert narrow.network.choices == search.start.choices and is_uniform(narrow.network.widths)
    assert narrow.ms == search.ms(narrow.network) <= 15
    others = [Subnetwork(search.start.choices, widths)
              for widths in product((16,), (16, 32), (16, 32, 48), (16, 32, 48))
              if is_uniform(widths)]
    assert not [other for other in others if narrow.ms < search.ms(other) <= 15]


def test_random_search(restart):
    search = restart(15.)
    best = search_randomly(search, 3, tolerance=.2)
    assert .8 * 15 <= best.ms <= 15 and best.accuracy == search.accuracy(best.network)
    assert best == search_randomly(search, 3, tolerance=.2)


def test_baselines_that_fail_are_left_out(restart, monkeypatch):
    messages = []
    monkeypatch.setattr('mmeffformer.search.baselines.print_log',
                        lambda text, **_: messages.append(text))
    search = restart(9.)
    search.journal.evaluations = 1
    found = baselines(search)
    assert [*found] == ['random'] and found['random'].ms <= 9
    assert messages[0].startswith('uniform: uniform narrowing cannot reach 9 ms')
    with pytest.raises(ValueError, match='only 0 random networks of 1.5 ms'):
        search.target = 1.5
        search_randomly(search, 1)
