"""All private parts of mmengine, torch and multiprocessing that training relies on.

``tests/engine/test_mmengine_internals.py`` fails where a version has moved one of them. It also
checks the private methods that :class:`mmeffformer.engine.hooks.CheckpointHook` overrides.
"""
import multiprocessing.util
from contextlib import contextmanager
from typing import Any, Iterator

from mmengine.runner.base_loop import BaseLoop
from torch.utils.data import DataLoader

from ..utils.registry import register_packages
from ..weights import safe_loading


def patch_mmengine() -> None:
    """Make mmengine load checkpoints safely and find the configs of mmeffformer and of mmseg.

    This changes two tables of mmengine in this process: the loaders of ``CheckpointLoader``, so
    that no checkpoint runs code, and ``MODULE2PACKAGE``, by which configs named ``PACKAGE::PATH``
    are found. The Runner of this project and its tools call this function; importing mmeffformer
    does not. Calling it again changes nothing.
    """
    safe_loading.install()
    register_packages()


def is_training(runner) -> bool:
    """Return whether ``Runner.train()`` runs, rather than ``val()`` or ``test()``.

    The public ``train_loop`` would build the loop, with the data set of training.
    """
    return isinstance(runner._train_loop, BaseLoop)


def is_resuming(runner) -> bool:
    """Return whether the checkpoint is resumed, rather than loaded for its weights."""
    return bool(runner._resume)


def update_val_interval(loop: BaseLoop) -> None:
    """Apply the loop's ``dynamic_intervals``, which it does itself after an iteration only."""
    loop._decide_current_val_interval()


def diff_rank_seed(runner) -> bool:
    """Return whether the config asks for another seed in each process."""
    return runner._randomness_cfg.get('diff_rank_seed', False)


def train_dataloader_cfg(runner) -> Any:
    """Return the data loader of training, or its config before the loop is built."""
    return runner._train_dataloader


@contextmanager
def train_dataloader(runner, loader: DataLoader) -> Iterator[None]:
    """Context manager: the loop that the runner builds gets this loader.

    Afterwards the runner has its config again, in which it looks up the batch size.
    """
    cfg = runner._train_dataloader
    runner._train_dataloader = loader
    try:
        yield
    finally:
        runner._train_dataloader = cfg


def set_loader_parts(loader: DataLoader, **parts: Any) -> DataLoader:
    """Replace attributes of a loader that is not in use yet, and return it.

    torch locks them because others are derived from them. Here those stay valid: the new data
    set and the new batch sampler wrap the old ones. Building another loader would need all
    arguments of the first one.
    """
    for name, part in parts.items():
        object.__setattr__(loader, name, part)
    return loader


class SkippedIterator:
    """The iterator of an ``IterBasedTrainLoop`` whose loader starts at the first new batch.

    A resumed loop first drops the batches of earlier iterations: onedl-mmengine calls
    ``skip_iter``, mmengine 0.10.7 ``next`` for each batch. Here neither loads anything.

    Args:
        iterator: The loop's ``dataloader_iterator``.
        count: Number of earlier iterations.
    """

    def __init__(self, iterator: Iterator, count: int):
        self.iterator, self.count = iterator, count

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        if self.count > 0:
            self.count -= 1
            return None
        return next(self.iterator)

    def skip_iter(self, num_iters: int) -> None:
        self.count = 0


def create_temp_dir() -> str:
    """Create the temporary folder of multiprocessing in this process and return its path.

    The workers of data loaders put sockets there and this process removes it at its end. Without
    it each worker creates its own folder, which stays where the worker is terminated.
    """
    return multiprocessing.util.get_temp_dir()
