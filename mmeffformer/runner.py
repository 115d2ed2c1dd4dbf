"""A Runner whose trainings can be killed at any moment and go on as if nothing had happened.

mmengine resumes weights, optimizer and schedule, but not what is drawn at random; a checkpoint
can be left half written, and the one before it is removed first.
"""
from pathlib import Path

from mmengine.dist import get_rank, get_world_size, master_only
from mmengine.runner import Runner as _Runner
from torch.utils.data import DataLoader

from .checkpoints import last_good, newest_checkpoint
from .datasets.guarded import GuardedDataset
from .datasets.repeatable import Batches, RepeatableDataset
from .errors import TrainingStopped
from .files import replacing
from .hooks import FiniteLossHook, SeedHook, bare
from .parallel import Sharding
from .registry import RUNNERS
from .weights.fit import read_model


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

    @classmethod
    def from_cfg(cls, cfg):
        """As mmengine's.

        Raises:
            ValueError: There are checkpoints to resume from, and none is whole.
        """
        cfg, meta = cfg.copy(), {}
        if cfg.get('resume'):
            cfg['load_from'] = cfg.get('load_from') or newest_checkpoint(cfg['work_dir'])
            if cfg['load_from']:
                meta = read_model(cfg['load_from']).get('meta') or {}
        if meta.get('seed') is not None:  # before the order of the samples is drawn
            cfg['randomness'] = dict(cfg.get('randomness') or {}, seed=meta['seed'])
        runner = super().from_cfg(cfg)
        runner._done = meta.get('iter', 0)
        return runner

    def register_hooks(self, default_hooks=None, custom_hooks=None):
        default_hooks = dict(default_hooks or {})
        saving = default_hooks.get('checkpoint', dict(type='CheckpointHook', interval=1))
        if isinstance(saving, dict) and saving.get('type') == 'CheckpointHook':
            default_hooks['checkpoint'] = dict(saving, type='mmeffformer.CheckpointHook')
        super().register_hooks(default_hooks, custom_hooks)
        self.register_hook(SeedHook())
        self.register_hook(FiniteLossHook())

    @staticmethod
    def build_dataloader(dataloader, seed=None, diff_rank_seed=False):
        loader = _Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        if not isinstance(loader.dataset, GuardedDataset):
            replace(loader, dataset=RepeatableDataset(loader.dataset))
        return loader

    def build_train_loop(self, loop):
        cfg = self._train_dataloader
        if isinstance(cfg, dict) and isinstance(loop, dict):
            # A loop of epochs goes on from the start of one.
            by_iter = loop.get('type') == 'IterBasedTrainLoop' or not loop.get('by_epoch', True)
            loader = self.build_dataloader(
                cfg, self.seed, self._randomness_cfg.get('diff_rank_seed', False))
            batches = Batches(loader.batch_sampler, self.seed, get_rank(), get_world_size(),
                              self._done if by_iter else 0)
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
        broken = [key for key, value in bare(self.model).state_dict().items()
                  if not value.isfinite().all()]
        if broken:
            raise TrainingStopped(
                f'{len(broken)} tensors have values that are NaN or infinite at iteration '
                f'{self.iter + 1}, first {broken[0]}, so {path} is not written; '
                f'{last_good(self.work_dir)}')
        try:
            with replacing(path) as half:
                super().save_checkpoint(str(out_dir), half.name, *args, **kwargs)
        except OSError as error:
            raise TrainingStopped(
                f'{path} could not be written: {error.strerror or error}. Mend that and go on '
                f'with --resume; {last_good(self.work_dir)}') from error


def replace(loader: DataLoader, **parts) -> DataLoader:
    """Replace parts of a loader that has not been used yet.

    torch forbids it, for what was derived from them; here, all stays as it was derived.
    """
    for name, part in parts.items():
        object.__setattr__(loader, name, part)
    return loader
