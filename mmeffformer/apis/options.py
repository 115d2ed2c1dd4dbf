"""What the command lines in ``tools/`` share: options, and the config they make."""
import multiprocessing
import os
import re
import sys
import traceback
from argparse import ArgumentParser, Namespace
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Iterator, Optional, Tuple, Type, Union

import torch
from mmengine.config import Config, ConfigDict, DictAction

from ..engine.launch import end_with_launcher, start_on_cpus

# What tells a process of a job its number, by what starts it.
RANKS = {'pytorch': 'RANK', 'slurm': 'SLURM_PROCID', 'mpi': 'OMPI_COMM_WORLD_RANK'}
Errors = Union[Type[Exception], Tuple[Type[Exception], ...]]


class KeyValues(DictAction):
    """mmengine's ``KEY=VALUE``, where what is none is told."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if '=' not in value[1:]:
                parser.error(f'{option_string}: {value!r} is no KEY=VALUE')
        super().__call__(parser, namespace, values, option_string)


def add_config_arguments(parser: ArgumentParser) -> None:
    """Add the options that :func:`load_config` reads, as mmdet's and mmseg's tools have them."""
    parser.add_argument('config', help='config file of mmdet or mmseg form')
    parser.add_argument('--work-dir', help='where logs and checkpoints go '
                        '(default: work_dirs/ and the name of the config)')
    parser.add_argument('--data-root', help='use this folder wherever the config names its '
                        'data_root')
    parser.add_argument('--cfg-options', nargs='+', action=KeyValues, metavar='KEY=VALUE',
                        help='override config values, for example model.backbone.arch=l3 '
                        'or key="[a,b]"')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'],
                        default='none', help='what starts the processes of one job')
    # torchrun's predecessor passes this to every process.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


@contextmanager
def exit_on_error(kinds: Errors = (ValueError, OSError)) -> Iterator[None]:
    """End the program with the message alone where one of ``kinds`` is raised.

    By default these are ValueError and OSError, for what a tool does with its
    arguments, where the user is at fault; errors of the work itself keep their
    traceback. A config that names an unknown type or argument is the user's fault too.
    """
    tool = Path(sys.argv[0]).name
    try:
        yield
    except kinds as error:
        sys.exit(f'{tool}: {error}')
    except (KeyError, TypeError) as error:
        if not _of_config(error):
            raise
        sys.exit(f'{tool}: the config does not fit: {error.args[0]}')
    except KeyboardInterrupt:
        sys.exit(f'{tool}: stopped')


def _of_config(error: Exception) -> bool:
    """Whether what a config names could not be found, or does not take the arguments it gives."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if not unexpected:
        return _module(frames[-1]).startswith('mmengine.registry')
    # Maybe handed on to a base class. What the config does not give is a mistake of the code.
    given = (value for frame in frames for value in frame.f_locals.values()
             if _builds(frame) and isinstance(value, dict))
    return any(unexpected[1] in value for value in given)


def _module(frame: FrameType) -> str:
    return frame.f_globals.get('__name__', '')


def _builds(frame: FrameType) -> bool:
    """Whether it is of a function of mmengine that builds something from a config."""
    return _module(frame).startswith('mmengine.registry') or (
        _module(frame).startswith('mmengine.runner')
        and frame.f_code.co_name in ('__init__', 'build_dataloader'))


def require_file(path: str, what: str) -> str:
    """Return ``path`` if it is a file or a URL, else raise a FileNotFoundError."""
    if not Path(path).is_file() and '://' not in path:
        raise FileNotFoundError(f'{what} {path!r} does not exist')
    return path


def read_config(path: str, options: Optional[dict] = None,
                data_root: Optional[str] = None) -> Config:
    """Return the config of a file, with ``data_root`` and then ``options`` in place of its own.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no Python, or has nothing that an option or ``data_root`` replaces.
    """
    require_file(path, 'config')
    try:
        cfg = Config.fromfile(path)
    except SyntaxError as error:
        raise ValueError(f'{path}, or a base of it, is no valid Python: {error}') from error
    if data_root:
        set_data_root(cfg, data_root)
    try:
        cfg.merge_from_dict(options or {})
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f'{path} has no place for these options: {options} '
                         f'({error.args[0]})') from error
    return cfg


def load_config(args: Namespace) -> Config:
    """Return the config of the arguments that :func:`add_config_arguments` added.

    Raises:
        FileNotFoundError: There is no such config.
        ValueError: As of :func:`read_config`, or it has no model, or nothing has started this
            process as the launcher does.
    """
    rank = RANKS.get(args.launcher)
    if rank and rank not in os.environ:
        raise ValueError(f'--launcher {args.launcher}: {rank} is not in the environment, so this '
                         'process is of no job; leave --launcher out, or start with '
                         'tools/dist_train.sh, tools/slurm_train.sh or mpirun')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config, args.cfg_options, args.data_root)
    if 'model' not in cfg:
        raise ValueError(f'{args.config} has no model: expected a config of mmdet or mmseg form')
    cfg.launcher = args.launcher
    if cfg.launcher == 'pytorch':
        end_with_launcher()
        if not torch.cuda.is_available():
            start_on_cpus(cfg)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    return cfg


def is_local_main_process(args: Namespace) -> bool:
    """Return whether this is the one process of its machine that does what one is enough for."""
    number = 'SLURM_LOCALID' if args.launcher == 'slurm' else 'LOCAL_RANK'
    return os.environ.get(number, '0') == '0'


def finish_distributed() -> None:
    """End this process with success, once all of its job have come this far.

    On CPUs, of several processes one now and then aborts when it ends in the ordinary
    way (gloo's threads, torch 2.12), and the job would count as failed.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == 'gloo':
        torch.distributed.barrier()
        for worker in multiprocessing.active_children():  # of dataloaders
            worker.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def set_data_root(cfg: Config, data_root: str) -> None:
    """Replace the config's ``data_root`` by another wherever a value starts with it."""
    old = cfg.get('data_root')
    if not old:
        raise ValueError(f'{cfg.filename} has no data_root to replace; set the paths one by one '
                         'with --cfg-options train_dataloader.dataset.data_root=...')
    new = os.path.join(data_root, '')

    def replaced(value: Any) -> Any:
        if isinstance(value, str):
            inside = value == old or value.startswith(os.path.join(old, ''))
            return os.path.join(new, value[len(old):].lstrip('/')) if inside else value
        if isinstance(value, (list, tuple)):
            return type(value)(map(replaced, value))
        if isinstance(value, dict):
            return ConfigDict({key: replaced(item) for key, item in value.items()})
        return value

    for key in list(cfg):
        cfg[key] = replaced(cfg[key])
