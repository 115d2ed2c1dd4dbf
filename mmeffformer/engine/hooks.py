"""What a Runner can be told to do: for speed, with results that stay the same to rounding, while a
supernet is trained, and (our Runner always does) to lose nothing of a training."""
import math
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Union

import torch
from mmengine.dist import broadcast, broadcast_object_list, get_rank, is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook as _CheckpointHook
from mmengine.hooks import EarlyStoppingHook as _EarlyStoppingHook
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from mmengine.runner.base_loop import BaseLoop

from ..datasets.repeatable import seed_all
from ..models.fuse import fuse
from ..utils.errors import TrainingStopped
from ..utils.files import TMP_PREFIX, atomic_write
from ..utils.modules import unwrap_model
from ..utils.registry import HOOKS
from .checkpoints import checkpoints, describe_resume_point
from .launch import FullyShardedDataParallel


@HOOKS.register_module()
class SpeedHook(Hook):
    """Chooses the memory format, and compiles, before training or testing.

    Args:
        channels_last: Keep the channels of a pixel side by side in memory, which
            convolutions on CPUs, and mixed precision on GPUs, work best with.
        compile: torch.compile the backbone and the neck: True, or a dict of its
            arguments. The heads, whose sizes change with what is found, stay as they
            are. Each new image size is compiled anew, unless ``dict(dynamic=True)``.
    """

    def __init__(self, channels_last: bool = False, compile: Union[bool, dict] = False):
        self.channels_last, self.compile = channels_last, compile

    def before_run(self, runner):
        model = unwrap_model(runner.model)
        if self.channels_last and isinstance(runner.model, FullyShardedDataParallel):
            raise TrainingStopped('channels_last=True of SpeedHook: weights that are divided have '
                                  'no memory format; set default_hooks.speed.channels_last=False')
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        if self.compile is not False:
            options = {} if self.compile is True else self.compile
            for part in (getattr(model, 'backbone', None), getattr(model, 'neck', None)):
                if part is not None:
                    part.compile(**options)


@HOOKS.register_module()
class DeployHook(Hook):
    """Fuses the model before it is tested (:func:`fuse`)."""

    def before_test(self, runner):
        fuse(unwrap_model(runner.model))


@HOOKS.register_module()
class TemperatureHook(Hook):
    """Lowers the temperature of a supernet's mixtures while it is trained, geometrically.

    At first every branch of a path is trained by every batch, at last nearly one at a time,
    which is what a network that is chosen later does (Jang et al., Categorical
    Reparameterization with Gumbel-Softmax, 2017, lower it so too).

    Args:
        start, end: Temperature at the first and the last iteration.
    """

    def __init__(self, start: float = 1., end: float = 0.1):
        if not 0 < end <= start:
            raise ValueError(f'temperatures from {start!r} to {end!r}: expected 0 < end <= start')
        self.start, self.end = start, end

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        done = runner.iter / max(1, runner.max_iters - 1)
        temperature = self.start * (self.end / self.start) ** done
        unwrap_model(runner.model).backbone.set_temperature(temperature)


@HOOKS.register_module()
class SeedHook(Hook):
    """Makes what an iteration draws at random depend on seed, iteration and rank alone."""

    priority = 'VERY_HIGH'  # other hooks may draw too

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        # The last number keeps this apart from the seeds of samples.
        seed_all(runner.seed, runner.iter, get_rank(), 1)


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stops the training where a loss is NaN or infinite.

    Raises:
        TrainingStopped: With the iteration, the losses, the images of this process's
            batch and the last good checkpoint.
    """

    priority = 'VERY_HIGH'  # before anything of this iteration is logged or saved

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        losses = {name: value.item() for name, value in (outputs or {}).items()
                  if 'loss' in name and isinstance(value, torch.Tensor) and value.numel() == 1}
        if all(map(math.isfinite, losses.values())):
            return
        told = ', '.join(f'{name} {value}' for name, value in losses.items())
        images = ', '.join(_images(data_batch)) or 'unknown'
        raise TrainingStopped(
            f'at iteration {runner.iter + 1} a loss is not finite: {told}. Images of the batch '
            f'(rank {get_rank()}): {images}. Nothing was saved since; '
            f'{describe_resume_point(runner.work_dir)}. Look at the images and their annotations, '
            'clip gradients and --resume, which keeps the learning rate; for a lower one start '
            'from those weights with --cfg-options load_from=FILE')


def _images(batch: Any) -> Iterator[str]:
    """The paths of the images in a batch of whatever form."""
    if hasattr(batch, 'img_path'):
        yield str(batch.img_path)
    elif isinstance(batch, dict):
        for value in batch.values():
            yield from _images(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _images(value)


@HOOKS.register_module()
class CheckpointHook(_CheckpointHook):
    """mmengine's, which removes a checkpoint only when what takes its place is there.

    A training that was killed while it was validated is validated when it goes on, and so is
    one where the checkpoint lacks what the validation decided on its schedule or its end.
    Several processes validate the network that is saved.
    """

    _decided = 0  # the last validation whose decisions are in what is saved

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args:  # which mmengine finds out when it saves the first one
            raise ValueError(f'CheckpointHook has no argument {", ".join(self.args)}')

    def before_train(self, runner):
        info = runner.message_hub.runtime_info
        if 'keep_ckpt_ids' in info:  # parts of names of files to be removed
            info['keep_ckpt_ids'] = [i for i in info['keep_ckpt_ids'] if isinstance(i, int)]
        super().before_train(runner)
        if isinstance(self.file_backend, LocalBackend):
            self.file_backend = _RemovingLater(self.out_dir)
            # A checkpoint says which file is the best: another training's, or a lie. Its like in
            # this one's folder is replaced, nothing elsewhere.
            self.best_ckpt_path = self._here(getattr(self, 'best_ckpt_path', None))
            self.best_ckpt_path_dict = {key: self._here(path) for key, path in getattr(
                self, 'best_ckpt_path_dict', {}).items()}
            if is_main_process():  # what was being written when the training was killed
                with _written(runner):
                    for tmp_path in Path(self.out_dir).glob(f'{TMP_PREFIX}*.pth'):
                        tmp_path.unlink(missing_ok=True)
        if not runner.iter and is_main_process():
            self._validated(runner).unlink(missing_ok=True)
            if old := checkpoints(runner.work_dir):
                runner.logger.warning(
                    f'{runner.work_dir} has checkpoints of a training before, {old[0].name} for '
                    'one; give each training a --work-dir of its own')
        due = [bool(runner.iter) and self._lacks_validation(runner)]
        broadcast_object_list(due)  # other machines may not see the work dir of the first
        if due[0]:
            runner.logger.info('The validation that the checkpoint was to have is made up for')
            runner.val_loop.run()

    def before_val_epoch(self, runner):
        # Each process has BatchNorm statistics of its own; those of the first are saved.
        for buffer in unwrap_model(runner.model).buffers():
            broadcast(buffer)

    def after_val_epoch(self, runner, metrics):
        if not _trains(runner):
            return
        self._decided = _step(runner.train_loop)
        super().after_val_epoch(runner, metrics)
        if is_main_process():
            with _written(runner), atomic_write(self._validated(runner)) as tmp_path:
                tmp_path.write_text(str(self._decided))

    def after_load_checkpoint(self, runner, checkpoint):
        if runner._resume:
            self._decided = int(checkpoint['meta'].get('validated', 0))

    def before_save_checkpoint(self, runner, checkpoint):
        checkpoint['meta']['validated'] = self._decided
        # Functions, as OneCycleLR's, are code, which is not read again; schedulers have their own.
        for state in _all(checkpoint.get('param_schedulers')):
            for key in [key for key, value in state.items() if callable(value)]:
                del state[key]

    def _save_checkpoint_with_step(self, runner, step, meta):
        with _written(runner):  # the record, last_checkpoint
            super()._save_checkpoint_with_step(runner, step, meta)
        self._remove_replaced()

    def _save_best_checkpoint(self, runner, metrics):
        super()._save_best_checkpoint(runner, metrics)
        self._remove_replaced()

    def _remove_replaced(self):
        if isinstance(self.file_backend, _RemovingLater):
            self.file_backend.remove_now()

    def _here(self, path: Optional[str]) -> Optional[str]:
        return path and str(Path(self.out_dir, Path(path).name))

    @staticmethod
    def _validated(runner) -> Path:
        """The file that says up to where the training was validated."""
        return Path(runner.work_dir) / 'last_validation'

    def _lacks_validation(self, runner) -> bool:
        loop, path = runner.train_loop, self._validated(runner)
        step = _step(loop)
        if not isinstance(loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):
            return False  # which says itself when it validates
        loop._decide_current_val_interval()  # by dynamic_intervals
        if runner.val_loop is None or step < loop.val_begin:
            return False
        last = loop.max_epochs if isinstance(loop, EpochBasedTrainLoop) else loop.max_iters
        if step < last and _validation_decides(runner):
            done = self._decided
        else:
            done = path.is_file() and _number(path.read_text(errors='replace'))
        if done >= step:
            return False
        return step % loop.val_interval == 0 or step == last


@HOOKS.register_module()
class EarlyStoppingHook(_EarlyStoppingHook):
    """mmengine's, which counts on from where it was when a training goes on."""

    priority = 'LOW'  # before the checkpoint is saved anew, as the best one

    def before_run(self, runner):
        """Nothing; mmengine's makes the loop of training, even where only testing is wanted."""

    def after_val_epoch(self, runner, metrics):
        if _trains(runner):
            super().after_val_epoch(runner, metrics)

    def before_save_checkpoint(self, runner, checkpoint):
        checkpoint.setdefault('early_stopping', {})[self._name] = [
            self.wait_count, float(self.best_score), runner.train_loop.stop_training]

    def after_load_checkpoint(self, runner, checkpoint):
        states = checkpoint.get('early_stopping', {})
        if runner._resume and _trains(runner) and self._name in states:
            count, best, stop = states[self._name]
            self.wait_count, self.best_score = int(count), float(best)
            runner.train_loop.stop_training |= bool(stop)

    @property
    def _name(self) -> str:  # there may be several
        return f'{self.monitor} {self.rule}'


@contextmanager
def _written(runner):
    """Within, stop the training with one message where its work dir cannot be written to."""
    try:
        yield
    except OSError as error:
        raise TrainingStopped(
            f'{runner.work_dir} could not be written to: {error.strerror or error}. Mend that and '
            f'go on with --resume; {describe_resume_point(runner.work_dir)}') from error


def _trains(runner) -> bool:
    """Whether this is a training, rather than ``Runner.val()`` or ``Runner.test()``."""
    return isinstance(runner._train_loop, BaseLoop)


def _step(loop: BaseLoop) -> int:
    """How far a training has come, in what its checkpoints and validations are counted in."""
    return loop.epoch if isinstance(loop, EpochBasedTrainLoop) else loop.iter


def _all(schedulers: Union[None, list, Dict[str, list]]) -> list:
    """Those of all optimizers, which are a list for one and a dict of lists for several."""
    return sum(schedulers.values(), []) if isinstance(schedulers, dict) else schedulers or []


def _validation_decides(runner) -> bool:
    """Whether validations change the training, so that a checkpoint before one lacks that."""
    return any(getattr(scheduler, 'need_val_args', False)
               for scheduler in _all(runner.param_schedulers)) or any(
                   isinstance(hook, _EarlyStoppingHook) for hook in runner.hooks)


def _number(text: str) -> int:
    return int(text) if text.strip().isdecimal() else 0


class _RemovingLater(LocalBackend):
    """A folder of checkpoints, out of which files are removed when :meth:`remove_now` says so.

    Nothing else is removed: what is to be is read from checkpoints.
    """

    def __init__(self, folder: str):
        self._folder, self._waiting = Path(folder).resolve(), {}

    def remove(self, filepath):
        path = Path(filepath).resolve()
        if path.parent == self._folder and path.suffix == '.pth':
            self._waiting[filepath] = path.stat().st_ino

    def rmtree(self, dir_path):
        """Leave folders alone: a Runner of ours saves files, so none is a checkpoint of its."""

    def remove_now(self):
        for path, inode in self._waiting.items():
            # What has the same name by now is the new one.
            if Path(path).exists() and Path(path).stat().st_ino == inode:
                super().remove(path)
        self._waiting.clear()
