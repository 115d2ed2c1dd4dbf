"""How good networks of a supernet are inside a detector, segmentor or classifier.

Nothing is trained: a network has the supernet's weights, and the statistics of its BatchNorms are
taken anew, since they depend on what is in front of them.
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
from .cut import Ranking, Widened, cut, kept_channels, rank
from .subnetwork import Subnetwork
from .supernet import SuperEfficientFormer

# What evaluators call their main figure; of several the first counts.
METRICS = ('bbox_mAP', 'segm_mAP', 'mIoU', 'accuracy/top1')


class Evaluation:
    """Evaluates networks of the supernet in the model of a Runner, on its validation split.

    Args:
        runner: Of a config of mmdet, mmseg or mmpretrain with a supernet as backbone, whose
            trained weights are loaded.
        metric: Name of the figure that counts, higher is better; None takes the first that the
            evaluator has of ``METRICS``.
        batches: Of the training split, to take the BatchNorms' statistics and to rank channels
            with.
        seed: Of what is random in these.

    Attributes:
        metric: The evaluator's own name of it; None before the first evaluation.

    Raises:
        ValueError: The backbone is no supernet, a split is missing, or there are no batches.
    """

    def __init__(self, runner: Runner, metric: Optional[str] = None, batches: int = 8,
                 seed: int = 0):
        self.model = unwrap_model(runner.model)
        self.supernet = getattr(self.model, 'backbone', None)
        if not isinstance(self.supernet, SuperEfficientFormer):
            raise ValueError(f'the backbone is {type(self.supernet).__name__}: expected a config '
                             'whose backbone is mmeffformer.SuperEfficientFormer, as those in '
                             'configs/search')
        absent = [name for name in ('train_dataloader', 'val_dataloader', 'val_evaluator')
                  if not runner.cfg.get(name)]
        if absent:
            raise ValueError(f'the config has no {" and no ".join(absent)}: a search evaluates on '
                             'the validation split, and takes statistics of the training split')
        if batches < 1:
            raise ValueError(f'batches {batches}: expected 1 or more')
        self.metric: Optional[str] = None
        self._wanted, self.seed = metric, seed
        set_random_seed(seed)
        self.batches = list(islice(runner.train_dataloader, batches))
        self.loop = runner.val_loop
        self.ranking: Optional[Ranking] = None

    def rank(self) -> Ranking:
        """Rank the supernet's channels by the training losses, see :func:`rank`."""
        self.model.eval()
        self.ranking = rank(self.supernet, self._losses())
        self.model.zero_grad(set_to_none=True)
        return self.ranking

    def __call__(self, network: Subnetwork) -> float:
        """Return the metric of a network.

        Raises:
            ValueError: The evaluator has no such metric.
        """
        with self.placed(network) as model, torch.no_grad(), _quiet():
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
    def placed(self, network: Subnetwork) -> Iterator[nn.Module]:
        """Within, the model, which is returned, has a network (:class:`Widened`) as its backbone.

        It is in eval mode, with statistics of its own in all BatchNorms.
        """
        kept = deepcopy([dict(norm.named_buffers()) for norm in self._norms()])
        backbone = Widened(cut(self.supernet, network, self.ranking),
                           kept_channels(network, self.ranking), self.supernet.arch.widths)
        self.model.backbone = backbone.to(memory_format=torch.channels_last)
        try:
            self._take_statistics()
            yield self.model.eval()
        finally:
            self.model.backbone = self.supernet
            for norm, buffers in zip(self._norms(), kept):
                for name, buffer in buffers.items():
                    getattr(norm, name).copy_(buffer)

    def _norms(self) -> List[_BatchNorm]:
        return [module for module in self.model.modules() if isinstance(module, _BatchNorm)]

    def _losses(self) -> Iterator[Callable[[], Tensor]]:
        """Yield a function for each batch, which computes its loss."""
        for i, batch in enumerate(self.batches):
            set_random_seed(self.seed + i)
            data = self.model.data_preprocessor(batch, training=True)
            yield lambda data=data: self.model.parse_losses(
                self.model(**data, mode='loss'))[0]

    @torch.no_grad()
    def _take_statistics(self):
        """Give every BatchNorm the mean statistics of the training batches."""
        self.model.eval()
        momenta = {norm: norm.momentum for norm in self._norms()}
        for norm in momenta:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean
            norm.train()
        try:
            for loss in self._losses():
                loss()
        finally:
            for norm, momentum in momenta.items():
                norm.momentum = momentum


def _full_name(metrics: Mapping[str, float], metric: Optional[str]) -> str:
    """The evaluator's name of a metric, or of the first that counts."""
    for name in [metric] if metric else METRICS:
        for key in metrics:
            if key.endswith(name):
                return key
    raise ValueError(f'metric {metric or "(none given)"}: the evaluator measures '
                     f'{", ".join(metrics) or "nothing, as if the supernet found nothing"}; '
                     'choose one with --metric')


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, evaluators do not print their tables."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
