"""Hooks that make training repeatable and report losses and metrics that are not numbers."""
import math
from typing import Any, Iterator, Set

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook

from ...datasets.repeatable import seed_all
from ...utils.errors import TrainingStopped
from ...utils.registry import HOOKS
from ..checkpoints import describe_resume_point


@HOOKS.register_module()
class SeedHook(Hook):
    """Make the random numbers of an iteration depend on seed, iteration and rank only.

    Where the config asks for deterministic operators, validation may use others: mmseg's metric
    counts with one that has no deterministic kernel on GPUs, and its counts are exact anyway.
    """

    priority = 'VERY_HIGH'  # other hooks may draw random numbers too
    _mode = 0  # of training

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        # The last number separates these seeds from those of the samples.
        seed_all(runner.seed, runner.iter, get_rank(), 1)

    def before_val(self, runner) -> None:
        self._mode = torch.get_deterministic_debug_mode()
        torch.set_deterministic_debug_mode('default')

    def after_val(self, runner) -> None:
        torch.set_deterministic_debug_mode(self._mode)

    before_test, after_test = before_val, after_val


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stop the training where a loss is NaN or infinite.

    Raises:
        TrainingStopped: With the iteration, the losses, the images of this process's batch and
            the last complete checkpoint.
    """

    priority = 'VERY_HIGH'  # before this iteration is logged or saved

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        runner.batch_images = [*_image_paths(data_batch)]  # for the error of another part

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        losses = {name: value for name, value in (outputs or {}).items()
                  if 'loss' in name and isinstance(value, torch.Tensor) and value.numel() == 1}
        finite = [value.isfinite().all() for value in losses.values()]
        # One wait for a GPU, not one per loss.
        if not finite or torch.stack([each.to(finite[0].device) for each in finite]).all():
            return
        values = ', '.join(f'{name} {value.item()}' for name, value in losses.items())
        images = ', '.join(_image_paths(data_batch)) or 'unknown'
        raise TrainingStopped(
            f'at iteration {runner.iter + 1} a loss is not finite: {values}. Images of the batch '
            f'(rank {get_rank()}): {images}. This iteration was not saved; '
            f'{describe_resume_point(runner.work_dir)}. Check the images and their annotations, '
            'clip gradients, and use --resume, which keeps the learning rate. For a lower one, '
            'start a new run from those weights with --cfg-options load_from=FILE')


@HOOKS.register_module()
class MetricHook(Hook):
    """Warn, once of each, of metrics that an evaluator could not compute: -1 or NaN."""

    def __init__(self):
        self._reported: Set[str] = set()

    def after_val_epoch(self, runner, metrics=None) -> None:
        undefined = {name: value for name, value in (metrics or {}).items()
                     if isinstance(value, (int, float)) and (value == -1 or math.isnan(value))
                     and name not in self._reported}
        if undefined:
            self._reported.update(undefined)
            values = ', '.join(f'{name} {value:g}' for name, value in undefined.items())
            runner.logger.warning(
                f'{values}: not measured, since the ground truth has no object or pixel of that '
                'kind (_s, _m and _l: of that size). If that is unexpected, check the '
                'annotations, class names and ids of this split')

    after_test_epoch = after_val_epoch


def _image_paths(batch: Any) -> Iterator[str]:
    """Yield the paths of the images in a batch of any structure."""
    if hasattr(batch, 'img_path'):
        yield str(batch.img_path)
    elif isinstance(batch, (dict, list, tuple)):
        for value in batch.values() if isinstance(batch, dict) else batch:
            yield from _image_paths(value)
