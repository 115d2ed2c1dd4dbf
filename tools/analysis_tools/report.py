"""Published and measured figures side by side: python tools/analysis_tools/report.py work_dirs

The published ones are in the metafiles, the measured ones in work dirs of train.py and test.py.
"""
import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

from mmeffformer.apis import report
from mmeffformer.apis.options import exit_on_error
from mmeffformer.utils.files import atomic_write


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('work_dirs', nargs='?', type=Path, metavar='DIR',
                        help='folder that holds work dirs (default: no measured figures)')
    parser.add_argument('--models', nargs='+', default=['*'], metavar='PATTERN',
                        help="names of models, such as 'maskrcnn_*' (default: all)")
    parser.add_argument('--count', action='store_true',
                        help='count parameters and multiply-accumulates too')
    parser.add_argument('--table2', action='store_true',
                        help="print the published figures only, laid out as the paper's Table 2")
    parser.add_argument('--json', type=Path, metavar='FILE', help='also save the report as JSON')
    args = parser.parse_args()
    with exit_on_error((ValueError, OSError, ImportError)):
        known = report.read_models()
        models = {name: model for name, model in known.items()
                  if any(fnmatchcase(name, pattern) for pattern in args.models)}
        if not models:
            raise ValueError(f'--models {" ".join(args.models)}: no such model; choose from '
                             + ', '.join(known))
        if args.table2:
            print(report.published_table(models.values()))
            return
        measurements, problems = (report.read_measurements(args.work_dirs, models)
                                  if args.work_dirs else ([], []))
        if args.count:
            measurements += map(report.count, models.values())
        print(report.markdown_report(models.values(), measurements, problems), end='')
        if args.json:
            with atomic_write(args.json) as path:
                path.write_text(json.dumps(dict(
                    models=list(map(asdict, models.values())), problems=problems,
                    measurements=list(map(asdict, measurements))), indent=1, default=str))


if __name__ == '__main__':
    main()
