"""Validation of a latency table: its predictions against measured networks."""
import random
from typing import Any, Dict, List, Mapping, Sequence

import numpy as np

from ..models.arch import ARCHS, Arch
from .measuring import measure_networks
from .table import LatencyTable, widths_of
from .timing import Progress, no_progress

MAX_MB3D = 6  # of a random network


def random_archs(count: int, header: Mapping[str, Any], seed: int = 0,
                 depths: Sequence[int] = ARCHS['l3'].depths) -> List[Arch]:
    """Return networks within the table, with at most these depths and ``MAX_MB3D`` MB3D.

    As in the paper's search, MB4D changes to MB3D once: the third stage has MB3D only if the
    fourth stage has no MB4D.
    """
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        widths = tuple(draw.choice(of_stage) for of_stage in widths_of(header))
        depth = tuple(draw.randint(1, most) for most in depths)
        attention = draw.randint(0, MAX_MB3D)
        last = min(attention, depth[3])
        found.append(Arch(widths, depth, (0, 0, min(attention - last, depth[2]), last)))
    return found


def check(table: LatencyTable, count: int = 20, seed: int = 0,
          progress: Progress = no_progress) -> Dict[str, Any]:
    """Compare predictions with measured networks that the table was not made with.

    Args:
        count: Number of random networks; L1 and L3 are added if the table has their widths.

    Returns:
        dict: ``networks``, each with name, arch, ``predicted_ms``, ``measured_ms`` and its
        quartiles; ``median_error``, the median of |predicted / measured - 1|; ``spearman``,
        the rank correlation of both; ``count`` and ``seed``.
    """
    archs = {}
    for name in ('l1', 'l3'):
        try:
            table.predict(ARCHS[name])
        except ValueError:
            continue
        archs[name] = ARCHS[name]
    archs.update({f'random{i}': arch
                  for i, arch in enumerate(random_archs(count, table.header, seed))})
    found = measure_networks(archs, table.header, table.header['rounds'], progress)
    networks = [dict(name=name, widths=list(arch.widths), depths=list(arch.depths),
                     attention_blocks=list(arch.attention_blocks),
                     predicted_ms=table.predict(arch), measured_ms=found[name].median,
                     q1=found[name].q1, q3=found[name].q3) for name, arch in archs.items()]
    predicted, measured = ([each[name] for each in networks]
                           for name in ('predicted_ms', 'measured_ms'))
    return dict(count=count, seed=seed, networks=networks,
                median_error=float(np.median(np.abs(np.divide(predicted, measured) - 1))),
                spearman=spearman(predicted, measured))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the rank correlation of two series; equal values share the mean of their ranks."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]
