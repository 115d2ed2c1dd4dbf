"""A search in a trained supernet for a network of a latency, with all that it takes and leaves."""
import hashlib
import logging
from copy import deepcopy
from itertools import product
from pathlib import Path
from random import Random
from typing import Dict, List, Mapping, Optional, Sequence

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from ..latency.measuring import measure_networks
from ..latency.table import LatencyTable, title
from ..latency.timing import Spread
from ..models.arch import ARCHS, Arch
from ..utils.files import atomic_write
from ..utils.plots import search_path
from ..utils.registry import MODELS
from ..weights.compatibility import load_compatible
from ..weights.safe_loading import read_checkpoint
from .evaluation import Evaluation
from .result import arch_dict, network_config, network_state, save_weights
from .slimming import Journal, Report, Step, check_target, slim
from .subnetwork import IDENTITY, STEP, Subnetwork

CORRECTIONS = 3  # of the table, at most
NEAR = .03  # to the target, what needs none
MEASURED = 12  # networks of a path, at most


class Share(float):
    """A latency as a share of the supernet's best network, by the table."""


class Search:
    """Networks of a supernet, what they cost by a latency table, and how good they are.

    Args:
        cfg: Of the supernet's training; its ``work_dir`` receives the results.
        checkpoint: What that training saved.
        table: Path of a latency table.
        target: The latency to get to, ms or a :class:`Share`.
        metric, batches, seed: See :class:`Evaluation`.

    Attributes:
        start: The supernet's best network, at full width.

    Raises:
        FileNotFoundError: There is no such checkpoint or table.
        ValueError: The config is of no supernet, the checkpoint not of this config, the table
            lacks widths of it, the target cannot be reached, the metric is unknown, or the work
            dir holds another search.
    """

    def __init__(self, cfg: Config, checkpoint: str, table: str, target: float,
                 metric: Optional[str] = None, batches: int = 8, seed: int = 0):
        self.cfg, self.work_dir = cfg, Path(cfg.work_dir)
        self.table = LatencyTable.load(table)
        told = f'{100 * target:g} %' if isinstance(target, Share) else target
        settings = dict(config=_digest(_settings(cfg).encode()),
                        checkpoint=_digest(Path(checkpoint).read_bytes()),
                        table=_digest(Path(table).read_bytes()), target=told,
                        metric=metric, batches=batches, seed=seed)
        self.journal = Journal(self.work_dir / 'journal.json', settings)
        cfg = cfg.copy()
        cfg.randomness = dict(seed=seed)
        self.runner = Runner.from_cfg(cfg)
        self.evaluation = Evaluation(self.runner, metric, batches, seed)
        self.evaluation.metric = self.journal.metric
        self.model = self.evaluation.model
        load_compatible(self.model, checkpoint)
        self.supernet = self.evaluation.supernet
        self.start = self.supernet.subnetwork()
        self.seed = seed
        if isinstance(target, Share):
            target *= self.table.predict(self.start.arch)
        self.target = float(target)
        self.correction = 1.  # measured ms by those of the table
        print_log(f'latencies: {title(self.table.header)}; target {self.target:.3g} ms',
                  logger='current')
        check_target(self.start, self.ms, self.target)
        self.evaluation.ranking = self._ranking()
        self.accuracy(self.start)  # tells whether the metric is one

    def _ranking(self):
        """Which channels count most is found once, a run that goes on reads it."""
        path = self.work_dir / 'channels.pth'
        if not self.journal.accuracies:
            with atomic_write(path) as tmp_path:
                torch.save(self.evaluation.rank(), tmp_path)
        return read_checkpoint(path)

    def ms(self, network: Subnetwork) -> float:
        """Return a network's latency by the table, corrected by what has been measured."""
        return self.correction * self.table.predict(network.arch)

    def accuracy(self, network: Subnetwork) -> float:
        """Return a network's accuracy, evaluated or from the journal."""
        return self.journal.accuracy(network, self._evaluate)

    def _evaluate(self, network: Subnetwork) -> float:
        accuracy = self.evaluation(network)
        self.journal.metric = self.evaluation.metric
        return accuracy

    def slim(self, rounds: int = 0, report: Report = print) -> List[Step]:
        """Return the path down to the target, see :func:`slim`.

        The network found is measured. Where it is off the target, the table is corrected by
        that and the path found anew, up to ``CORRECTIONS`` times; of these the path that ends
        nearest to the target is returned.

        Args:
            rounds: Samples to measure with; 0 measures nothing.
        """
        passes = []
        self.correction = 1.
        while True:
            steps = slim(self.start, self.supernet.importances(), self.ms, self.target,
                         self._evaluate, self.journal, report)
            ms = self._measured(steps[-1].network, rounds)
            off = abs(ms / self.target - 1) if ms else 0.
            passes.append((off, self.correction, steps))
            if off <= NEAR or len(passes) > CORRECTIONS:
                break
            report(f'measured: {ms:.3g} ms')
            self.correction = ms / self.table.predict(steps[-1].network.arch)
            if self.correction in [correction for _, correction, _ in passes]:
                break  # the same network again
            try:
                check_target(self.start, self.ms, self.target)
            except ValueError as error:
                report(f'as measured, {error}')
                break
        _, self.correction, steps = min(passes, key=lambda found: found[0])
        self.journal.steps = steps
        if self.journal.evaluations is None:
            self.journal.evaluations = len(self.journal.accuracies)
        self.journal.save()
        return steps

    def _measured(self, network: Subnetwork, rounds: int) -> Optional[float]:
        """Measured ms, the journal's if they are there; None if nothing is measured."""
        known = self.journal.measured
        if network.key() not in known and rounds:
            found = self.measure({network.key(): network.arch}, rounds)
            known.update((name, time.median) for name, time in found.items())
            self.journal.save()
        return known.get(network.key())

    def baselines(self, report: Report = print) -> Dict[str, Step]:
        """Return the networks of :meth:`narrow`, and of :meth:`sample` with as many evaluations
        as slimming took, by name; to be called after that. One that fails is told and left out.
        """
        found = {}
        for name, search in (('uniform', self.narrow), ('random', lambda: self.sample(
                self.journal.evaluations, report=report))):
            try:
                found[name] = search()
            except ValueError as error:
                report(f'{name}: {error}')
        return found

    def narrow(self) -> Step:
        """Return the supernet's best network with all stages narrowed alike, to the target.

        Widths are the multiples of 16 below or above a share of the supernet's; of networks at
        most as slow as the target the slowest is taken.
        """
        found: Dict[Subnetwork, float] = {}
        for share in np.linspace(0, 1, 101):
            around = []
            for width in self.start.widths:
                low = min(width, max(STEP, int(share * width) // STEP * STEP))
                around.append({low, min(low + STEP, width)})
            for widths in product(*around):
                network = Subnetwork(self.start.choices, widths)
                found[network] = self.ms(network)
        fast = {network: ms for network, ms in found.items() if ms <= self.target}
        if not fast:
            raise ValueError(f'uniform narrowing reaches no {self.target:g} ms: '
                             f'{min(found.values()):.3g} ms at least')
        network = max(fast, key=fast.get)
        return Step('uniform narrowing', network, fast[network], self.accuracy(network))

    def sample(self, evaluations: int, tolerance: float = 0.05, report: Report = print) -> Step:
        """Return the best of so many random networks a little faster than the target.

        Args:
            evaluations: Networks to evaluate.
            tolerance: How much faster than the target they may be, at most.
        """
        draw, best = Random(self.seed), None
        seen: Dict[Subnetwork, float] = {}
        tries = 0
        while len(seen) < evaluations:
            tries += 1
            if tries > 10000 * evaluations:
                raise ValueError(f'only {len(seen)} random networks of {self.target:g} ms were '
                                 'found: take a target that is nearer to the middle of the range')
            network = self._draw(draw)
            ms = self.ms(network)
            if network in seen or not (1 - tolerance) * self.target <= ms <= self.target:
                continue
            seen[network] = ms
            step = Step('random search', network, ms, self.accuracy(network))
            if best is None or step.accuracy > best.accuracy:
                best = step
                report(f'{len(seen)} of {evaluations}: {step.accuracy:.4g} at {ms:.3g} ms')
        return best

    def _draw(self, draw: Random) -> Subnetwork:
        kept = [sorted(draw.sample(range(len(stage)), draw.randint(1, len(stage))))
                for stage in self.start.choices]
        total = sum(map(len, kept))
        most = sum(len(kept[i]) for i in self.supernet.attention_stages)
        change, at, choices = total - draw.randint(0, most), 0, []
        for stage, paths in zip(self.start.choices, kept):
            kinds = [IDENTITY] * len(stage)
            for j in paths:
                kinds[j] = 'MB4D' if at < change else 'MB3D'
                at += 1
            choices.append(kinds)
        return Subnetwork(choices, [draw.choice([*range(STEP, width, STEP), width])
                                    for width in self.start.widths])

    def measure(self, networks: Mapping[str, Arch], rounds: int) -> Dict[str, Spread]:
        """Return the measured ms of networks by name; none where the table is of another machine.
        """
        try:
            return measure_networks(networks, self.table.header, rounds)
        except ValueError as error:
            print_log(f'nothing is measured: {error}', logger='current', level=logging.WARNING)
            return {}

    def finish(self, steps: Sequence[Step], others: Mapping[str, Step] = {},
               beside: Mapping[str, Optional[float]] = {}, rounds: int = 0) -> Path:
        """Write what a user goes on with, and measure and plot it.

        Args:
            steps: The path.
            others: Of :meth:`baselines`.
            beside: Named archs to show beside it, with their accuracy where it is known.
            rounds: Samples of each network; 0 measures none. Of a long path ``MEASURED`` networks
                are measured.

        Returns:
            The config that trains the last network of the path.
        """
        named = dict(slimmed=steps[-1], **others)
        configs = {name: self.write(step, name) for name, step in named.items()}
        self.journal.save(arch=arch_dict(steps[-1].network.arch))
        shown = sorted({round(i) for i in np.linspace(0, len(steps) - 1, MEASURED)})
        networks = {step.network.key(): step.network.arch
                    for step in [*(steps[i] for i in shown), *others.values()]}
        networks.update((name, ARCHS[name]) for name in beside)
        times = {name: time.median for name, time in
                 (self.measure(networks, rounds) if rounds else {}).items()}
        metric = self.journal.metric or 'accuracy'
        plotted = {name: (times[name], accuracy) for name, accuracy in beside.items() if times}
        plotted.update((step.action, (times.get(step.network.key(), step.ms), step.accuracy))
                       for step in others.values())
        search_path([(step.ms, step.accuracy) for step in steps],
                    [(times[step.network.key()], step.accuracy) for step in steps
                     if step.network.key() in times],
                    plotted, self.target, metric, title(self.table.header),
                    self.work_dir / 'path.png')
        told = [f'target {self.target:.3g} ms']
        for name, step in named.items():
            text = (f'{name}: {metric} {step.accuracy:.4g} without training, '
                    f'{step.ms:.3g} ms by the table')
            if times:
                ms = times[step.network.key()]
                text += f', {ms:.3g} ms measured ({ms / self.target - 1:+.1%} of the target)'
            told.append(f'{text}\n  {arch_dict(step.network.arch)}\n'
                        f'  train it: python tools/train.py {configs[name]}')
        print_log('\n'.join(told), logger='current')
        self.journal.save(arch=arch_dict(steps[-1].network.arch), times_ms=times)
        return configs['slimmed']

    def write(self, step: Step, name: str) -> Path:
        """Write ``NAME.py``, a config that trains a network, and ``NAME.pth``, its first weights.

        Returns:
            The config.
        """
        network = step.network
        cfg = network_config(self.cfg, network.arch)
        init_default_scope(cfg.get('default_scope', 'mmengine'))
        fresh = revert_sync_batchnorm(MODELS.build(deepcopy(cfg.model)))
        with self.evaluation.placed(network) as model:
            state = network_state(model, fresh.state_dict())
        weights, config = (self.work_dir / f'{name}{suffix}' for suffix in ('.pth', '.py'))
        save_weights(state, weights, arch=arch_dict(network.arch), choices=network.key(),
                     predicted_ms=step.ms, accuracy=step.accuracy)
        cfg.load_from = str(weights)
        cfg.pop('work_dir', None)
        with atomic_write(config) as tmp_path:
            cfg.dump(str(tmp_path))
        return config


def _settings(cfg: Config) -> str:
    """The config's text, but for where results go."""
    cfg = cfg.copy()
    cfg.pop('work_dir', None)
    return cfg.pretty_text


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
