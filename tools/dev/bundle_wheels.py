"""Bundle what a GPU machine without a network lacks, as wheels, and print how to use them there:

  python tools/dev/bundle_wheels.py --present pip_freeze.txt --out wheels

Versions are those of this environment, which `make env` builds from requirements/. --present names
the packages that the machine has, for example a file with the output of its `pip freeze`.
"""
import re
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Dict, Iterable, Iterator, Set

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mmeffformer.apis.options import exit_on_error

PROJECT = 'mmeffformer'
# mmpretrain imports transformers where it is there, and not every version of it works.
WANTED = (f'{PROJECT}[onedl]', 'timm', 'transformers', 'pytest', 'pytest-xdist', 'hypothesis')
PRESENT = ('torch', 'torchvision', 'timm')
# glibc versions that wheels are built for: pip matches each exactly.
PLATFORMS = [*(f'manylinux_2_{minor}_x86_64' for minor in range(35, 4, -1)),
             'manylinux2014_x86_64', 'manylinux2010_x86_64', 'manylinux1_x86_64']
MIB = 2 ** 20


def parse_args():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('--present', nargs='+', default=list(PRESENT), metavar='NAME',
                        help='packages that the machine has, with what they need, or files that '
                        f'list all of them (default: {" ".join(PRESENT)})')
    parser.add_argument('--python', default='3.12', help='its Python (default: 3.12)')
    parser.add_argument('--limit', type=float, default=64, metavar='MIB',
                        help='largest size of all wheels together (default: 64)')
    parser.add_argument('--out', type=Path, default=Path('wheels'), metavar='DIR',
                        help='folder for the wheels; others in it are deleted (default: wheels)')
    return parser.parse_args()


def read_present(names: Iterable[str], python: str) -> Set[str]:
    """Return packages, given by name with what they need, or in files as pip freezes them.

    Raises:
        ValueError: A name is neither a file nor an installed package.
    """
    found: Set[str] = set()
    for name in names:
        if Path(name).is_file():
            found.update(re.findall(r'^\w[\w.-]*', Path(name).read_text(), re.M))
        elif packages := needs([name], python):
            found.update(packages)
        else:
            raise ValueError(f'--present {name}: neither a file nor an installed package')
    return {*map(canonicalize_name, found)}


def needs(wanted: Iterable[str], python: str, present: Iterable[str] = ()) -> Dict[str, str]:
    """Return the version of each installed package that some requirements lead to, by name.

    Packages that are ``present`` are left out, with what only they need.
    """
    versions: Dict[str, str] = {}
    pending, seen = [*map(Requirement, wanted)], set()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) in seen or name in present:
            continue
        seen.add((name, *sorted(requirement.extras)))
        try:
            found = distribution(name)
        except PackageNotFoundError:  # installed without it, so nothing uses it
            continue
        versions[name] = found.version
        pending += _required(found.requires or (), requirement.extras, python)
    return versions


def _required(lines: Iterable[str], extras: Set[str], python: str) -> Iterator[Requirement]:
    for requirement in map(Requirement, lines):
        environments = [dict(python_version=python, python_full_version=f'{python}.0',
                             sys_platform='linux', platform_system='Linux',
                             platform_machine='x86_64', os_name='posix', extra=extra)
                        for extra in ('', *extras)]
        if not requirement.marker or any(map(requirement.marker.evaluate, environments)):
            yield requirement


def fetch(name: str, version: str, python: str, out: Path) -> None:
    """Save the wheel of a package, built here if it has no wheel and no compiled code.

    Raises:
        ValueError: There is no wheel for the machine.
    """
    pip, package = [sys.executable, '-m', 'pip'], f'{name}=={version}'
    where = [part for platform in PLATFORMS for part in ('--platform', platform)]
    download = subprocess.run([
        *pip, 'download', '-q', '--no-deps', '--only-binary=:all:', '--python-version', python,
        '--implementation', 'cp', *where, '-d', out, package], capture_output=True, text=True)
    if download.returncode == 0:
        return
    before = {*out.iterdir()}
    subprocess.run([*pip, 'wheel', '-q', '--no-deps', '-w', out, package], capture_output=True)
    built = {*out.iterdir()} - before
    if not built or any(not file.name.endswith('-none-any.whl') for file in built):
        raise ValueError(f'{package} has no wheel for Python {python} on Linux x86-64, and none '
                         f'without compiled code can be built: {download.stderr.strip()}')


def main():
    args = parse_args()
    with exit_on_error():
        missing = needs(WANTED, args.python, read_present(args.present, args.python))
        del missing[PROJECT]
        args.out.mkdir(parents=True, exist_ok=True)
        for old in args.out.glob('*.whl'):
            old.unlink()
        for name, version in sorted(missing.items()):
            fetch(name, version, args.python, args.out)
            print(f'{name} {version}', flush=True)
        sizes = {file.name: file.stat().st_size / MIB for file in args.out.glob('*.whl')}
        total = sum(sizes.values())
        print(f'{len(sizes)} wheels, {total:.1f} MiB, in {args.out}')
        if total > args.limit:
            largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:3]
            raise ValueError(f'{total:.1f} MiB is more than --limit {args.limit:g}. Name with '
                             f'--present what the machine has, such as {", ".join(largest)}')
    print(f'On the machine, in a copy of this folder with {args.out}:\n\n'
          f'  python3 -m pip install --no-index --no-deps --target site {args.out}/*.whl\n'
          '  python3 -m pip install --no-index --no-deps --no-build-isolation -e .\n'
          '  PYTHONPATH=site python3 tools/gpu_check.py\n')


if __name__ == '__main__':
    main()
