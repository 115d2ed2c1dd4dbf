"""Check the installation and the data sets, with a remedy for each problem."""
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import torch
import torchvision
from mmengine.config import Config
from rich.console import Console
from rich.table import Table

from .. import ops
from ..datasets import check_dataset
from ..version import __version__
from .options import set_data_root
from .run import LAUNCH

# Import name: distributions of the original, distributions of the maintained fork.
OPENMMLAB = {
    'mmengine': (('mmengine', 'mmengine-lite'), ('onedl-mmengine',)),
    'mmcv': (('mmcv', 'mmcv-lite', 'mmcv-full'), ('onedl-mmcv',)),
    'mmdet': (('mmdet',), ('onedl-mmdetection',)),
    'mmseg': (('mmsegmentation',), ('onedl-mmsegmentation',)),
    'mmpretrain': (('mmpretrain',), ('onedl-mmpretrain',)),
}
INSTALL = 'pip install "mmeffformer[onedl]" (forks) or "mmeffformer[openmmlab]" (originals)'

# Folder under data/: a config that reads it.
DATA = {'coco': 'detection/maskrcnn_effformer_l1.py',
        'ade/ADEChallengeData2016': 'segmentation/semfpn_effformer_l1.py'}


class Finding(NamedTuple):
    """A line of the report; ``remedy`` is empty if there is no problem."""

    subject: str
    found: str
    remedy: str = ''


def examine(data: Path) -> Iterator[Finding]:
    """Yield the findings about this environment and the data sets under ``data``."""
    yield Finding('mmeffformer', __version__)
    yield Finding('Python', sys.version.split()[0], '' if (3, 10) <= sys.version_info < (3, 13)
                  else 'use Python 3.10, 3.11 or 3.12')
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'
    yield Finding('torch', f'{torch.__version__}, torchvision {torchvision.__version__}, {gpu}')
    for module in OPENMMLAB:
        yield _library(module)
    yield _operators()
    for scope in ('mmdet', 'mmseg', 'mmpretrain'):
        if find_spec(scope):
            yield _registry(scope)
    for folder, config in DATA.items():
        yield _data(config, data / folder)


def _installed(distribution: str) -> str:
    try:
        return f'{distribution} {version(distribution)}'
    except PackageNotFoundError:
        return ''


def _library(module: str) -> Finding:
    originals, forks = (list(filter(None, map(_installed, names))) for names in OPENMMLAB[module])
    found = ', '.join(originals + forks) or 'not installed'
    if originals and forks:
        names = ' '.join(line.split()[0] for line in originals + forks)
        return Finding(module, found, 'two distributions share one folder: pip uninstall '
                       f'{names}, then install one of them again')
    if not originals + forks:
        # mmpretrain is optional, and one of mmdet and mmseg is enough.
        needed = module == 'mmcv' or module in ('mmdet', 'mmseg') and not (
            find_spec('mmdet') or find_spec('mmseg'))
        return Finding(module, found, INSTALL if needed else '')
    try:
        import_module(module)
    except Exception as error:
        return Finding(module, f'{found}: {error}',
                       f'the versions are incompatible; {INSTALL} installs compatible ones')
    return Finding(module, found)


def _operators() -> Finding:
    source, reason = ops.diagnose()
    found = {'compiled': 'compiled, of mmcv',
             'torchvision': 'of mmeffformer, built on torchvision; mmcv has no compiled ones. '
                            f'{LAUNCH} gives them to programs that do not import mmeffformer',
             'broken': f'mmcv._ext cannot be loaded: {reason}',
             'absent': 'none, mmcv is not installed'}[source]
    remedy = {'broken': 'pip uninstall this mmcv and install one built for this torch, or '
                        'one without compiled operators', 'absent': INSTALL}
    return Finding('operators', found, remedy.get(source, ''))


def _registry(scope: str) -> Finding:
    subject = f'in {scope} configs'
    try:
        models = import_module(f'{scope}.registry').MODELS
        names = [name for name in ('EfficientFormer', 'EfficientFormerV2')
                 if models.get(f'mmeffformer.{name}')]
    except Exception as error:
        return Finding(subject, f'{type(error).__name__}: {error}',
                       f'run python -c "import {scope}" to see the cause')
    if not names:
        return Finding(subject, 'the backbones are not found', 'another package may use the scope '
                       'mmeffformer: pip uninstall mmeffformer, then install it again')
    return Finding(subject, ', '.join(f"type='mmeffformer.{name}'" for name in names))


def _data(config: str, root: Path) -> Finding:
    subject = f'data {root}'
    if not root.exists():
        return Finding(subject, 'not found; needed only to train or evaluate on it')
    cfg = Config.fromfile(Path(__file__).parents[1] / '.mim' / 'configs' / config)
    set_data_root(cfg, str(root))
    try:
        check_dataset(cfg, splits=('train', 'val'))
    except FileNotFoundError as error:
        return Finding(subject, 'incomplete', str(error))
    return Finding(subject, 'complete')


def add_command(commands: Any) -> None:
    """Add the command ``doctor`` to what ``ArgumentParser.add_subparsers`` returned."""
    parser = commands.add_parser('doctor', help=__doc__.splitlines()[0], description=__doc__)
    parser.add_argument('--data', type=Path, default=Path('data'),
                        help='folder that holds coco/ and ade/ (default: data)')
    parser.set_defaults(run=lambda args: report(args.data))


def report(data: Path) -> int:
    """Print the findings and the remedies. Return 1 if there are problems, else 0."""
    findings = list(examine(data))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for finding in findings:
        mark = '[red]problem[/]' if finding.remedy else '[green]ok[/]'
        table.add_row(mark, finding.subject, finding.found)
    console = Console()
    console.print(table)
    problems = [finding for finding in findings if finding.remedy]
    for number, finding in enumerate(problems, 1):
        console.print(f'\n{number}. {finding.subject}: {finding.remedy}', soft_wrap=True,
                      markup=False)
    return min(len(problems), 1)
