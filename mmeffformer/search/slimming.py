"""Latency-driven slimming (paper, section 4.2): the path from a supernet down to a latency."""
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Union

from mmengine.logging import print_log

from ..utils.files import atomic_write
from .subnetwork import Importances, Subnetwork, smallest

LANDING = .03  # of the target: how much faster than that the slimmed network should be at most


class Step(NamedTuple):
    """A network on the path.

    Attributes:
        action: The action that leads to it from the previous network.
        network: The network.
        ms: Its latency by the table.
        accuracy: Its metric.
    """

    action: str
    network: Subnetwork
    ms: float
    accuracy: float


class Journal:
    """All evaluations and measurements of a search, in a file.

    The rest of a search follows from them: a search that was killed repeats the steps in the
    journal within seconds and resumes after the last one.

    Args:
        path: The file, which may not exist.
        settings: Everything that the search depends on, as values that JSON can hold.

    Attributes:
        accuracies: By :meth:`Subnetwork.key`.
        measured: Measured ms by key.
        evaluations: Number of evaluations that slimming took; None before it is finished.
        metric: Name of the metric.
        steps: The path so far, which is written for people and not read again.

    Raises:
        ValueError: The file has other settings, or is broken.
    """

    def __init__(self, path: Union[str, Path], settings: Mapping[str, Any]):
        self.path, self.settings = Path(path), json.loads(json.dumps(settings))
        self.accuracies: Dict[str, float] = {}
        self.measured: Dict[str, float] = {}
        self.evaluations: Optional[int] = None
        self.metric: Optional[str] = None
        self.steps: List[Step] = []
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        try:
            found = json.loads(self.path.read_text())
            settings = dict(found['settings'])
            self.accuracies, self.measured = (
                {name: float(value) for name, value in found[key].items()}
                for key in ('accuracies', 'measured_ms'))
            self.metric, self.evaluations = found['metric'], found['evaluations']
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{self.path} is not the journal of a search ({error!r}): remove it, '
                             'or choose another --work-dir') from error
        other = [f'{key} {settings.get(key)!r} there, {self.settings.get(key)!r} now'
                 for key in sorted({*settings, *self.settings})
                 if settings.get(key) != self.settings.get(key)]
        if other:
            raise ValueError(f'{self.path} is of another search: {"; ".join(other)}. Use the '
                             'settings of that search, or choose another --work-dir')

    def accuracy(self, network: Subnetwork, evaluate: Callable[[Subnetwork], float]) -> float:
        """Return a network's accuracy, evaluated if it is not known yet."""
        key = network.key()
        if key not in self.accuracies:
            self.accuracies[key] = evaluate(network)
            self.save()
        return self.accuracies[key]

    def save(self, **more: Any) -> None:
        """Write the file atomically, with the values of ``more`` in it."""
        text = json.dumps(dict(
            settings=self.settings, metric=self.metric, accuracies=self.accuracies,
            measured_ms=self.measured, evaluations=self.evaluations,
            steps=[dict(action=step.action, network=step.network.key(), ms=step.ms,
                        accuracy=step.accuracy) for step in self.steps], **more), indent=1)
        with atomic_write(self.path) as tmp_path:
            tmp_path.write_text(text)


def check_target(start: Subnetwork, ms: Callable[[Subnetwork], float], target: float) -> None:
    """Raise a ValueError unless slimming can get from ``start`` to ``target`` ms."""
    low, high = ms(smallest(start)), ms(start)
    if not low <= target < high:
        raise ValueError(f'target {target:g} ms cannot be reached: by the table slimming goes '
                         f'from {high:.3g} ms, the whole supernet, down to {low:.3g} ms')


def slim(start: Subnetwork, importances: Importances, ms: Callable[[Subnetwork], float],
         target: float, evaluate: Callable[[Subnetwork], float], journal: Journal) -> List[Step]:
    """Make a network faster action by action, until its latency by the table is ``target`` ms.

    Each step evaluates the accuracy drop of :meth:`Subnetwork.actions`, reads their gain from the
    table, and takes the one with the least drop per ms. If that would overshoot the target by
    more than ``LANDING``, the step is chosen from all :meth:`Subnetwork.neighbours` that do not.

    Args:
        start: The first network.
        importances: Importances of the supernet's paths.
        ms: Returns a network's latency by the table.
        evaluate: Returns a network's accuracy; higher is better.
        journal: The search's journal.

    Returns:
        The path, ``start`` first.

    Raises:
        ValueError: The target cannot be reached.
    """
    check_target(start, ms, target)

    def evaluated(networks: Mapping[str, Subnetwork]) -> List[Step]:
        return [Step(action, network, ms(network), journal.accuracy(network, evaluate))
                for action, network in networks.items()]

    journal.steps = evaluated(dict(supernet=start))
    while True:
        last = journal.steps[-1]
        print_log(f'{last.ms:.3g} ms, {last.accuracy:.4g}: {last.action}', logger='current')
        if last.ms <= target:
            return journal.steps
        step = _cheapest(last, evaluated(last.network.actions(importances)))
        if step.ms < (1 - LANDING) * target:
            smaller = {action: network for action, network in last.network.neighbours().items()
                       if (1 - LANDING) * target <= ms(network) < last.ms}
            step = _cheapest(last, evaluated(smaller)) or step
        journal.steps.append(step)
        journal.save()


def _cheapest(last: Step, steps: Sequence[Step]) -> Optional[Step]:
    """Return the step with the least accuracy drop per ms, None if there are no steps.

    If the table's noise leaves no step with a gain, return the fastest.
    """
    faster = [step for step in steps if step.ms < last.ms]
    if faster:
        return min(faster, key=lambda step: (last.accuracy - step.accuracy) / (last.ms - step.ms))
    return min(steps, key=lambda step: step.ms, default=None)
