"""Latency-driven slimming (paper, section 4.2): the path from a supernet down to a latency."""
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence

from ..utils.files import atomic_write
from .subnetwork import Importances, Subnetwork, smallest

Report = Callable[[str], None]

LANDING = .03  # of the target: the slimmed network should not be faster than that


class Step(NamedTuple):
    """A network on the path.

    Attributes:
        action: What made it of the one before.
        network: The network.
        ms: Its latency by the table.
        accuracy: The metric evaluated.
    """

    action: str
    network: Subnetwork
    ms: float
    accuracy: float


class Journal:
    """What was evaluated and measured so far, in a file, so that nothing has to be twice.

    All else follows from them: a run that was killed is repeated up to where it was, within
    seconds, and goes on from there.

    Args:
        path: The file; it is made where there is none.
        settings: On what, with what and for what is searched, as JSON can hold it.

    Attributes:
        accuracies: By :meth:`Subnetwork.key`.
        measured: ms by key, of networks that were measured on the way.
        evaluations: How many slimming took, once it is done.
        metric: What the accuracies are.
        steps: The path so far, for people; it is not read back.

    Raises:
        ValueError: The file is of other settings, or broken.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path, self.settings = Path(path), json.loads(json.dumps(settings))
        self.accuracies: Dict[str, float] = {}
        self.measured: Dict[str, float] = {}
        self.evaluations: Optional[int] = None
        self.metric: Optional[str] = None
        self.steps: List[Step] = []
        if self.path.exists():
            found = self._read()
            self.accuracies, self.measured = found['accuracies'], found['measured_ms']
            self.evaluations, self.metric = found['evaluations'], found['metric']

    def _read(self) -> dict:
        try:
            found = json.loads(self.path.read_text())
            settings = dict(found['settings'])
            for key in ('accuracies', 'measured_ms'):
                found[key] = {name: float(value) for name, value in found[key].items()}
            found['metric'], found['evaluations']
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{self.path} is no journal of a search ({error!r}): remove it, or '
                             'choose another --work-dir') from error
        other = [f'{key} {settings.get(key)!r} there, {self.settings.get(key)!r} now'
                 for key in sorted({*settings, *self.settings})
                 if settings.get(key) != self.settings.get(key)]
        if other:
            raise ValueError(f'{self.path} is of another search: {"; ".join(other)}. Repeat that '
                             'one, or choose another --work-dir')
        return found

    def accuracy(self, network: Subnetwork, evaluate: Callable[[Subnetwork], float]) -> float:
        """Return a network's accuracy, evaluated if it is not known yet."""
        key = network.key()
        if key not in self.accuracies:
            self.accuracies[key] = evaluate(network)
            self.save()
        return self.accuracies[key]

    def save(self, **more: Any):
        """Write the file, whole or not at all, with ``more`` in it."""
        text = json.dumps(dict(
            settings=self.settings, metric=self.metric, accuracies=self.accuracies,
            measured_ms=self.measured, evaluations=self.evaluations,
            steps=[dict(action=step.action, network=step.network.key(), ms=step.ms,
                        accuracy=step.accuracy) for step in self.steps], **more), indent=1)
        with atomic_write(self.path) as tmp_path:
            tmp_path.write_text(text)


def check_target(start: Subnetwork, ms: Callable[[Subnetwork], float], target: float):
    """Raise a ValueError unless slimming can get from ``start`` to ``target`` ms."""
    low, high = ms(smallest(start)), ms(start)
    if not low <= target < high:
        raise ValueError(f'target {target:g} ms cannot be reached: by the table slimming goes '
                         f'from {high:.3g} ms, the whole supernet, down to {low:.3g} ms')


def slim(start: Subnetwork, importances: Importances, ms: Callable[[Subnetwork], float],
         target: float, evaluate: Callable[[Subnetwork], float], journal: Journal,
         report: Report = lambda _: None) -> List[Step]:
    """Make a network faster action by action, until it takes ``target`` ms by the table.

    Each time, the accuracy that each of :meth:`Subnetwork.actions` costs is evaluated, its gain
    read from the table, and the one with the least drop per ms executed. Only where that would
    overshoot the target by more than ``LANDING``, a smaller step is taken out of all
    :meth:`Subnetwork.neighbours`, if there is any.

    Args:
        start: The network to begin with.
        importances: Of the supernet's paths.
        ms: A network's latency by the table.
        evaluate: A network's accuracy; higher is better.
        journal: Of this search.
        report: Is told of every step.

    Returns:
        The path, ``start`` first.

    Raises:
        ValueError: The target cannot be reached.
    """
    check_target(start, ms, target)

    def reached(networks: Mapping[str, Subnetwork]) -> List[Step]:
        return [Step(action, network, ms(network), journal.accuracy(network, evaluate))
                for action, network in networks.items()]

    now, = reached(dict(supernet=start))
    journal.steps = [now]
    report(_told(now))
    while now.ms > target:
        steps = reached(now.network.actions(importances))
        step = _cheapest(now, steps)
        if step.ms < (1 - LANDING) * target:
            # More than was asked for: is there a smaller step?
            step = _cheapest(now, reached({
                action: network for action, network in now.network.neighbours().items()
                if (1 - LANDING) * target <= ms(network) < now.ms})) or step
        now = step
        journal.steps.append(now)
        journal.save()
        report(_told(now))
    return journal.steps


def _cheapest(now: Step, steps: Sequence[Step]) -> Optional[Step]:
    """The step of the least accuracy lost per ms, None of none.

    Where the table's noise leaves no gain, the fastest is a step nevertheless.
    """
    faster = [step for step in steps if step.ms < now.ms]
    if faster:
        return min(faster, key=lambda step: (now.accuracy - step.accuracy) / (now.ms - step.ms))
    return min(steps, key=lambda step: step.ms, default=None)


def _told(step: Step) -> str:
    return f'{step.ms:.3g} ms, {step.accuracy:.4g}: {step.action}'
