"""Progress bars and tables of the command lines."""
import warnings
from contextlib import contextmanager
from functools import wraps
from typing import Any, Callable, Iterator, Sequence

from mmengine import logging
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text


class RateColumn(ProgressColumn):
    """Steps per second, of late."""

    def render(self, task: Task) -> Text:
        return Text(f'{task.speed:.3g} per second' if task.speed else '')


@contextmanager
def progress_bar(*columns: ProgressColumn) -> Iterator[Callable[[str, int, int], None]]:
    """Context manager: show a bar on stderr, without warnings in between.

    Args:
        columns: Further columns of the bar.

    Yields:
        A function of the current step as text, the steps done and the number of steps.
    """
    with Progress(TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(),
                  TimeElapsedColumn(), *columns, console=Console(stderr=True),
                  transient=True) as progress, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        task = progress.add_task('')
        yield lambda text, done, steps: progress.update(task, description=text, completed=done,
                                                        total=steps or None)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]],
                caption: str = '') -> None:
    """Print a table, with columns that fold where the terminal is narrow."""
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    table = Table(title=title, caption=caption)
    for i, column in enumerate(columns):
        table.add_column(column, justify='right' if i else 'left', overflow='fold')
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False)


def drop_onedl_messages() -> None:
    """Keep the forks of mmdet, mmseg and mmpretrain from printing ``Could not import OneDL``.

    OneDL is a package for data sets that few users have. The forks give the message the level of
    debugging but no logger, and such messages mmengine prints at any level.
    """
    print_log = logging.print_log

    @wraps(print_log)
    def print_other_log(msg: Any, *args: Any, **kwargs: Any) -> None:
        if not str(msg).startswith('Could not import OneDL'):
            print_log(msg, *args, **kwargs)

    logging.print_log = print_other_log
