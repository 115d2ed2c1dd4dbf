"""Files written whole or not at all."""
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Union

HALF = '.half-'  # what the name begins with of a file that is being written


@contextmanager
def replacing(path: Union[str, Path]) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; what is there at the end takes the place of it.

    Its folder is made. If the work fails, or the machine does, what was at ``path`` stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f'{HALF}{path.name}')
    try:
        yield half
        with half.open('rb') as file:  # else a power cut could leave the name without the content
            os.fsync(file.fileno())
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
