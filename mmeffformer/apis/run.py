"""Run a command whose Python programs find the operators that mmcv lacks."""
import os
import sys
from argparse import REMAINDER
from typing import Any, Dict, List

from .. import ops

LAUNCH = 'python -m mmeffformer run COMMAND'
EXAMPLE = LAUNCH.replace('COMMAND', 'python my_script.py')


def environment() -> Dict[str, str]:
    """Return the environment in which Python starts with :mod:`mmeffformer.ops`.

    Programs in the folder of this interpreter go before others of the same name, as in an
    activated environment.
    """
    paths = {'PATH': os.path.dirname(sys.executable), 'PYTHONPATH': ops.STARTUP}
    return {**os.environ, **{name: os.pathsep.join(filter(None, [folder, os.environ.get(name)]))
                             for name, folder in paths.items()}}


def run(command: List[str]) -> int:
    """Replace this process by ``command``.

    Returns:
        127 if there is no such program and 126 if it cannot be run, as shells do.
    """
    sys.stdout.flush()
    try:
        os.execvpe(command[0], command, environment())
    except OSError as error:
        print(f'{command[0]}: {error.strerror}; expected a program with its arguments, for '
              f'example: {EXAMPLE}', file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126


def add_command(commands: Any) -> None:
    """Add the command ``run`` to what ``ArgumentParser.add_subparsers`` returned."""
    parser = commands.add_parser('run', help=__doc__, usage='%(prog)s COMMAND ...',
                                 description=f'{__doc__} For example: {EXAMPLE}')
    parser.add_argument('command', nargs=REMAINDER, metavar='COMMAND ...',
                        help='a program and its arguments')

    def start(args: Any) -> int:
        command = args.command[args.command[:1] == ['--']:]
        if not command:
            parser.error(f'expected a command, for example: {EXAMPLE}')
        return run(command)

    parser.set_defaults(run=start)
