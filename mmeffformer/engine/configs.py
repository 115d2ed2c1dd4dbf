"""Configs as files, read for the tools and for what builds models of them."""
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

from mmengine.config import Config, ConfigDict
from mmengine.config.utils import ConfigParsingError

from ..utils.config import LOADERS, iter_dicts, name_types
from .mmengine_internals import patch_mmengine

# Top-level keys of configs of mmdet 2 and mmseg 0 that later ones lack.
OLD_KEYS = ('data', 'optimizer', 'optimizer_config', 'lr_config', 'runner', 'total_epochs',
            'checkpoint_config', 'evaluation')
MIGRATION = 'https://mmdetection.readthedocs.io/en/latest/migration/config_migration.html'


def require_file(path: str, what: str) -> str:
    """Return ``path`` if it is a file or a URL.

    Raises:
        FileNotFoundError: It is neither.
    """
    if not Path(path).is_file() and '://' not in path:
        raise FileNotFoundError(f'{what} {path!r} does not exist')
    return path


def read_config(path: str, options: Optional[dict] = None,
                data_root: Optional[str] = None) -> Config:
    """Return a config, with ``data_root`` and then ``options`` replaced.

    Types that the config imports become names, see :func:`name_types`. Calls
    :func:`patch_mmengine`, so that a base such as ``mmseg::PATH`` is found.

    Args:
        path: A file, or ``LIBRARY::PATH`` of a config that comes with mmdet or mmseg.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The library is not installed, the file is invalid or of mmdet 2 or mmseg 0, a
            path in it has a backslash that Python reads as part of an escape, or the config lacks
            what is to be replaced.
    """
    patch_mmengine()
    path = find_config(path)
    try:
        cfg = Config.fromfile(path)
    except SyntaxError as error:
        hint = '; write paths with / instead of \\' if 'unicodeescape' in str(error) else ''
        raise ValueError(f'{path} or one of its bases is invalid Python: {error}{hint}') from error
    except (NameError, ConfigParsingError) as error:
        raise ValueError(f'{path} or one of its bases is not a valid config: {error}') from error
    name_types(cfg)
    _check_generation(cfg)
    _check_escapes(cfg)
    if data_root:
        set_data_root(cfg, data_root)
    try:
        cfg.merge_from_dict(options or {})
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f'the options {options} do not match the structure of {path} '
                         f'({error.args[0]})') from error
    return cfg


def find_config(path: str) -> str:
    """Return the file of a config given as a file or as ``LIBRARY::PATH``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The library is not installed.
    """
    library, _, inside = path.rpartition('::')
    if library:
        spec = find_spec(library) if library.isidentifier() else None
        if spec is None or spec.origin is None:
            raise ValueError(f'config {path!r}: the library {library!r} is not installed')
        path = str(Path(spec.origin).parent / '.mim' / 'configs' / inside)
    return require_file(path, 'config')


def _check_generation(cfg: Config) -> None:
    """Raise a ValueError for a config of mmdet 2 or mmseg 0."""
    old = [key for key in OLD_KEYS if key in cfg]
    if old and not any(loader in cfg for loader in LOADERS):
        raise ValueError(
            f'{cfg.filename} is a config of mmdet 2.x or mmseg 0.x, as its keys '
            f'{", ".join(old)} show: expected one of mmdet 3.x or mmseg 1.x, with '
            f'train_dataloader and optim_wrapper. Convert it as {MIGRATION} describes')


def _check_escapes(cfg: Config) -> None:
    """Raise a ValueError for a path such as 'data\\train', whose backslash makes a tab."""
    for part in iter_dicts([cfg.get(loader) for loader in LOADERS]):
        for key in ('data_root', 'ann_file'):
            value = part.get(key)
            if isinstance(value, str) and not value.isprintable():
                raise ValueError(f'{cfg.filename}: {key} {value!r} has control characters, which '
                                 'Python makes of some backslashes; write paths with /')


def set_data_root(cfg: Config, data_root: str) -> None:
    """Replace the config's ``data_root`` by another folder in every value that starts with it.

    Raises:
        ValueError: The config has no ``data_root``, or no other value starts with it.
    """
    old = cfg.get('data_root')
    if not old:
        raise ValueError(f'{cfg.filename} has no data_root to replace; set the paths one by one '
                         'with --cfg-options train_dataloader.dataset.data_root=...')
    new, start, found = os.path.join(data_root, ''), _folder(old), []

    def replace(value: Any) -> Any:
        if isinstance(value, str) and _folder(value).startswith(start):
            found.append(value)
            return os.path.join(new, value.replace('\\', '/')[len(start):])
        if isinstance(value, (list, tuple)):
            return type(value)(map(replace, value))
        if isinstance(value, dict):  # dict.items, because ConfigDict.items imports lazy types
            return ConfigDict({key: replace(item) for key, item in dict.items(value)})
        return value

    for key in list(cfg):
        if isinstance(cfg[key], (str, list, tuple, dict)):
            cfg[key] = replace(cfg[key])
    if len(found) == 1:  # data_root itself
        raise ValueError(f'--data-root: no path of {cfg.filename} starts with its data_root '
                         f'{old!r}, so nothing would change; set the paths one by one with '
                         '--cfg-options train_dataloader.dataset.data_root=...')


def _folder(path: str) -> str:
    """Return a path of any system with slashes, the last one at its end."""
    return path.replace('\\', '/').rstrip('/') + '/'
