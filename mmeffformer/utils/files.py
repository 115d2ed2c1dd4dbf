"""Files that are replaced atomically."""
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Union

TMP_PREFIX = '.tmp-'  # of a file that is still being written


@contextmanager
def atomic_write(path: Union[str, Path]) -> Iterator[Path]:
    """Context manager: yield a temporary path that replaces ``path`` when the block succeeds.

    The folder of ``path`` is created. If the block fails or the machine stops, the previous
    content of ``path`` stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp_path = path.with_name(f'{TMP_PREFIX}{path.name}')
    try:
        yield tmp_path
        with tmp_path.open('rb') as file:  # a power cut could else keep the name, not the content
            os.fsync(file.fileno())
        tmp_path.replace(path)
    finally:
        tmp_path.unlink(missing_ok=True)
