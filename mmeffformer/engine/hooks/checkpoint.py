"""mmengine's hooks for checkpoints and early stopping, safe against a kill at any moment."""
from pathlib import Path
from typing import Dict, Optional, Union

from mmengine.dist import broadcast, broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook as _CheckpointHook
from mmengine.hooks import EarlyStoppingHook as _EarlyStoppingHook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from mmengine.runner.base_loop import BaseLoop

from ...utils.files import TMP_PREFIX, atomic_write
from ...utils.modules import unwrap_model
from ...utils.registry import HOOKS
from ..checkpoints import checkpoints, is_local, stop_if_not_writable
from ..mmengine_internals import is_resuming, is_training, update_val_interval


@HOOKS.register_module()
class CheckpointHook(_CheckpointHook):
    """mmengine's CheckpointHook, which deletes a checkpoint only after its successor exists.

    A resumed run repeats the validation that was interrupted, or whose effect on the schedule or
    on early stopping the checkpoint lacks. Several processes validate the network that is saved.
    """

    _validated_step = 0  # of the last validation whose effects the next checkpoint has

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args:  # mmengine would fail at the first checkpoint
            raise ValueError(f'CheckpointHook has no argument {", ".join(self.args)}')

    def before_train(self, runner) -> None:
        info = runner.message_hub.runtime_info
        if 'keep_ckpt_ids' in info:  # parts of names of files to delete
            info['keep_ckpt_ids'] = [i for i in info['keep_ckpt_ids'] if isinstance(i, int)]
        super().before_train(runner)
        if is_local(self.out_dir, self.file_client_args, self.backend_args):
            self._defer_deletion(runner)
        if not runner.iter and is_main_process():
            self._validation_record(runner).unlink(missing_ok=True)
            if old := checkpoints(runner.work_dir):
                runner.logger.warning(
                    f'{runner.work_dir} already has checkpoints of another run, such as '
                    f'{old[0].name}; use a separate --work-dir for each run')
        due = [bool(runner.iter) and self._lacks_validation(runner)]
        broadcast_object_list(due)  # only the main process may see the work dir
        if due[0]:
            runner.logger.info('Running the validation that the resumed checkpoint lacks')
            runner.val_loop.run()

    def _defer_deletion(self, runner) -> None:
        self.file_backend = DeferredDeletion(self.out_dir)
        # The path of the best checkpoint comes from the resumed file, which may be anybody's.
        # Only a file of that name in the folder of this run may be replaced.
        self.best_ckpt_path = self._in_out_dir(getattr(self, 'best_ckpt_path', None))
        self.best_ckpt_path_dict = {key: self._in_out_dir(path) for key, path in getattr(
            self, 'best_ckpt_path_dict', {}).items()}
        if is_main_process():
            with stop_if_not_writable(runner.work_dir, runner.work_dir):
                for tmp_path in Path(self.out_dir).glob(f'{TMP_PREFIX}*.pth'):  # of a killed run
                    tmp_path.unlink(missing_ok=True)

    def before_val_epoch(self, runner) -> None:
        # Each process has its own BatchNorm statistics; those of the first process are saved.
        for buffer in unwrap_model(runner.model).buffers():
            broadcast(buffer)

    def after_val_epoch(self, runner, metrics) -> None:
        if not is_training(runner):
            return
        self._validated_step = _current_step(runner.train_loop)
        super().after_val_epoch(runner, metrics)
        if is_main_process():
            record = self._validation_record(runner)
            with stop_if_not_writable(record, runner.work_dir), atomic_write(record) as tmp_path:
                tmp_path.write_text(str(self._validated_step))

    def after_load_checkpoint(self, runner, checkpoint) -> None:
        if is_resuming(runner):
            self._validated_step = int(checkpoint['meta'].get('validated', 0))

    def before_save_checkpoint(self, runner, checkpoint) -> None:
        checkpoint['meta']['validated'] = self._validated_step
        # Functions, such as OneCycleLR's, are code, which the safe reader refuses. A new
        # scheduler brings its own.
        for state in flatten_schedulers(checkpoint.get('param_schedulers')):
            for key in [key for key, value in state.items() if callable(value)]:
                del state[key]

    def _save_checkpoint_with_step(self, runner, step, meta) -> None:
        with stop_if_not_writable(Path(runner.work_dir, 'last_checkpoint'), runner.work_dir):
            super()._save_checkpoint_with_step(runner, step, meta)
        self._delete_replaced()

    def _save_best_checkpoint(self, runner, metrics) -> None:
        super()._save_best_checkpoint(runner, metrics)
        self._delete_replaced()

    def _delete_replaced(self) -> None:
        if isinstance(self.file_backend, DeferredDeletion):
            self.file_backend.delete_pending()

    def _in_out_dir(self, path: Optional[str]) -> Optional[str]:
        return path and str(Path(self.out_dir, Path(path).name))

    @staticmethod
    def _validation_record(runner) -> Path:
        """Return the path of the file that holds the step of the last complete validation."""
        return Path(runner.work_dir) / 'last_validation'

    def _lacks_validation(self, runner) -> bool:
        loop = runner.train_loop
        if not isinstance(loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):
            return False  # a custom loop has its own rule for when it validates
        update_val_interval(loop)
        step = _current_step(loop)
        if runner.val_loop is None or step < loop.val_begin:
            return False
        last = loop.max_epochs if isinstance(loop, EpochBasedTrainLoop) else loop.max_iters
        if step < last and _validation_affects_training(runner):
            validated = self._validated_step
        else:
            record = self._validation_record(runner)
            text = record.read_text(errors='replace').strip() if record.is_file() else ''
            validated = int(text) if text.isdecimal() else 0
        return validated < step and (step % loop.val_interval == 0 or step == last)


@HOOKS.register_module()
class EarlyStoppingHook(_EarlyStoppingHook):
    """mmengine's EarlyStoppingHook, whose count and best score are resumed."""

    priority = 'LOW'  # before CheckpointHook saves this state with the best checkpoint

    def before_run(self, runner) -> None:
        if is_training(runner):  # mmengine's hook would build the loop even to test a model
            super().before_run(runner)

    def after_val_epoch(self, runner, metrics) -> None:
        if is_training(runner):
            super().after_val_epoch(runner, metrics)

    def before_save_checkpoint(self, runner, checkpoint) -> None:
        checkpoint.setdefault('early_stopping', {})[self._name] = [
            self.wait_count, float(self.best_score), runner.train_loop.stop_training]

    def after_load_checkpoint(self, runner, checkpoint) -> None:
        states = checkpoint.get('early_stopping', {})
        if is_resuming(runner) and is_training(runner) and self._name in states:
            count, best, stop = states[self._name]
            self.wait_count, self.best_score = int(count), float(best)
            runner.train_loop.stop_training |= bool(stop)

    @property
    def _name(self) -> str:  # a config may have several
        return f'{self.monitor} {self.rule}'


class DeferredDeletion(LocalBackend):
    """A folder of checkpoints whose files are deleted only by :meth:`delete_pending`.

    Files elsewhere are never deleted, because their names are read from checkpoints.
    """

    def __init__(self, folder: Union[str, Path]):
        self._folder, self._pending = Path(folder).resolve(), {}

    def remove(self, filepath: Union[str, Path]) -> None:
        path = Path(filepath).resolve()
        if path.parent == self._folder and path.suffix == '.pth':
            self._pending[path] = path.stat().st_ino

    def rmtree(self, dir_path: Union[str, Path]) -> None:
        """Do nothing: this project's Runner saves files, so a folder is not one of its own."""

    def delete_pending(self) -> None:
        for path, inode in self._pending.items():
            # A new file may have the same name by now.
            if path.exists() and path.stat().st_ino == inode:
                path.unlink()
        self._pending.clear()


def _current_step(loop: BaseLoop) -> int:
    """Return the epoch or iteration, whichever the loop counts validations in."""
    return loop.epoch if isinstance(loop, EpochBasedTrainLoop) else loop.iter


def flatten_schedulers(schedulers: Union[None, list, Dict[str, list]]) -> list:
    """Return the schedulers of all optimizers: a list for one, a dict of lists for several."""
    return sum(schedulers.values(), []) if isinstance(schedulers, dict) else schedulers or []


def _validation_affects_training(runner) -> bool:
    """Return whether metrics change the schedule or stop the training early."""
    return any(getattr(scheduler, 'need_val_args', False)
               for scheduler in flatten_schedulers(runner.param_schedulers)) or any(
                   isinstance(hook, _EarlyStoppingHook) for hook in runner.hooks)
