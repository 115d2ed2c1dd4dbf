"""Options and config loading shared by the command lines in ``tools/``."""
import os
import sys
import traceback
from argparse import ArgumentParser, Namespace
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Optional, Tuple, Type, Union

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.config.utils import ConfigParsingError

from ..engine.launch import end_with_launcher, start_on_cpus
from ..engine.mmengine_internals import patch_mmengine
from ..utils.config import LOADERS, iter_dicts, name_types
from ..utils.errors import explain_import_error

# The variable with the rank of a process, by launcher.
RANKS = {'pytorch': 'RANK', 'slurm': 'SLURM_PROCID', 'mpi': 'OMPI_COMM_WORLD_RANK'}
# Top-level keys of configs of mmdet 2 and mmseg 0 that later ones lack.
OLD_KEYS = ('data', 'optimizer', 'optimizer_config', 'lr_config', 'runner', 'total_epochs',
            'checkpoint_config', 'evaluation')
MIGRATION = 'https://mmdetection.readthedocs.io/en/latest/migration/config_migration.html'
Errors = Union[Type[Exception], Tuple[Type[Exception], ...]]


class KeyValues(DictAction):
    """mmengine's action for ``KEY=VALUE`` options, with an error for anything else."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any,
                 option_string: Optional[str] = None) -> None:
        for value in values:
            if '=' not in value[1:]:
                parser.error(f'{option_string}: expected KEY=VALUE, got {value!r}')
        super().__call__(parser, namespace, values, option_string)


def add_config_arguments(parser: ArgumentParser) -> None:
    """Add the options that :func:`load_config` reads, named as in the tools of mmdet and mmseg."""
    parser.add_argument('config', help='config file for mmdet or mmseg')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints '
                        '(default: work_dirs/ and the name of the config)')
    parser.add_argument('--data-root', help='folder that replaces data_root throughout the config')
    parser.add_argument('--cfg-options', nargs='+', action=KeyValues, metavar='KEY=VALUE',
                        help='override config values, for example model.backbone.arch=l3 '
                        'or key="[a,b]"')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'],
                        default='none', help='program that starts the processes of a job')
    # torchrun's predecessor passes this option to every process.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def add_timing_arguments(parser: ArgumentParser, rounds: int) -> None:
    """Add ``--shape``, ``--threads``, and ``--rounds`` with its default."""
    parser.add_argument('--shape', nargs=2, type=int, default=(224, 224), metavar=('H', 'W'),
                        help='input size in px (default: 224 224)')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(),
                        help='CPU threads (default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=rounds,
                        help='samples of each (default: %(default)s)')


def add_inference_arguments(parser: ArgumentParser) -> None:
    """Add ``--backend`` and ``--model`` for an exported file, and ``--dtype`` for a checkpoint."""
    parser.add_argument('--backend', choices=['onnx', 'openvino', 'executorch'],
                        help='runtime for --model, which is used instead of a checkpoint')
    parser.add_argument('--model', metavar='FILE', help='whole model saved by tools/export.py')
    parser.add_argument('--dtype', choices=['fp32', 'bf16', 'fp16'], default='fp32',
                        help='compute the fused backbone, neck and heads in bf16, or in fp16 on a '
                        'GPU, and the rest in fp32 (default: all in fp32)')


def check_inference_arguments(parser: ArgumentParser, args: Namespace) -> None:
    """Exit unless there is either a checkpoint or an exported file, with options that suit it."""
    if bool(args.backend) != bool(args.model) or bool(args.model) == bool(args.checkpoint):
        parser.error('give either a checkpoint, or --backend and --model')
    if args.model and args.dtype != 'fp32':
        parser.error(f'--dtype {args.dtype} is for a checkpoint; make a file that computes in '
                     f'{args.dtype} by tools/export.py --precision {args.dtype}')


@contextmanager
def exit_on_error(kinds: Errors = (ValueError, OSError)) -> Iterator[None]:
    """Context manager: exit with the message only where one of ``kinds`` is raised.

    Other errors keep their traceback, except those of mmengine's registry: a config with an
    unknown type, or with an argument that the type does not take.
    """
    tool = Path(sys.argv[0]).name
    try:
        yield
    except kinds as error:
        sys.exit(f'{tool}: {error}')
    except (KeyError, TypeError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_globals['__name__'].startswith('mmengine.registry'):
            raise
        sys.exit(f'{tool}: invalid config: {error.args[0]}')
    except ImportError as error:
        sys.exit(f'{tool}: {explain_import_error(error)}')
    except KeyboardInterrupt:
        sys.exit(f'{tool}: stopped')


def require_keys(cfg: Config, *names: str) -> None:
    """Raise ValueError if the config lacks one of the keys ``names``."""
    missing = [name for name in names if cfg.get(name) is None]
    if missing:
        raise ValueError(f'{cfg.filename} has no {", ".join(missing)}; this tool needs '
                         f'{", ".join(names)}')


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
    """Return the config of a file, with ``data_root`` and then ``options`` replaced.

    Types that the config imports become names, see :func:`name_types`. Calls
    :func:`patch_mmengine`, so that a base such as ``mmseg::PATH`` is found.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is invalid or of mmdet 2 or mmseg 0, a path in it has a backslash
            that Python reads as part of an escape, or the config lacks what is to be replaced.
    """
    patch_mmengine()
    require_file(path, 'config')
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


def load_config(args: Namespace) -> Config:
    """Return the config that the options of :func:`add_config_arguments` describe.

    With ``--launcher pytorch`` this process then ends with its launcher, and on CPUs it joins the
    job here.

    Raises:
        FileNotFoundError: There is no such config.
        ValueError: As in :func:`read_config`, or the config has no model, or the launcher did not
            start this process.
    """
    rank = RANKS.get(args.launcher)
    if rank and rank not in os.environ:
        raise ValueError(f'--launcher {args.launcher}: {rank} is not in the environment, so this '
                         'process belongs to no job; leave --launcher out, or start with '
                         'tools/dist_train.sh, tools/slurm_train.sh or mpirun')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config, args.cfg_options, args.data_root)
    if 'model' not in cfg:
        raise ValueError(f'{args.config} has no model: expected a config for mmdet or mmseg')
    cfg.launcher = args.launcher
    if cfg.launcher == 'pytorch':
        end_with_launcher()
        if not torch.cuda.is_available():
            start_on_cpus(cfg)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    return cfg


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
