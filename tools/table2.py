"""Table 2 of the paper: python tools/table2.py plan; python tools/table2.py report

plan prints the commands that measure it; report prints what has been measured, beside the paper's
figures, and where it comes from.
"""
import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import redirect_stdout
from pathlib import Path
from warnings import catch_warnings, simplefilter

from rich.console import Console
from rich.progress import track

from mmeffformer.apis import table2
from mmeffformer.apis.options import exit_on_error
from mmeffformer.apis.runs import read_runs
from mmeffformer.utils import plots

ROOT = Path(__file__).resolve().parents[1]


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    for name, text in (('plan', 'print the commands, a shell script'),
                       ('report', 'print the table, in markdown')):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument('--task', choices=table2.TASKS,
                             help='only Mask R-CNN (det) or Semantic FPN (seg)')
        command.add_argument('--row', nargs='+', metavar='NAME',
                             help='only these rows: '
                             + ', '.join(row.config for row in table2.ROWS))
    plan, report = (commands.choices[name] for name in ('plan', 'report'))
    plan.add_argument('--gpus', type=int, metavar='N', help='GPUs to train and test on; where '
                      'the recipe is for another number, the learning rate is scaled')
    report.add_argument('work_dirs', nargs='?', type=Path,
                        help='folder with the work dirs of training and evaluation '
                        '(default: work_dirs)')
    report.add_argument('--markdown', type=Path, metavar='FILE', help='also save the table here')
    report.add_argument('--json', type=Path, metavar='FILE', help='save it for programs')
    report.add_argument('--plot', type=Path, metavar='FILE.png',
                        help='save a plot of AP and mIoU against MACs')
    args = parser.parse_args()
    if args.command == 'plan' and args.gpus is not None and args.gpus < 1:
        parser.error(f'--gpus {args.gpus}: expected 1 or more')

    tasks = [args.task] if args.task else list(table2.TASKS)
    with exit_on_error():
        rows = table2.find_rows(args.row)
        if args.command == 'plan':
            print('# To be run where configs/ and tools/ are.')
            for line in table2.plan(ROOT, rows, tasks, args.gpus):
                print(line)
            return
        if args.work_dirs or Path('work_dirs').exists():
            runs, notes = read_runs(args.work_dirs or 'work_dirs',
                                    table2.config_names(rows, tasks))
        else:
            runs, notes = [], ['there is no folder work_dirs here, so nothing has been measured']
        entries, left_out = table2.collect(ROOT, runs, rows, tasks)
        notes += left_out

    # What the libraries say while models are built has no place in the table.
    with redirect_stdout(sys.stderr), catch_warnings():
        simplefilter('ignore')
        for entry in track(entries, 'counting', console=Console(stderr=True), transient=True):
            config = ROOT / table2.TASKS[entry.task].config.format(entry.row.config)
            try:
                entry.network = table2.count(config, table2.TASKS[entry.task].shape)
            except ImportError as error:
                notes.append(f'{config.name} cannot be built here, so is not counted: {error}')
    text = table2.markdown(entries, notes)
    print(text, end='')
    saved = []
    if args.markdown:
        saved.append(args.markdown)
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(text)
    if args.json:
        saved.append(args.json)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(table2.as_json(entries, notes), indent=1))
    if args.plot:
        saved.append(args.plot)
        columns = {'det': ('box AP', 'mask AP'), 'seg': ('mIoU',)}
        plots.tradeoff({
            (table2.TASKS[task].title, f'{column}, %'): table2.marks(
                [entry for entry in entries if entry.task == task], column)
            for task in tasks for column in columns[task]},
            'GMACs of the backbone at 224 x 224', args.plot)
    if saved:
        print(f'saved {", ".join(map(str, saved))}', file=sys.stderr)


if __name__ == '__main__':
    main()
