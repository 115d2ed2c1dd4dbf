"""Try a backbone of ours in the configs of mmdet and mmseg: python tools/check_hosts.py --arch l1

Of each family of configs those are tried that differ in their model's, backbone's, neck's or a
head's type. Each is swapped, built, trained for a step on random images and asked for a
prediction, on a CPU and without any weights.
"""
import multiprocessing
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

from mmengine.config import Config
from mmengine.logging import MMLogger

from mmeffformer.apis import hosts
from mmeffformer.apis.swap import find_host, swap_backbone

TABLE = '<!-- What follows is written by tools/check_hosts.py. -->\n'
HEAD = '| family | trains and predicts | does not |\n|---|---|---|'
SIZES = 128, 416  # px; some necks need the larger
RESNETS = re.compile('^(ResNe[Xt].*|ResNeSt|Res2Net|RegNet)$')  # of one interface
PARTS = ('backbone', 'neck', 'bbox_head', 'rpn_head', 'roi_head', 'mask_head', 'panoptic_head',
         'decode_head')


class Row(NamedTuple):
    config: str
    result: str  # 'trains', 'refused', 'fails' or 'no verdict'
    reason: str = ''


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='l1', help='arch of the backbone (default: l1)')
    parser.add_argument('--only', nargs='+', metavar='LIBRARY/FAMILY',
                        help='these families alone, as mmdet/retinanet; the rows of the others '
                        'stay in --out')
    parser.add_argument('--timeout', type=int, default=300, help='seconds for one config')
    parser.add_argument('--out', type=Path, help='page at whose end the table is written anew '
                        '(default: it is printed)')
    args = parser.parse_args()

    rows: Dict[str, List[Row]] = {}
    fork = multiprocessing.get_context('fork')
    for library in ('mmdet', 'mmseg'):
        __import__(f'{library}.models')
        root = Path(find_spec(library).origin).parent / '.mim' / 'configs'
        for family in sorted(path for path in root.iterdir() if path.name != '_base_'):
            name = f'{library}/{family.name}'
            if args.only and name not in args.only:
                continue
            for path in representatives(family):
                # A process of its own, which may die or hang.
                receiver, sender = fork.Pipe(duplex=False)
                process = fork.Process(target=trial, args=(path, args.arch, sender))
                process.start()
                sender.close()  # so that its death is noticed
                result = ('no verdict', f'took longer than {args.timeout} s')
                if receiver.poll(args.timeout):
                    try:
                        result = receiver.recv()
                    except EOFError:
                        result = ('no verdict', 'the process died')
                process.kill()
                process.join()
                rows.setdefault(name, []).append(Row(path.stem, *result))
                print(name, *rows[name][-1], sep=' | ', file=sys.stderr, flush=True)
    lines = {family: line(family, tried) for family, tried in rows.items()}
    if not args.out:
        print(HEAD, *lines.values(), sep='\n')
        return
    text, _, table = args.out.read_text().partition(TABLE)
    old = {row.split('|')[1].strip(): row for row in table.splitlines()[2:] if args.only}
    lines = dict(sorted({**old, **lines}.items()))
    args.out.write_text('\n'.join([f'{text}{TABLE}{HEAD}', *lines.values(), '']))


def representatives(family: Path) -> List[Path]:
    """The configs of a folder whose models are of different types, the simplest of each kind."""
    chosen: Dict[Tuple, Path] = {}
    for path in sorted(family.rglob('*.py'), key=lambda path: (len(str(path)), path)):
        try:
            cfg = Config.fromfile(path, import_custom_modules=False)
        except (OSError, AttributeError):  # inherits from a file that is not there
            continue
        if not isinstance(cfg.get('model'), dict):
            continue
        try:
            host = find_host(cfg)
        except ValueError:
            host = cfg.model
        kind = [str(host.get('type'))]
        for key in PARTS:
            part = host.get(key) or []
            kind += [f'{key} {RESNETS.sub("ResNet", str(one.get("type")))}' for one in
                     (part if isinstance(part, list) else [part])]
        chosen.setdefault(tuple(kind), path)
    return list(chosen.values())


def trial(path: Path, arch: str, sender):
    """Send what becomes of a config with the backbone: the result and the reason for it."""
    MMLogger.get_instance('check_hosts').setLevel('ERROR')
    original = Config.fromfile(path)
    try:
        cfg = swap_backbone(original, arch)
    except ValueError as error:
        return sender.send(('refused', str(error).splitlines()[0]))
    reason = attempt(cfg)
    if not reason:
        return sender.send(('trains', ''))
    with_its_own = attempt(original)
    if with_its_own:
        return sender.send(('no verdict', f'fails with its own backbone too, {with_its_own}'))
    return sender.send(('fails', reason))


def attempt(cfg: Config) -> str:
    """Build a config's model and try it; return what goes wrong with it."""
    try:
        model = hosts.build(cfg)
    except Exception as error:
        return told(error)
    for size in SIZES:
        try:
            hosts.step(cfg, model, size)
            return ''
        except Exception as error:
            reason = told(error)
    return reason


def told(error: Exception) -> str:
    """The first sentence of an error, without addresses and the place of the libraries."""
    text = ' '.join(f'{type(error).__name__}: {error}'.split())
    text = re.sub(r"/\S*site-packages/|'https?://\S+' ?", '', text)
    return text.split('. ')[0].split(';')[0][:160]


def line(family: str, tried: List[Row]) -> str:
    """A row of the Markdown table."""
    trained = ', '.join(f'`{row.config}`' for row in tried if row.result == 'trains')
    other = '; '.join(f'`{row.config}` {row.result}: {row.reason}' for row in tried
                      if row.result != 'trains').replace('|', '/')
    return f'| {family} | {trained} | {other} |'


if __name__ == '__main__':
    main()
