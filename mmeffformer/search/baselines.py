"""Baselines of a search: uniform narrowing and random search."""
from itertools import product
from random import Random
from typing import Dict

import numpy as np
from mmengine.logging import print_log

from .search import Search
from .slimming import Step
from .subnetwork import IDENTITY, STEP, Subnetwork

TRIES = 10000  # random networks for each evaluation, at most


def baselines(search: Search) -> Dict[str, Step]:
    """Return the networks of both baselines by name; one that fails is logged and left out.

    Args:
        search: A search that has been slimmed. Random search gets as many evaluations.
    """
    found = {}
    for name, find in (('uniform', lambda: narrow_uniformly(search)),
                       ('random', lambda: search_randomly(search, search.journal.evaluations))):
        try:
            found[name] = find()
        except ValueError as error:
            print_log(f'{name}: {error}', logger='current')
    return found


def narrow_uniformly(search: Search) -> Step:
    """Return the supernet's best network with all stages narrowed by the same share.

    Widths are the multiples of 16 below or above a share of the supernet's. Of the networks at
    most as slow as the target, the slowest is taken.

    Raises:
        ValueError: All are slower than the target.
    """
    ms: Dict[Subnetwork, float] = {}
    for share in np.linspace(0, 1, 101):
        around = []
        for width in search.start.widths:
            low = min(width, max(STEP, int(share * width) // STEP * STEP))
            around.append({low, min(low + STEP, width)})
        for widths in product(*around):
            network = Subnetwork(search.start.choices, widths)
            ms[network] = search.ms(network)
    fast = [network for network in ms if ms[network] <= search.target]
    if not fast:
        raise ValueError(f'uniform narrowing cannot reach {search.target:g} ms: its fastest '
                         f'network takes {min(ms.values()):.3g} ms')
    network = max(fast, key=ms.get)
    return Step('uniform narrowing', network, ms[network], search.accuracy(network))


def search_randomly(search: Search, evaluations: int, tolerance: float = 0.05) -> Step:
    """Return the best of random networks that are a little faster than the target.

    Args:
        evaluations: Number of networks to evaluate.
        tolerance: How much faster than the target they may be, relative to it.

    Raises:
        ValueError: There are too few such networks.
    """
    random, steps = Random(search.seed), {}
    for _ in range(TRIES * evaluations):
        network = _draw(search, random)
        ms = search.ms(network)
        if network not in steps and (1 - tolerance) * search.target <= ms <= search.target:
            steps[network] = Step('random search', network, ms, search.accuracy(network))
            if len(steps) == evaluations:
                return max(steps.values(), key=lambda step: step.accuracy)
    raise ValueError(f'only {len(steps)} random networks of {search.target:g} ms were found: '
                     'choose a target nearer to the middle of the range')


def _draw(search: Search, random: Random) -> Subnetwork:
    kept = [sorted(random.sample(range(len(stage)), random.randint(1, len(stage))))
            for stage in search.start.choices]
    total = sum(map(len, kept))
    most = sum(len(kept[i]) for i in search.supernet.attention_stages)
    change, at, choices = total - random.randint(0, most), 0, []
    for stage, paths in zip(search.start.choices, kept):
        kinds = [IDENTITY] * len(stage)
        for j in paths:
            kinds[j] = 'MB4D' if at < change else 'MB3D'
            at += 1
        choices.append(kinds)
    return Subnetwork(choices, [random.choice([*range(STEP, width, STEP), width])
                                for width in search.start.widths])
