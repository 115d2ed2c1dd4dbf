"""Options and config loading shared by the command lines in ``tools/``."""
import os
import sys
import traceback
from argparse import ArgumentParser, Namespace
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Optional, Tuple, Type, Union

import torch
from mmengine.config import Config, DictAction

from ..engine.configs import read_config
from ..engine.configs import require_file as require_file
from ..engine.configs import set_data_root as set_data_root
from ..engine.launch import end_with_launcher, start_on_cpus
from ..utils.errors import explain_import_error

# The variable with the rank of a process, by launcher.
RANKS = {'pytorch': 'RANK', 'slurm': 'SLURM_PROCID', 'mpi': 'OMPI_COMM_WORLD_RANK'}
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
