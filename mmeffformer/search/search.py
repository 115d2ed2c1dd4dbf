"""The search in a trained supernet for a network of a given latency."""
import hashlib
import json
import logging
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Tuple

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import Runner

from ..latency.measuring import measure_networks
from ..latency.table import LatencyTable, title
from ..models.arch import Arch
from ..utils.files import atomic_write
from ..weights.compatibility import load_compatible
from ..weights.safe_loading import read_checkpoint
from .evaluation import Evaluation
from .slimming import Journal, Step, check_target, slim
from .subnetwork import Subnetwork
from .weights import Ranking

CORRECTIONS = 3  # of the table, at most
NEAR = .03  # deviation from the target, relative, that needs no correction


class Share(float):
    """A latency as a share of that of the supernet's best network, by the table."""


class Search:
    """The sub-networks of a supernet, with their latencies and accuracies.

    Args:
        cfg: The config of the supernet's training; its ``work_dir`` receives the results.
        checkpoint: The checkpoint of that training.
        table: Path of a latency table.
        target: The latency to reach, in ms or as a :class:`Share`.
        metric, batches, seed: See :class:`Evaluation`.

    Attributes:
        start: The supernet's best network, at full width.

    Raises:
        FileNotFoundError: The checkpoint or the table does not exist.
        ValueError: The config has no supernet, the checkpoint does not fit the config, the table
            lacks widths of the supernet, the target cannot be reached, the metric is unknown, or
            the work dir holds another search.
    """

    def __init__(self, cfg: Config, checkpoint: str, table: str, target: float,
                 metric: Optional[str] = None, batches: int = 8, seed: int = 0):
        self.cfg, self.work_dir, self.seed = cfg, Path(cfg.work_dir), seed
        self.table = LatencyTable.load(table)
        cfg = cfg.copy()
        cfg.pop('work_dir')  # results do not depend on it
        self.journal = Journal(self.work_dir / 'journal.json', dict(
            # Not pretty_text, whose format may differ between processes.
            config=_digest(json.dumps(cfg.to_dict(), sort_keys=True, default=repr).encode()),
            checkpoint=_digest(Path(checkpoint).read_bytes()),
            table=_digest(Path(table).read_bytes()),
            target=f'{100 * target:g} %' if isinstance(target, Share) else target,
            metric=metric, batches=batches, seed=seed))
        cfg.work_dir, cfg.randomness = str(self.work_dir), dict(seed=seed)
        self.runner = Runner.from_cfg(cfg)
        self.evaluation = Evaluation(self.runner, metric, batches, seed)
        self.evaluation.metric = self.journal.metric
        self.model, self.supernet = self.evaluation.model, self.evaluation.supernet
        load_compatible(self.model, checkpoint)
        self.start = self.supernet.subnetwork()
        self.correction = 1.  # measured latencies relative to the table's
        if isinstance(target, Share):
            target *= self.ms(self.start)
        self.target = float(target)
        print_log(f'latencies: {title(self.table.header)}; target {self.target:.3g} ms',
                  logger='current')
        check_target(self.start, self.ms, self.target)
        self.evaluation.ranking = self._ranking()
        self.accuracy(self.start)  # fails now if the metric is unknown

    def _ranking(self) -> Ranking:
        """Return the ranking of channels; a resumed search reads that of its first run."""
        path = self.work_dir / 'channels.pth'
        if not self.journal.accuracies:
            with atomic_write(path) as tmp_path:
                torch.save(self.evaluation.rank(), tmp_path)
        return read_checkpoint(path)

    def ms(self, network: Subnetwork) -> float:
        """Return a network's latency by the table, corrected by the measurements."""
        return self.correction * self.table.predict(network.arch)

    def accuracy(self, network: Subnetwork) -> float:
        """Return a network's accuracy, evaluated or from the journal."""
        return self.journal.accuracy(network, self._evaluate)

    def _evaluate(self, network: Subnetwork) -> float:
        accuracy = self.evaluation(network)
        self.journal.metric = self.evaluation.metric
        return accuracy

    def slim(self, rounds: int = 0) -> List[Step]:
        """Return the path down to the target, see :func:`slim`.

        The last network is measured. If its latency is not near the target, the table is
        corrected by the ratio and the path is searched again, up to ``CORRECTIONS`` times. The
        path whose last network is nearest to the target is returned.

        Args:
            rounds: Samples of each measurement; 0 measures nothing.
        """
        paths: Dict[float, Tuple[float, List[Step]]] = {}  # deviation and path by correction
        self.correction = 1.
        while self.correction not in paths and len(paths) <= CORRECTIONS:
            steps = slim(self.start, self.supernet.importances(), self.ms, self.target,
                         self._evaluate, self.journal)
            last = steps[-1].network
            ms = self._measured(last, rounds)
            deviation = abs(ms / self.target - 1) if ms else 0.
            paths[self.correction] = deviation, steps
            if deviation <= NEAR:
                break
            print_log(f'measured: {ms:.3g} ms', logger='current')
            self.correction = ms / self.table.predict(last.arch)
            try:
                check_target(self.start, self.ms, self.target)
            except ValueError as error:
                print_log(f'with the table corrected, {error}', logger='current')
                break
        self.correction = min(paths, key=lambda correction: paths[correction][0])
        self.journal.steps = paths[self.correction][1]
        if self.journal.evaluations is None:
            self.journal.evaluations = len(self.journal.accuracies)
        self.journal.save()
        return self.journal.steps

    def _measured(self, network: Subnetwork, rounds: int) -> Optional[float]:
        """Return the measured ms of a network, from the journal if known; None if not measured."""
        known, key = self.journal.measured, network.key()
        if key not in known and rounds:
            known.update(self.measure({key: network.arch}, rounds))
            self.journal.save()
        return known.get(key)

    def measure(self, networks: Mapping[str, Arch], rounds: int) -> Dict[str, float]:
        """Return the measured ms of networks by name; none if the table is of another machine.

        Args:
            rounds: Samples of each network; 0 measures none.
        """
        try:
            times = measure_networks(networks, self.table.header, rounds) if rounds else {}
        except ValueError as error:
            print_log(f'nothing is measured: {error}', logger='current', level=logging.WARNING)
            return {}
        return {name: time.median for name, time in times.items()}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
