"""Command line of the package: ``python -m mmeffformer doctor`` and ``run``."""
import sys
from argparse import ArgumentParser

from .apis import doctor, run


def main() -> int:
    """Run the command of the command line and return its exit code."""
    parser = ArgumentParser(prog='python -m mmeffformer')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    doctor.add_command(commands)
    run.add_command(commands)
    args = parser.parse_args()
    return args.run(args)


if __name__ == '__main__':
    sys.exit(main())
