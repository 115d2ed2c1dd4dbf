"""Try an EfficientFormer in the configs of mmdet and mmseg: python tools/dev/check_swaps.py

Of each family, one config is tried for each combination of the types of model, backbone, neck and
heads. Its backbone is swapped, and the model with random weights is trained for a step on random
images and predicts on another, on the CPU.
"""
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from datetime import date
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

import mmdet
import mmseg
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger

from mmeffformer.apis.smoke_test import build_model, train_and_predict
from mmeffformer.apis.swap import find_target, swap_backbone

PAGE = """# Swapped configs

`tools/dev/check_swaps.py` writes this page. It tries [`swap_backbone`](../guides/swap.md) on one
config for each combination of the types of model, backbone, neck and heads in a family. The
backbone becomes {arch}. The model gets random weights, trains for a step on random images, and
predicts on another image, on the CPU. Every parameter of the backbone must get a gradient.

{counts}.
Tried with {versions}; last changed on {date}.

"No verdict" means that the config fails here with its own backbone too, because weights, packages
or compiled operators are missing, or that it takes too long. The whole table takes an hour on two
cores:

```sh
HF_HUB_OFFLINE=1 python tools/dev/check_swaps.py --out docs/results/swaps.md
```

"""
HEAD = '| family | trains and predicts | does not |\n|---|---|---|'
SIZES = 128, 416  # px; some necks need the larger
RESNETS = re.compile('^(ResNe[Xt].*|ResNeSt|Res2Net|RegNet)$')  # they have one interface
PARTS = ('backbone', 'neck', 'bbox_head', 'rpn_head', 'roi_head', 'mask_head', 'panoptic_head',
         'decode_head')


class Result(NamedTuple):
    config: str
    verdict: str  # 'trains', 'refused', 'fails' or 'no verdict'
    reason: str = ''


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='l1', help='arch of the backbone (default: l1)')
    parser.add_argument('--only', nargs='+', metavar='LIBRARY/FAMILY',
                        help='try these families only; --out keeps the rows of the others')
    parser.add_argument('--timeout', type=int, default=300, help='seconds for one config')
    parser.add_argument('--out', type=Path,
                        help='page to write, such as docs/results/swaps.md (default: print the '
                        'table)')
    args = parser.parse_args()

    results: Dict[str, List[Result]] = defaultdict(list)
    for library in ('mmdet', 'mmseg'):
        __import__(f'{library}.models')  # once, before the processes fork
        root = Path(find_spec(library).origin).parent / '.mim' / 'configs'
        for family in sorted(path for path in root.iterdir() if path.name != '_base_'):
            name = f'{library}/{family.name}'
            if args.only and name not in args.only:
                continue
            for path in representatives(family):
                result = Result(path.stem, *try_in_process(path, args.arch, args.timeout))
                results[name].append(result)
                print(name, *result, sep=' | ', file=sys.stderr, flush=True)
    rows = {name: format_row(name, tried) for name, tried in results.items()}
    if not args.out:
        print(HEAD, *rows.values(), sep='\n')
        return
    if args.only and args.out.is_file():
        old = [row for row in args.out.read_text().splitlines() if row.startswith('| mm')]
        rows = {**{row.split('|')[1].strip(): row for row in old}, **rows}
    args.out.write_text(format_page(args.arch, [rows[name] for name in sorted(rows)]))


def format_page(arch: str, rows: List[str]) -> str:
    """Return the page with these rows of the table."""
    table = '\n'.join(rows)
    counts = {verdict: len(re.findall(f'` {verdict}: ', table))
              for verdict in ('refused', 'fails', 'no verdict')}
    trains = sum(row.split('|')[2].count('`') // 2 for row in rows)
    text = ', '.join(f'{number} {verdict}' for verdict, number in counts.items())
    text = f'{trains + sum(counts.values())} configs: {trains} train and predict, {text}'
    versions = ', '.join(f'{module.__name__} {module.__version__.split("+")[0]}'
                         for module in (mmdet, mmseg, torch))
    page = PAGE.format(arch=arch.upper(), counts=text, versions=versions, date=date.today())
    return f'{page}{HEAD}\n{table}\n'


def representatives(family: Path) -> List[Path]:
    """Return a config of a folder for each combination of types, that with the shortest name."""
    chosen: Dict[Tuple[str, ...], Path] = {}
    for path in sorted(family.rglob('*.py'), key=lambda path: (len(str(path)), path)):
        try:
            cfg = Config.fromfile(path, import_custom_modules=False)
        except (OSError, AttributeError):  # its base does not exist
            continue
        if not isinstance(cfg.get('model'), dict):
            continue
        try:
            target = find_target(cfg)
        except ValueError:
            target = cfg.model
        kind = [str(target.get('type'))]
        for key in PARTS:
            parts = target.get(key) or []
            kind += [f'{key} {RESNETS.sub("ResNet", str(part.get("type")))}'
                     for part in (parts if isinstance(parts, list) else [parts])]
        chosen.setdefault(tuple(kind), path)
    return list(chosen.values())


def try_in_process(path: Path, arch: str, timeout: int) -> Tuple[str, str]:
    """Return verdict and reason for a config, tried in a process that may crash or hang."""
    context = get_context('fork')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(try_swap(path, arch)))
    process.start()
    sender.close()  # so that recv() raises EOFError if the process dies
    try:
        if receiver.poll(timeout):
            return receiver.recv()
        return 'no verdict', f'took longer than {timeout} s'
    except EOFError:
        return 'no verdict', 'the process died'
    finally:
        process.kill()
        process.join()


def try_swap(path: Path, arch: str) -> Tuple[str, str]:
    """Return verdict and reason for a config with the new backbone."""
    MMLogger.get_instance('check_swaps').setLevel('ERROR')
    original = Config.fromfile(path)
    try:
        cfg = swap_backbone(original, arch)
    except ValueError as error:
        return 'refused', str(error).splitlines()[0]
    reason = find_fault(cfg)
    if not reason:
        return 'trains', ''
    old_reason = find_fault(original)
    if old_reason:
        return 'no verdict', f'fails with its own backbone too, {old_reason}'
    return 'fails', reason


def find_fault(cfg: Config) -> str:
    """Return the error that the model of a config raises, an empty string if none."""
    for size in SIZES:
        try:
            train_and_predict(cfg, build_model(cfg), size)
            return ''
        except Exception as error:
            reason = shorten(error)
    return reason


def shorten(error: Exception) -> str:
    """Return the first sentence of an error, without addresses and folders of libraries."""
    text = ' '.join(f'{type(error).__name__}: {error}'.split())
    text = re.sub(r"/\S*site-packages/|'https?://\S+' ?", '', text)
    return text.split('. ')[0].split(';')[0][:160]


def format_row(family: str, results: List[Result]) -> str:
    """Return a row of the Markdown table."""
    trained = ', '.join(f'`{result.config}`' for result in results if result.verdict == 'trains')
    others = '; '.join(f'`{result.config}` {result.verdict}: {result.reason}'
                       for result in results if result.verdict != 'trains').replace('|', '/')
    return f'| {family} | {trained} | {others} |'


if __name__ == '__main__':
    main()
