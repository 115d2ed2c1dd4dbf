"""Walks through configs."""
from typing import Any, Iterator


def iter_dicts(value: Any) -> Iterator[dict]:
    """Yield every dict nested in ``value``, outer ones first."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    for item in value if isinstance(value, (list, tuple)) else ():
        yield from iter_dicts(item)
