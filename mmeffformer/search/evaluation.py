"""Evaluation of sub-networks inside a detector, segmentor or classifier.

Nothing is trained: a sub-network has the supernet's weights. The statistics of BatchNorms are
recomputed for each, because they depend on the layers before them.
"""
import logging
import math
from contextlib import contextmanager
from copy import deepcopy
from itertools import islice
from typing import Callable, Iterator, List, Mapping, Optional

import torch
from mmengine.logging import MMLogger, print_log
from mmengine.runner import Runner, set_random_seed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..utils.modules import unwrap_model
from .subnetwork import Subnetwork
from .supernet import SuperEfficientFormer
from .weights import PaddedBackbone, Ranking, extract, kept_channels, rank_channels

# Main metrics of evaluators; of several the first counts.
METRICS = ('bbox_mAP', 'segm_mAP', 'mIoU', 'accuracy/top1')


class Evaluation:
    """Evaluates sub-networks in the model of a Runner, on its validation split.

    Args:
        runner: The Runner of an mmdet, mmseg or mmpretrain config with a supernet as backbone,
            whose trained weights are loaded.
        metric: Name of the metric that counts, higher is better; None takes the first of
            ``METRICS`` that the evaluator has.
        batches: Number of training batches, for the BatchNorm statistics and the ranking of
            channels.
        seed: Random seed of these batches.

    Attributes:
        metric: The evaluator's full name of the metric; None before the first evaluation.

    Raises:
        ValueError: The backbone is not a supernet, a split is missing, or there are no batches.
    """

    def __init__(self, runner: Runner, metric: Optional[str] = None, batches: int = 8,
                 seed: int = 0):
        self.model = unwrap_model(runner.model)
        self.supernet = getattr(self.model, 'backbone', None)
        if not isinstance(self.supernet, SuperEfficientFormer):
            raise ValueError(f'the backbone is {type(self.supernet).__name__}: expected a config '
                             'with mmeffformer.SuperEfficientFormer, such as those in '
                             'configs/search')
        missing = [name for name in ('train_dataloader', 'val_dataloader', 'val_evaluator')
                   if not runner.cfg.get(name)]
        if missing:
            raise ValueError(f'the config has no {" and no ".join(missing)}: a search evaluates '
                             'on the validation split, with statistics of the training split')
        if batches < 1:
            raise ValueError(f'batches {batches}: expected 1 or more')
        self.metric: Optional[str] = None
        self._wanted, self.seed = metric, seed
        set_random_seed(seed)
        self.batches = list(islice(runner.train_dataloader, batches))
        self.loop = runner.val_loop
        self.ranking: Optional[Ranking] = None

    def rank(self) -> Ranking:
        """Rank the supernet's channels by the training losses, see :func:`rank_channels`."""
        self.model.eval()
        self.ranking = rank_channels(self.supernet, self._losses())
        self.model.zero_grad(set_to_none=True)
        return self.ranking

    def __call__(self, network: Subnetwork) -> float:
        """Return the metric of a sub-network; 0 where the evaluator measures nothing.

        Raises:
            ValueError: The evaluator does not have the metric.
        """
        with self.installed(network) as model, torch.no_grad(), _quiet():
            for batch in self.loop.dataloader:
                self.loop.evaluator.process(data_samples=model.val_step(batch),
                                            data_batch=batch)
            metrics = self.loop.evaluator.evaluate(len(self.loop.dataloader.dataset))
        self.metric = self.metric or _full_name(metrics, self._wanted)
        # mmdet's evaluator measures nothing where nothing is detected.
        accuracy = float(metrics.get(self.metric, math.nan))
        if not math.isfinite(accuracy):
            print_log(f'{network.key()}: no {self.metric}, which counts as 0', logger='current')
            return 0.
        print_log(f'{network.key()}: {self.metric} {accuracy:.4g}', logger='current')
        return accuracy

    @contextmanager
    def installed(self, network: Subnetwork) -> Iterator[nn.Module]:
        """Context manager: yield the model in eval mode, with a sub-network as its backbone.

        The backbone is a :class:`PaddedBackbone`; all BatchNorms have the statistics of the
        training batches. At exit the model gets its supernet and statistics back.
        """
        backbone = PaddedBackbone(extract(self.supernet, network, self.ranking),
                                  kept_channels(network, self.ranking), self.supernet.arch.widths)
        self.model.backbone = backbone.to(memory_format=torch.channels_last)
        norms = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        before = deepcopy([dict(norm.named_buffers()) for norm in norms])
        try:
            self._compute_statistics(norms)
            yield self.model.eval()
        finally:
            self.model.backbone = self.supernet
            for norm, buffers in zip(norms, before):
                for name, buffer in buffers.items():
                    getattr(norm, name).copy_(buffer)

    def _losses(self) -> Iterator[Callable[[], Tensor]]:
        """Yield for each batch a function that computes its loss."""
        for i, batch in enumerate(self.batches):
            set_random_seed(self.seed + i)
            data = self.model.data_preprocessor(batch, training=True)
            yield lambda data=data: self.model.parse_losses(
                self.model(**data, mode='loss'))[0]

    @torch.no_grad()
    def _compute_statistics(self, norms: List[_BatchNorm]) -> None:
        """Set the statistics of BatchNorms to their mean over the training batches."""
        self.model.eval()
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean
            norm.train()
        try:
            for loss in self._losses():
                loss()
        finally:
            for norm, momentum in zip(norms, momenta):
                norm.momentum = momentum


def _full_name(metrics: Mapping[str, float], metric: Optional[str]) -> str:
    """Return the evaluator's name of a metric, or of the first one in ``METRICS``."""
    for name in [metric] if metric else METRICS:
        for key in metrics:
            if key.endswith(name):
                return key
    raise ValueError(f'metric {metric or "(none given)"}: the evaluator measures '
                     f'{", ".join(metrics) or "nothing, as if the supernet detected nothing"}; '
                     'choose one with --metric')


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager: suppress the evaluators' tables in the log."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
