"""Find the checkpoint in a work dir that a run is resumed from."""
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List, Optional, Tuple, Union

from mmengine.fileio import FileClient, HardDiskBackend, LocalBackend, get_file_backend
from mmengine.logging import print_log

from ..utils.errors import TrainingStopped
from ..weights.safe_loading import read_model


def checkpoints(work_dir: Union[str, Path]) -> List[Path]:
    """Return the checkpoints of a run, the newest first, complete or not.

    These are the one that ``work_dir/last_checkpoint`` names, those with the same name pattern in
    its folder or in ``work_dir``, and ``epoch_N.pth`` and ``iter_N.pth``. The best ones
    (``best_*.pth``) cannot be resumed, since they have no optimizer. Checkpoints of an earlier
    run in the same folder come last.
    """
    folders, names = [Path(work_dir)], [r'epoch_(\d+)\.pth', r'iter_(\d+)\.pth']
    record = folders[0] / 'last_checkpoint'
    last = Path(record.read_text(errors='replace').strip() if record.is_file() else '')
    step = None
    if last.name:
        if not (folders[0] / last.name).is_file():  # a copied work dir names the original's file
            folders.append(last.parent)
        names.insert(0, re.sub(r'\d+', r'(\\d+)', re.escape(last.name), count=1))
        step = int((re.search(r'\d+', last.name) or [0])[0])
    found = {}
    for path in (path for folder in folders for path in folder.glob('*')):
        for rank, name in enumerate(names):
            if (match := re.fullmatch(name, path.name)) and path.is_file():
                # A process may be killed after it wrote a checkpoint and before the record. So
                # a later step counts, unless its file is older than the record: then it is a
                # checkpoint of an earlier run.
                older = step is not None and (rank or int(match[1]) > step) and \
                    path.stat().st_mtime_ns < record.stat().st_mtime_ns
                found.setdefault(path.resolve(), (not older, -rank, int(match[1])))
                break
    return sorted(found, key=found.get, reverse=True)


def newest_checkpoint(work_dir: Union[str, Path]) -> Optional[str]:
    """Return the newest complete checkpoint of a run, or None if it has no checkpoints.

    Logs a warning for each newer one that cannot be read.

    Raises:
        ValueError: There are checkpoints, and all are incomplete.
    """
    problems = []
    for path, problem in _read(work_dir):
        if problem:
            problems.append(problem)
            continue
        for problem in problems:
            print_log(f'{problem}. Resuming from an earlier checkpoint, {path}', 'current',
                      level=30)
        return str(path)
    if problems:
        raise ValueError('\n'.join([
            f'of {len(problems)} checkpoints in {work_dir} none can be read:', *problems,
            'Name another one with --resume CHECKPOINT, or start a run in another --work-dir']))


def describe_resume_point(work_dir: Union[str, Path]) -> str:
    """Return a sentence that names the checkpoint from which the run can be resumed."""
    path = next((path for path, problem in _read(work_dir) if not problem), None)
    return f'the last complete checkpoint is {path}' if path else 'there is no earlier checkpoint'


def is_local(folder: Union[str, Path], file_client_args: Optional[dict],
             backend_args: Optional[dict]) -> bool:
    """Return whether mmengine writes to files of this machine, which can be renamed."""
    backend = (FileClient.infer_client(file_client_args, folder).client if file_client_args
               else get_file_backend(folder, backend_args=backend_args))
    return type(backend) in (LocalBackend, HardDiskBackend)


@contextmanager
def stop_if_not_writable(path: Union[str, Path], work_dir: Union[str, Path]) -> Iterator[None]:
    """Context manager: turn an OSError in writing ``path`` into a TrainingStopped."""
    try:
        yield
    except OSError as error:
        raise TrainingStopped(
            f'{path} cannot be written: {error.strerror or error}. Solve this and use --resume; '
            f'{describe_resume_point(work_dir)}') from error


def _read(work_dir: Union[str, Path]) -> Iterator[Tuple[Path, str]]:
    """Read the checkpoints of a run, the newest first; yield each path and its problem or ''."""
    for path in checkpoints(work_dir):
        try:
            read_model(path)
            yield path, ''
        except ValueError as error:
            yield path, str(error)
