"""A Runner that resumes killed runs exactly.

mmengine resumes weights, optimizer and schedule, but not random numbers. It may leave a checkpoint
half written after it has deleted the previous one.
"""
import os
from functools import partial
from pathlib import Path
from typing import Sequence, Union

from mmengine.dist import all_gather_object, get_rank, get_world_size, master_only
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import IterBasedTrainLoop
from mmengine.runner import Runner as _Runner
from mmengine.runner.base_loop import BaseLoop

from ..datasets import check_data
from ..datasets.repeatable import RepeatableBatches, RepeatableDataset
from ..datasets.traced import ADVICE, TracedDataset
from ..utils.errors import TrainingStopped
from ..utils.files import atomic_write
from ..utils.modules import unwrap_model
from ..utils.registry import RUNNERS
from ..weights.safe_loading import check_finite, read_checkpoint, read_model
from . import mmengine_internals as internals
from .checkpoints import describe_resume_point, is_local, newest_checkpoint, stop_if_not_writable
from .hooks import (
    CheckpointHook,
    EarlyStoppingHook,
    FiniteLossHook,
    MetricHook,
    ResumeHook,
    SeedHook,
)
from .launch import init_worker


@RUNNERS.register_module()
class Runner(_Runner):
    """mmengine's Runner with repeatable training and complete checkpoints.

    - Random numbers depend on seed and position only: those of a sample's augmentation on its
      position in the order of samples, those of the network on iteration and rank. A resumed run
      ends with exactly the weights of an uninterrupted one, and several processes have the
      samples of one process with the larger batch.
    - A checkpoint is written under another name and then renamed. Only then is the previous one
      deleted. Weights that are not finite are never saved.
    - ``resume=True`` without ``load_from`` resumes from the newest complete checkpoint
      (:func:`newest_checkpoint`) and takes the seed of the run from it.

    This project's tools use this Runner. The tools of mmdet and mmseg use it with
    ``runner_type='mmeffformer.Runner'`` in the config. It calls :func:`patch_mmengine`.
    """

    _resumed_iters = 0  # iterations in the checkpoint that is resumed
    batch_images: Sequence[str] = ()  # of the iteration that runs
    _save_verified = False  # whether a checkpoint of this run was read back

    @classmethod
    def from_cfg(cls, cfg):
        """Build a runner from a config.

        Raises:
            ValueError: There are checkpoints to resume from and all are incomplete, or the one
                named cannot be resumed.
            TrainingStopped: Processes on several machines would resume different checkpoints.
        """
        cfg, meta = cfg.copy(), {}
        if cfg.get('resume'):
            cfg['load_from'] = cfg.get('load_from') or newest_checkpoint(cfg['work_dir'])
            if cfg['load_from']:
                meta = _read_resume_meta(cfg['load_from'])
        if meta.get('seed') is not None:  # needed before the order of samples is drawn
            cfg['randomness'] = dict(cfg.get('randomness') or {}, seed=meta['seed'])
        runner = super().from_cfg(cfg)
        runner._resumed_iters = meta.get('iter', 0)
        return runner

    def setup_env(self, env_cfg):
        internals.patch_mmengine()
        super().setup_env(env_cfg)
        internals.create_temp_dir()
        # Checked before any random number is drawn: processes that disagree wait for each other.
        given = self.cfg.get('load_from') if self.cfg.get('resume') else ''
        found = {*all_gather_object(Path(given or 'none').name)}
        if len(found) > 1:
            raise TrainingStopped(
                f'the processes would resume different checkpoints: {", ".join(sorted(found))}. '
                'All machines must see the same work dir')

    def set_randomness(self, seed, diff_rank_seed=False, deterministic=False):
        """Set the seed, and with ``deterministic`` also what cuBLAS needs for it on GPUs."""
        if deterministic:
            os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        super().set_randomness(seed, diff_rank_seed, deterministic)

    def register_hooks(self, default_hooks=None, custom_hooks=None):
        super().register_hooks(default_hooks, custom_hooks)
        for hook in (SeedHook(), FiniteLossHook(), MetricHook(), ResumeHook()):
            self.register_hook(hook)

    def register_hook(self, hook, priority=None):
        """Register a hook; of mmengine's hooks in a config, this project's are registered."""
        super().register_hook(_safe_hook(hook), priority)

    def train(self):
        """Train the model; an error of any part is logged with the images of its batch."""
        try:
            return super().train()
        except TrainingStopped:
            raise
        except Exception:
            if self.batch_images:
                self.logger.error(f'iteration {self.iter + 1} failed on the images '
                                  f'{", ".join(self.batch_images)}')
            raise

    def check_data(self, splits: Sequence[str], limit: int = 200) -> None:
        """Check the data sets that this runner will use: :func:`mmeffformer.datasets.check_data`.

        Args:
            splits: Of 'train', 'val' and 'test'.
            limit: Number of samples of each.

        Raises:
            ValueError: Training or evaluation would fail, or be wrong.
        """
        report = check_data(
            self.cfg, splits, limit, workers=1, model=unwrap_model(self.model),
            loaders=dict(train=lambda: self.train_loop.dataloader,
                         val=lambda: self.val_loop.dataloader,
                         test=lambda: self.test_loop.dataloader))
        for text in report.notes:
            self.logger.info(text)
        for text in report.warnings:
            self.logger.warning(text)
        if report.errors:
            raise ValueError('\n'.join([
                'the data of this config cannot be used:',
                *(f'- {text}' for text in report.errors),
                f'{ADVICE}; --no-check leaves this check out']))

    @staticmethod
    def build_dataloader(dataloader, seed=None, diff_rank_seed=False):
        loader = _Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        if not isinstance(loader.dataset, TracedDataset):
            internals.set_loader_parts(
                loader, dataset=RepeatableDataset(loader.dataset),
                worker_init_fn=partial(init_worker, loader.worker_init_fn))
        return loader

    def build_train_loop(self, loop: Union[BaseLoop, dict]) -> BaseLoop:
        """Build the training loop, whose loader has :class:`RepeatableBatches`."""
        cfg = internals.train_dataloader_cfg(self)
        if not (isinstance(cfg, dict) and isinstance(loop, dict)):
            return super().build_train_loop(loop)
        loader = self.build_dataloader(cfg, self.seed, internals.diff_rank_seed(self))
        by_iteration = (loop.get('type') in ('IterBasedTrainLoop', IterBasedTrainLoop)
                        or not loop.get('by_epoch', True))
        # A loop of epochs resumes at the start of an epoch. A sampler with epochs in a loop of
        # iterations is left to mmengine, which takes the earlier batches again.
        skips = by_iteration and not loop.get('fast_forward_on_resume') and not hasattr(
            loader.batch_sampler.sampler, 'epoch')
        start = self._resumed_iters if skips else 0
        internals.set_loader_parts(loader, batch_sampler=RepeatableBatches(
            loader.batch_sampler, self.seed, get_rank(), get_world_size(), start))
        with internals.train_dataloader(self, loader):
            loop = super().build_train_loop(loop)
        if start:
            loop.dataloader_iterator = internals.SkippedIterator(loop.dataloader_iterator, start)
        return loop

    def resume(self, filename, *args, **kwargs):
        """Resume a run from a checkpoint.

        Raises:
            TrainingStopped: The optimizer or the schedule of the checkpoint is not the config's.
        """
        try:
            super().resume(filename, *args, **kwargs)
            wrapper = self.optim_wrapper
            for part in wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]:
                # torch loads the groups of another optimizer, which lack what this one needs.
                missing = {*part.optimizer.defaults} - {*part.param_groups[0]}
                if missing:
                    raise ValueError(f'its optimizer has no {", ".join(sorted(missing))}, which '
                                     f'{type(part.optimizer).__name__} needs')
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise TrainingStopped(
                f'{filename} cannot be resumed with this config: {type(error).__name__}: {error}. '
                'Expected the optimizer, the schedule and the hooks that it was saved with. To '
                f'start a new run from its weights, use --cfg-options load_from={filename}'
            ) from error

    @master_only
    def save_checkpoint(self, out_dir, filename, file_client_args=None, *args, **kwargs):
        """Save a checkpoint, to a local folder atomically.

        Raises:
            TrainingStopped: It cannot be written, or has weights that are not finite.
        """
        path = Path(out_dir) / filename
        model = unwrap_model(self.model)
        try:
            check_finite(model.state_dict(), path, model)
            if not is_local(out_dir, file_client_args, kwargs.get('backend_args')):
                super().save_checkpoint(out_dir, filename, file_client_args, *args, **kwargs)
                return
            with stop_if_not_writable(path, self.work_dir), atomic_write(path) as tmp_path:
                super().save_checkpoint(str(out_dir), tmp_path.name, file_client_args, *args,
                                        **kwargs)
                if not self._save_verified:  # otherwise a resume would be the first to notice
                    read_checkpoint(tmp_path)
                    self._save_verified = True
        except ValueError as error:
            raise TrainingStopped(
                f'at iteration {self.iter + 1}: {error}. The checkpoint is not written; '
                f'{describe_resume_point(self.work_dir)}') from error


def _safe_hook(hook: Union[None, dict, Hook]) -> Union[None, dict, Hook]:
    """Replace the type of mmengine's hook in a config by this project's hook of that name."""
    for safe in (CheckpointHook, EarlyStoppingHook):
        name, original = safe.__name__, safe.__base__
        if isinstance(hook, dict) and hook.get('type') in (name, f'mmengine.{name}', original):
            return dict(hook, type=f'mmeffformer.{name}')
    return hook


def _read_resume_meta(path: str) -> dict:
    """Return ``meta`` of a checkpoint.

    Raises:
        ValueError: The checkpoint cannot be resumed.
    """
    checkpoint = read_model(path)
    check_finite(checkpoint, path)
    meta = checkpoint.get('meta')
    if (not isinstance(meta, dict) or not isinstance(checkpoint.get('message_hub'), dict)
            or not {'optimizer', 'param_schedulers'} & {*checkpoint}
            or not all(isinstance(number, int) and number >= 0 for number in (
                meta.get('iter'), meta.get('epoch'), meta.get('validated', 0)))
            or not isinstance(meta.get('seed', 0), int)):
        raise ValueError(
            f'{path} cannot be resumed: it has weights, but not the iteration, the optimizer and '
            'the schedule of a run (best_*.pth has not). To start a new run from its weights, use '
            f'--cfg-options load_from={path}')
    return meta
