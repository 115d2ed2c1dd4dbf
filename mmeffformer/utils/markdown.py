"""Markdown tables."""
from typing import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a pipe table: the first column aligned left, the others right."""
    separator = ['---'] + ['---:'] * (len(header) - 1)
    return '\n'.join(f'| {" | ".join(text.replace("|", "/") for text in row)} |'
                     for row in (header, separator, *rows))
