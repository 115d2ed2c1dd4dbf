"""Pickles of checkpoints, read as data: nothing that a file names is imported or called.

torch's own ``weights_only`` reading is not used, since before torch 2.5 the list of what it passes
cannot be extended, so that it refuses what mmengine saves; up to 2.5 code could be run through it
(CVE-2025-32434); and in any version a file can exhaust memory or the stack before its shapes are
known. Here a pickle is a list of instructions (``pickletools``) for a small machine. The names in
it select from ``_CALLS`` and ``_VALUES``, which are functions and values of this module.
"""
import argparse
import pickletools
import re
from collections import OrderedDict, defaultdict
from math import prod
from typing import Any, BinaryIO, Callable, Dict, List, Optional

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor

# A checkpoint of L7 as it is trained has 64,000, without heads.
MAX_INSTRUCTIONS = 2_000_000
MAX_DEPTH = 64  # of containers in containers
MAX_ITEMS = 10_000_000  # as counted by who walks through all, shared containers each time anew

Load = Callable[[str, torch.dtype, int], Tensor]  # key, dtype, number of elements: a storage


class RefusedError(ValueError):
    """A pickle asks for what is not given."""


def _foreign(name: str) -> RefusedError:
    return RefusedError(
        f'asks for {name:.200}, and only tensors and plain data are read, since anything else can '
        'run code. Where you trust the file, save its weights alone: torch.save(state_dict, path)')


class _Name:
    """Stands for a class or a function that a pickle names."""

    __slots__ = ('name',)

    def __init__(self, name: str):
        self.name = name


class _Inert:
    """Stands for what a function returns that is not called."""

    __slots__ = ()


def unpickle(file: BinaryIO, load: Optional[Load] = None, limit: int = 1 << 30) -> Any:
    """Return what the pickle at the file's position holds; the position is then behind it.

    Args:
        file: With ``read`` and ``readline``.
        load: Returns the 1-D tensor of a storage, by its key.
        limit: Bytes that may be copied out of the pickle, for arrays.

    Raises:
        RefusedError: It asks for something else than tensors and plain data, or for too much.
        Exception: It is broken, in any way.
    """
    return _Machine(load, limit).run(file)


class _Machine:
    def __init__(self, load: Optional[Load], limit: int):
        self.load, self.left = load, limit
        self.stack: List[Any] = []
        self.marks: List[int] = []
        self.memo: Dict[int, Any] = {}

    def run(self, file: BinaryIO) -> Any:
        for count, (op, arg, _) in enumerate(pickletools.genops(file)):
            if count == MAX_INSTRUCTIONS:
                raise RefusedError(f'has more than {MAX_INSTRUCTIONS:,} instructions')
            if op.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[op.name])
            elif op.name in _LITERALS:
                if type(arg) is int and arg.bit_length() > 128:
                    raise RefusedError('has a number of more than 128 bits')
                self.stack.append(arg)
            elif op.name in _EMPTY:
                self.stack.append(_EMPTY[op.name]())
            elif op.name in _TUPLES:
                self.stack.append(tuple(self.pop(_TUPLES[op.name])))
            elif op.name not in ('PROTO', 'FRAME', 'STOP'):
                do = getattr(self, f'do_{op.name}', None)
                if do is None:
                    raise RefusedError(f'has the instruction {op.name}, which torch never saves')
                do(arg)
        value, = self.stack
        _check_size(value)
        return value

    def pop(self, count: int) -> list:
        if len(self.stack) < count + (self.marks[-1] if self.marks else 0):
            raise ValueError('the stack is too short')
        items = self.stack[len(self.stack) - count:]
        del self.stack[len(self.stack) - count:]
        return items

    def pop_mark(self) -> list:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def do_MARK(self, arg):
        self.marks.append(len(self.stack))

    def do_POP(self, arg):
        self.pop(1)

    def do_MEMOIZE(self, arg):
        self.memo[len(self.memo)] = self.stack[-1]

    def do_BINPUT(self, arg):
        self.memo[int(arg)] = self.stack[-1]

    def do_BINGET(self, arg):
        self.stack.append(self.memo[int(arg)])

    do_PUT = do_LONG_BINPUT = do_BINPUT
    do_GET = do_LONG_BINGET = do_BINGET

    def do_TUPLE(self, arg):
        self.stack.append(tuple(self.pop_mark()))

    def do_LIST(self, arg):
        self.stack.append(self.pop_mark())

    def do_DICT(self, arg):
        items = self.pop_mark()
        self.stack.append({})
        self.set_items(items)

    def do_FROZENSET(self, arg):
        self.stack.append(frozenset(map(_key, self.pop_mark())))

    def do_APPEND(self, arg):
        self.extend(self.pop(1))

    def do_APPENDS(self, arg):
        self.extend(self.pop_mark())

    def extend(self, items: list):
        if type(self.stack[-1]) is not list:
            raise RefusedError(f'appends to a {type(self.stack[-1]).__name__}')
        self.stack[-1].extend(items)

    def do_ADDITEMS(self, arg):
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise RefusedError(f'adds to a {type(self.stack[-1]).__name__}')
        self.stack[-1].update(map(_key, items))

    def do_SETITEM(self, arg):
        self.set_items(self.pop(2))

    def do_SETITEMS(self, arg):
        self.set_items(self.pop_mark())

    def set_items(self, items: list):
        if type(self.stack[-1]) not in (dict, OrderedDict, defaultdict):
            raise RefusedError(f'sets items of a {type(self.stack[-1]).__name__}')
        for key, value in zip(items[::2], items[1::2]):
            self.stack[-1][_key(key)] = value

    def do_GLOBAL(self, arg):
        self.name(arg.replace(' ', '.', 1))

    def do_STACK_GLOBAL(self, arg):
        module, name = self.pop(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError('a name is no text')
        self.name(f'{module}.{name}')

    def name(self, name: str):
        name = name.replace('__builtin__.', 'builtins.', 1)
        if name in _VALUES:
            self.stack.append(_VALUES[name])
        elif name in _CALLS:
            self.stack.append(_Name(name))
        elif name.startswith(f'{_HISTORY}.'):  # a method, which it knows itself
            self.stack.append(_Inert())
        else:
            raise _foreign(name)

    def do_REDUCE(self, arg):
        callee, args = self.pop(2)
        if type(callee) is not _Name or type(args) is not tuple:
            raise RefusedError(f'calls a {type(callee).__name__}')
        self.stack.append(self.call(callee.name, args))

    do_NEWOBJ = do_REDUCE

    def call(self, name: str, args: tuple) -> Any:
        self.spend(sum(len(arg) for arg in args if isinstance(arg, _SIZED)))
        if name == 'torch._tensor._rebuild_from_type_v2':
            function, kind, inner, _ = args  # a tensor with attributes, which are left out
            if getattr(function, 'name', '') not in _TENSOR_CALLS or type(inner) is not tuple \
                    or getattr(kind, 'name', '') not in _TENSORS:
                raise _foreign(f'a tensor of class {getattr(kind, "name", kind)!s}')
            return self.call(function.name, inner)
        if _CALLS[name] is None:
            raise RefusedError(f'makes a {name} in a way that torch never saves')
        return _CALLS[name](*args)

    def spend(self, count: int):
        self.left -= count
        if self.left < 0:
            raise RefusedError('makes more data than the file has')

    def do_BUILD(self, arg):
        made, state = self.pop(2)
        self.stack.append(made)
        self.spend(len(state))
        if type(made) is OrderedDict:
            _set_metadata(made, state)
        elif type(made) is argparse.Namespace:
            vars(made).update((key, value) for key, value in state.items() if type(key) is str)
        elif type(made) is HistoryBuffer:
            _fill_history(made, state)
        elif type(made) is np.ndarray:
            self.spend(_fill_array(made, state))
        elif isinstance(made, np.dtype):
            if state[1] not in ('<', '|', '=') or any(part is not None for part in state[2:5]):
                raise RefusedError(f'asks for a numpy.dtype of {state!r:.80}')
        else:
            raise RefusedError(f'gives a state to a {type(made).__name__}')

    def do_BINPERSID(self, arg):
        kind, storage, key, _, count, *view = self.pop(1)[0]
        if kind != 'storage' or type(storage) is not torch.dtype or self.load is None:
            raise RefusedError(f'asks for a {kind!r:.80} beside it')
        data = self.load(_of(str, str(key)), storage, _count(count))
        if view and view[0] is not None:  # of files before torch 1.6
            _, start, length = view[0]
            if _count(start) + _count(length) > len(data):
                raise ValueError(f'a view of {length} elements from {start} on, of {len(data)}')
            data = data[start:start + length]
        self.stack.append(data)


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f'a {type(value).__name__}, expected {kind.__name__}')
    return value


def _count(value: Any) -> int:
    if _of(int, value) < 0:
        raise ValueError(f'a negative number ({value})')
    return value


def _key(value: Any) -> Any:
    """Return a key of a dict; hashing tuples of tuples could take for ever."""
    if not isinstance(value, (str, bytes, int, float, type(None))):
        raise RefusedError(f'has a {type(value).__name__} as a key')
    return value


def _tensor(storage: Tensor, offset: int, shape: tuple, stride: tuple, *more: Any) -> Tensor:
    """torch's ``_rebuild_tensor`` and ``_rebuild_tensor_v2``: a view of a storage."""
    if not isinstance(storage, Tensor):
        raise ValueError(f'a tensor of a {type(storage).__name__}')
    if len(shape) != len(stride) or len(shape) > 64:
        raise ValueError(f'a tensor of {len(shape)} dimensions with {len(stride)} strides')
    elements = prod(map(_count, shape))
    last = _count(offset) + sum((n - 1) * _count(step) for n, step in zip(shape, stride))
    if elements and (last >= len(storage) or elements > len(storage)):
        raise RefusedError(f'has a tensor of shape {tuple(shape)} ({elements:,} elements), for '
                           f'which there are {len(storage):,} elements')
    return torch.as_strided(storage, shape, stride, offset if elements else 0)


def _tensor_v3(storage: Tensor, offset: int, shape: tuple, stride: tuple, requires_grad: Any,
               hooks: Any, dtype: torch.dtype, *more: Any) -> Tensor:
    """torch's ``_rebuild_tensor_v3``, of dtypes that no class of storages is named after."""
    if not isinstance(storage, Tensor) or storage.dtype != torch.uint8:
        raise ValueError('a tensor of a storage of another kind')
    return _tensor(storage[:len(storage) // dtype.itemsize * dtype.itemsize].view(dtype), offset,
                   shape, stride)


def _parameter(tensor: Tensor, *more: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError(f'a parameter of a {type(tensor).__name__}')
    return tensor


def _dtype(name: str, *more: Any) -> np.dtype:
    if not re.fullmatch('[biufc][0-9]{1,2}', _of(str, name)):
        raise RefusedError(f'asks for a numpy.dtype {name!r:.80}')
    return np.dtype(name)


def _scalar(dtype: np.dtype, data: bytes) -> np.generic:
    if not isinstance(dtype, np.dtype):
        raise ValueError('a number of no dtype')
    value, = np.frombuffer(_of(bytes, data), dtype)
    return value


def _new_array(kind: Any, *more: Any) -> np.ndarray:
    if getattr(kind, 'name', '') != 'numpy.ndarray':
        raise RefusedError(f'asks for a {getattr(kind, "name", "class")} of numpy')
    return np.empty(0, np.uint8)


def _fill_array(array: np.ndarray, state: tuple) -> int:
    """Set what an array holds, and return the number of bytes."""
    _, shape, dtype, fortran, data = state
    if not isinstance(dtype, np.dtype):
        raise ValueError('an array of no dtype')
    if prod(map(_count, _of(tuple, shape))) * dtype.itemsize != len(_of(bytes, data)):
        raise ValueError(f'{len(data)} bytes for an array of shape {shape}')
    array.__setstate__((1, shape, dtype, bool(fortran), data))
    return len(data)


def _fill_history(history: HistoryBuffer, state: dict):
    values, counts, most = (state[key] for key in ('_log_history', '_count_history', 'max_length'))
    for array in (values, counts):
        if type(array) is not np.ndarray or array.ndim != 1 or array.dtype.kind not in 'biuf':
            raise ValueError('logged values that are no list of numbers')
    if len(values) != len(counts) or _count(most) < max(1, len(values)):
        raise ValueError(f'{len(values)} logged values with {len(counts)} counts, of {most}')
    history._log_history, history._count_history, history.max_length = values, counts, most


def _set_metadata(made: OrderedDict, state: dict):
    """Set what ``state_dict()`` adds to its result: the versions of modules."""
    metadata = _of(dict, state).get('_metadata')
    if isinstance(metadata, dict) and all(isinstance(each, dict) for each in metadata.values()):
        made._metadata = metadata


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != 'latin1':
        raise RefusedError(f'asks for the encoding {encoding!r:.80}')
    return _of(str, text).encode('latin1')


def _ordered(items: Any = ()) -> OrderedDict:
    return OrderedDict((_key(key), value) for key, value in items)


def _counted(items: Any = None) -> dict:
    return _of(dict, items or {})


def _nothing(*args: Any):
    """In place of ``getattr``, which reaches anything."""


def _check_size(value: Any):
    """Raise a RefusedError if walking through ``value`` takes long or for ever."""
    level, total = {id(value): (value, 1)}, 0
    for _ in range(MAX_DEPTH):
        below: Dict[int, tuple] = {}
        for item, times in level.values():
            children = item if isinstance(item, (list, tuple, set, frozenset)) else (
                item.values() if isinstance(item, dict) else ())
            if isinstance(item, (OrderedDict, argparse.Namespace)):
                children = [*children, *vars(item).values()]
            for child in children:
                if isinstance(child, (list, tuple, set, frozenset, dict, argparse.Namespace)):
                    before = below.get(id(child), (child, 0))[1]
                    below[id(child)] = child, before + times
            total += times * len(children)
        if total > MAX_ITEMS:
            raise RefusedError(f'holds more than {MAX_ITEMS:,} items')
        if not below:
            return
        level = below
    raise RefusedError(f'nests containers more than {MAX_DEPTH} deep, or in themselves')


_SIZED = (str, bytes, list, tuple, dict, set)
_CONSTANTS = dict(NONE=None, NEWTRUE=True, NEWFALSE=False)
_EMPTY = dict(EMPTY_LIST=list, EMPTY_DICT=dict, EMPTY_SET=set, EMPTY_TUPLE=tuple)
_TUPLES = dict(TUPLE1=1, TUPLE2=2, TUPLE3=3)
_LITERALS = {'INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4', 'FLOAT', 'BINFLOAT',
             'STRING', 'BINSTRING', 'SHORT_BINSTRING', 'UNICODE', 'BINUNICODE', 'BINUNICODE8',
             'SHORT_BINUNICODE', 'BINBYTES', 'BINBYTES8', 'SHORT_BINBYTES'}
_HISTORY = 'mmengine.logging.history_buffer.HistoryBuffer'
_TENSORS = ('torch.Tensor', 'torch.nn.parameter.Parameter')
_STORAGES = dict(
    Double='float64', Float='float32', Half='float16', BFloat16='bfloat16', Long='int64',
    Int='int32', Short='int16', Char='int8', Byte='uint8', Bool='bool', ComplexFloat='complex64',
    ComplexDouble='complex128', Untyped='uint8')

_DTYPES = re.compile(r'torch\.(bool|u?int(8|16|32|64)|b?float(16|32|64|8_\w+)|complex\d+)')

_VALUES: Dict[str, Any] = {
    str(dtype): dtype for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and _DTYPES.fullmatch(str(dtype))}
_VALUES.update((f'{module}.{name}Storage', getattr(torch, dtype))
               for module in ('torch', 'torch.cuda', 'torch.storage')
               for name, dtype in _STORAGES.items())

_TENSOR_CALLS = {f'torch._utils._rebuild_{name}': call for name, call in dict(
    tensor=_tensor, tensor_v2=_tensor, tensor_v3=_tensor_v3, parameter=_parameter,
    parameter_with_state=_parameter).items()}
_CALLS: Dict[str, Optional[Callable]] = {
    'collections.OrderedDict': _ordered,
    'collections.Counter': _counted,
    'collections.defaultdict': lambda *factory: {},
    'builtins.set': lambda items=(): {_key(item) for item in items},
    'builtins.bytes': lambda: b'',
    'builtins.slice': lambda *ends: slice(*(end if end is None else _of(int, end)
                                            for end in ends)),
    'builtins.getattr': _nothing,
    '_codecs.encode': _encoded,
    'argparse.Namespace': lambda: argparse.Namespace(),
    'numpy.dtype': _dtype,
    'torch.Size': lambda shape=(): torch.Size(map(_count, shape)),
    'torch.device': lambda kind, index=None: torch.device(
        _of(str, kind), *(() if index is None else (_count(index),))),
    'torch._tensor._rebuild_from_type_v2': None,
    _HISTORY: lambda: HistoryBuffer(),
    **_TENSOR_CALLS,
    # Named in what others are called with, and never called themselves.
    **dict.fromkeys([*_TENSORS, 'numpy.ndarray', 'builtins.list', 'builtins.dict', 'builtins.int',
                     'builtins.float']),
}
for _module in ('numpy.core.multiarray', 'numpy._core.multiarray'):  # before and from 2.0
    _CALLS.update({f'{_module}._reconstruct': _new_array, f'{_module}.scalar': _scalar})
