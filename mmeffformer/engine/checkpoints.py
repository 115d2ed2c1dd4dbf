"""The checkpoints that a training leaves in its work dir, to go on from."""
import re
from pathlib import Path
from typing import Iterator, List, Optional, Tuple, Union

from mmengine.logging import print_log

from ..weights.safe_loading import read_model


def checkpoints(work_dir: Union[str, Path]) -> List[Path]:
    """Return the checkpoints of a training, the newest first, whole or not.

    They are those that ``work_dir/last_checkpoint`` names, and those beside it or in
    ``work_dir`` that are called like it, or ``epoch_N.pth`` or ``iter_N.pth``. The best ones
    (``best_*.pth``) cannot be resumed: they have no optimizer. Those of a training before, in the
    same folder, come last.
    """
    folders, names = [Path(work_dir)], [r'epoch_(\d+)\.pth', r'iter_(\d+)\.pth']
    record = folders[0] / 'last_checkpoint'
    last = Path(record.read_text(errors='replace').strip() if record.is_file() else '')
    step = None
    if last.name:
        if not (folders[0] / last.name).is_file():  # in a copied work dir, it names the original's
            folders.append(last.parent)
        names.insert(0, re.sub(r'\d+', r'(\\d+)', re.escape(last.name), count=1))
        step = int((re.search(r'\d+', last.name) or [0])[0])
    found = {}
    for path in (path for folder in folders for path in folder.glob('*')):
        for rank, name in enumerate(names):
            if (match := re.fullmatch(name, path.name)) and path.is_file():
                # What is further than the record was written after it, unless it is of another
                # training: a process may be killed before it writes the record.
                older = step is not None and (rank or int(match[1]) > step) and \
                    path.stat().st_mtime_ns < record.stat().st_mtime_ns
                found.setdefault(path.resolve(), (not older, -rank, int(match[1])))
                break
    return sorted(found, key=found.get, reverse=True)


def newest_checkpoint(work_dir: Union[str, Path]) -> Optional[str]:
    """Return the newest checkpoint of a training that is whole, None where there is none at all.

    Of those that are not, a warning says so.

    Raises:
        ValueError: There are checkpoints, and none is whole.
    """
    problems = []
    for path, problem in _read(work_dir):
        if problem:
            problems.append(problem)
            continue
        for problem in problems:
            print_log(f'{problem}. Going on from the one before, {path}', 'current', level=30)
        return str(path)
    if problems:
        raise ValueError('\n'.join([
            f'of {len(problems)} checkpoints in {work_dir} none can be read:', *problems,
            'Name another with --resume CHECKPOINT, or another --work-dir to start anew']))


def describe_resume_point(work_dir: Union[str, Path]) -> str:
    """Return words on the checkpoint that can be gone on from."""
    path = next((path for path, problem in _read(work_dir) if not problem), None)
    return f'the last good checkpoint is {path}' if path else 'there is no checkpoint before it'


def _read(work_dir: Union[str, Path]) -> Iterator[Tuple[Path, str]]:
    """Read the checkpoints of a training, the newest first: each, and what is wrong with it."""
    for path in checkpoints(work_dir):
        try:
            read_model(path)
            yield path, ''
        except ValueError as error:
            yield path, str(error)
