"""Values that change while a model trains and that its ``state_dict`` lacks.

These are plain attributes of modules and of the objects in them, such as the image size that
mmdet's BatchSyncRandomResize draws, counters, and generators of random numbers.
"""
import io
import pickle
import random
import sys
from collections import deque
from typing import Any, Callable, Dict, Iterator, Tuple

import numpy as np
import torch
from torch import Tensor, nn

Path = Tuple[Any, ...]  # names of attributes, keys of dicts and indices of lists
# How the state of objects without attributes is read and set.
STATEFUL: Dict[type, Tuple[Callable, Callable]] = {
    random.Random: (random.Random.getstate, random.Random.setstate),
    np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
    np.random.Generator: (lambda drawer: drawer.bit_generator.state,
                          lambda drawer, state: setattr(drawer.bit_generator, 'state', state)),
    torch.Generator: (torch.Generator.get_state, torch.Generator.set_state),
    deque: (list, lambda queue, items: (queue.clear(), queue.extend(items))),
}
# mmdet's samplers use one of them, which is seeded before each iteration.
GLOBAL_GENERATORS = (np.random.mtrand._rand, torch.default_generator)


def snapshot(model: nn.Module) -> Dict[Path, bytes]:
    """Return the plain values of a model by path, pickled for :func:`changed_values`."""
    return {path: _pickled(value) for path, value in _plain_values(model)}


def changed_values(model: nn.Module, before: Dict[Path, bytes]) -> Dict[Path, Any]:
    """Return the plain values that differ from a :func:`snapshot`, by path."""
    return {path: value for path, value in _plain_values(model)
            if _pickled(value) != before.get(path)}


def set_values(model: nn.Module, values: Dict[Path, Any]) -> None:
    """Set the result of :func:`changed_values` in another model of the same config."""
    containers = dict(_containers(model))
    for (*path, name), value in values.items():
        container = containers.get(tuple(path), {})
        items = dict(_items(container))
        current = items.get(name)
        if type(current) in STATEFUL:
            STATEFUL[type(current)][1](current, value)
        elif isinstance(container, dict) or isinstance(container, list) and name in items:
            moves = isinstance(current, Tensor) and isinstance(value, Tensor)
            container[name] = value.to(current.device) if moves else value


class _Pickler(pickle.Pickler):
    """Pickles tensors by value: torch's pickle of a tensor has the address of its storage."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return NotImplemented
        raw = value.detach().cpu().reshape(-1).view(torch.uint8).numpy()
        return _unpickled_tensor, (raw, value.dtype, value.shape)


def _unpickled_tensor(raw: np.ndarray, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def _pickled(value: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


def _plain_values(model: nn.Module) -> Iterator[Tuple[Path, Any]]:
    saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    for path, container in _containers(model):
        for name, value in _items(container):
            if type(value) in STATEFUL and value not in GLOBAL_GENERATORS:
                value = STATEFUL[type(value)][0](value)
            # Tensors deeper inside are left from the last batch. mmengine sets the mode.
            in_module = path[1:] in ((), ('_buffers',))
            if name != 'training' and (_is_plain(value) or (
                    in_module and type(value) is Tensor and not value.requires_grad
                    and id(value) not in saved)):
                yield (*path, name), value


def _containers(model: nn.Module) -> Iterator[Tuple[Path, Any]]:
    """Yield the attributes of modules and of objects in them, dicts and lists with more in them.

    Paths begin with the name of the module.
    """
    pending, seen = deque(((name,), module) for name, module in model.named_modules()), set()
    while pending:
        path, part = pending.popleft()
        if id(part) not in seen:
            seen.add(id(part))
            container = part if isinstance(part, (dict, list, tuple)) else vars(part)
            pending.extend(((*path, name), value) for name, value in _items(container)
                           if _has_parts(value))
            yield path, container


def _items(container: Any) -> Iterator[Tuple[Any, Any]]:
    return iter(container.items() if isinstance(container, dict) else enumerate(container))


def _has_parts(value: Any) -> bool:
    """Return whether to look into a value; a dict with other keys than names is a cache."""
    if _is_plain(value):
        return False
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) for key in value)
    packages = [kind.__module__.partition('.')[0] for kind in type(value).__mro__]
    return isinstance(value, (nn.Module, list, tuple)) or (
        hasattr(value, '__dict__') and packages[0] not in sys.stdlib_module_names
        and not {'torch', 'mmengine'} & {*packages})


def _is_plain(value: Any) -> bool:
    """Return whether the safe reader of checkpoints accepts the value."""
    kind = type(value)
    if kind in (list, tuple, set):
        return all(map(_is_plain, value))
    if kind is dict:
        return all(type(key) in (str, int) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype.kind in 'biufc'
    return value is None or kind in (bool, int, float, complex, str, bytes, torch.Size)
