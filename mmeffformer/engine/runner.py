"""A Runner whose trainings can be killed at any moment and go on as if nothing had happened.

mmengine resumes weights, optimizer and schedule, but not what is drawn at random; a checkpoint
can be left half written, and the one before it is removed first.
"""
from pathlib import Path
from typing import Union

from mmengine.dist import all_gather_object, get_rank, get_world_size, master_only
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import IterBasedTrainLoop
from mmengine.runner import Runner as _Runner
from torch.utils.data import DataLoader

from ..datasets.guarded import GuardedDataset
from ..datasets.repeatable import Batches, RepeatableDataset
from ..utils.errors import TrainingStopped
from ..utils.files import atomic_write
from ..utils.modules import unwrap_model
from ..utils.registry import RUNNERS
from ..weights.safe_loading import check_finite, read_checkpoint, read_model
from .checkpoints import describe_resume_point, newest_checkpoint
from .hooks import FiniteLossHook, SeedHook
from .launch import Sharding


@RUNNERS.register_module()
class Runner(Sharding, _Runner):
    """mmengine's Runner, where a training is repeatable and its checkpoints are whole.

    - What is drawn at random depends on seed and position alone: the augmentation of a sample
      on its place in the order of samples, what the network draws on iteration and rank. A
      training that was resumed ends, bit by bit, with the weights it would have had anyway,
      and the samples of several processes are those of one with their batches together.
    - A checkpoint is written beside its place and then renamed, and only then is the one
      before it removed. Weights that are not finite are never saved.
    - ``resume=True`` without ``load_from`` goes on from the newest whole checkpoint
      (:func:`newest_checkpoint`), and takes the seed of the one it goes on from.

    This project's tools use it; mmdet's and mmseg's do with ``runner_type='mmeffformer.Runner'``
    in the config.
    """

    _done = 0  # iterations that the training resumed has had
    _saved = False  # whether a checkpoint of it could be read again

    @classmethod
    def from_cfg(cls, cfg):
        """As mmengine's.

        Raises:
            ValueError: There are checkpoints to resume from, and none is whole, or the one named
                is not of a training.
            TrainingStopped: Processes on several machines would go on from different ones.
        """
        cfg, meta = cfg.copy(), {}
        if cfg.get('resume'):
            cfg['load_from'] = cfg.get('load_from') or newest_checkpoint(cfg['work_dir'])
            if cfg['load_from']:
                meta = _meta_to_resume(cfg['load_from'])
        if meta.get('seed') is not None:  # before the order of the samples is drawn
            cfg['randomness'] = dict(cfg.get('randomness') or {}, seed=meta['seed'])
        runner = super().from_cfg(cfg)
        runner._done = meta.get('iter', 0)
        return runner

    def setup_env(self, env_cfg):
        super().setup_env(env_cfg)
        # Before anything is drawn: processes that disagree would wait for each other for ever.
        given = self.cfg.get('load_from') if self.cfg.get('resume') else ''
        found = {*all_gather_object(Path(given or 'none').name)}
        if len(found) > 1:
            raise TrainingStopped(
                'the processes would go on from different checkpoints: '
                f'{", ".join(sorted(found))}. All machines have to see the same work dir')

    def register_hooks(self, default_hooks=None, custom_hooks=None):
        default_hooks = dict(default_hooks or {})
        default_hooks.setdefault('checkpoint', dict(type='CheckpointHook', interval=1))
        super().register_hooks({name: _ours(hook) for name, hook in default_hooks.items()},
                               [*map(_ours, custom_hooks or [])])
        self.register_hook(SeedHook())
        self.register_hook(FiniteLossHook())

    @staticmethod
    def build_dataloader(dataloader, seed=None, diff_rank_seed=False):
        loader = _Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        if not isinstance(loader.dataset, GuardedDataset):
            replace(loader, dataset=RepeatableDataset(loader.dataset))
        return loader

    def resume(self, filename, *args, **kwargs):
        """As mmengine's.

        Raises:
            TrainingStopped: The checkpoint is of another optimizer or schedule than the config.
        """
        try:
            super().resume(filename, *args, **kwargs)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise TrainingStopped(
                f'the training in {filename} cannot be gone on with by this config: '
                f'{type(error).__name__}: {error}. Expected the optimizer, the schedule and the '
                'hooks that it was saved with; to start anew from its weights, use --cfg-options '
                f'load_from={filename}') from error
        wrappers = self.optim_wrapper
        for wrapper in wrappers.values() if isinstance(wrappers, OptimWrapperDict) else [wrappers]:
            lacking = {*wrapper.optimizer.defaults} - {*wrapper.param_groups[0]}
            if lacking:
                raise TrainingStopped(
                    f'{filename} was trained with another optimizer: it has no '
                    f'{", ".join(sorted(lacking))}, which {type(wrapper.optimizer).__name__} '
                    'needs. To start anew from its weights, use --cfg-options '
                    f'load_from={filename}')

    def build_train_loop(self, loop):
        cfg = self._train_dataloader
        if isinstance(cfg, dict) and isinstance(loop, dict):
            # A loop of epochs goes on from the start of one.
            passes_over = not loop.get('fast_forward_on_resume') and (
                loop.get('type') in ('IterBasedTrainLoop', IterBasedTrainLoop)
                or not loop.get('by_epoch', True))
            loader = self.build_dataloader(
                cfg, self.seed, self._randomness_cfg.get('diff_rank_seed', False))
            batches = Batches(loader.batch_sampler, self.seed, get_rank(), get_world_size(),
                              self._done if passes_over else 0)
            self._train_dataloader = replace(loader, sampler=batches, batch_sampler=batches)
        try:
            return super().build_train_loop(loop)
        finally:
            self._train_dataloader = cfg  # others read its batch size

    def save_checkpoint(self, *args, save_optimizer=True, **kwargs):
        """As mmengine's, whole or not at all.

        Raises:
            TrainingStopped: It cannot be written, or holds weights that are not finite.
        """
        with self.gathered(optimizer=save_optimizer):
            self._save_checkpoint(*args, save_optimizer=save_optimizer, **kwargs)

    @master_only
    def _save_checkpoint(self, out_dir, filename, *args, **kwargs):
        if '://' in str(out_dir):  # of another backend, which cannot rename
            super().save_checkpoint(out_dir, filename, *args, **kwargs)
            return
        path = Path(out_dir) / filename
        model = unwrap_model(self.model)
        try:
            check_finite(model.state_dict(), path, model)
            with atomic_write(path) as tmp_path:
                super().save_checkpoint(str(out_dir), tmp_path.name, *args, **kwargs)
                if not self._saved:  # else it would be found out only when it is needed
                    read_checkpoint(tmp_path)
                    self._saved = True
        except ValueError as error:
            raise TrainingStopped(
                f'at iteration {self.iter + 1}: {error}. So it is not written; '
                f'{describe_resume_point(self.work_dir)}') from error
        except OSError as error:
            raise TrainingStopped(
                f'{path} could not be written: {error.strerror or error}. Mend that and go on '
                f'with --resume; {describe_resume_point(self.work_dir)}') from error


def _ours(hook: Union[None, dict, Hook]) -> Union[None, dict, Hook]:
    """Return the config of our hook for that of the one of mmengine that it improves on."""
    for kind in (CheckpointHook, EarlyStoppingHook):
        name = kind.__name__
        if isinstance(hook, dict) and hook.get('type') in (name, f'mmengine.{name}', kind):
            return dict(hook, type=f'mmeffformer.{name}')
    return hook


def _meta_to_resume(path: str) -> dict:
    """Return what a checkpoint tells of its training.

    Raises:
        ValueError: It is not one that a training can go on from.
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
            f'{path} holds weights, but not how far a training has come, its optimizer and its '
            'schedule, as best_*.pth do not: a training cannot go on from it. To start a new one '
            f'with these weights, use --cfg-options load_from={path}')
    return meta


def replace(loader: DataLoader, **parts) -> DataLoader:
    """Replace parts of a loader that has not been used yet.

    torch forbids it, for what was derived from them; here, all stays as it was derived.
    """
    for name, part in parts.items():
        object.__setattr__(loader, name, part)
    return loader
