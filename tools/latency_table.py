"""Measure the parts of an EfficientFormer by width, as a lookup table for the search:

  python tools/latency_table.py --runtime openvino --shape 224 224 --out benchmarks/NAME.json

The table is saved while it is measured; the same command resumes an interrupted run. Afterwards,
predictions are compared with measured networks, and a plot of both is saved next to the table.
Nothing else should run on the machine meanwhile.

For a phone, --export-parts writes a file of each part and a list, parts.csv. Time the files on the
phone, fill in the column ms, and make the table of it:

  python tools/latency_table.py --export-parts executorch parts --shape 224 224
  python tools/latency_table.py --import parts/parts.csv --device-name 'Pixel 9' --out phone.json
"""
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from mmeffformer.apis.options import add_timing_arguments, exit_on_error
from mmeffformer.deploy.runtimes import require
from mmeffformer.latency import measuring, phone, validation
from mmeffformer.latency.exported import PACKAGES, require_packages
from mmeffformer.latency.table import LatencyTable, title
from mmeffformer.models.arch import ARCHS, Arch
from mmeffformer.utils.console import print_table, progress_bar
from mmeffformer.utils.plots import agreement


def parse_args():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('--runtime', choices=measuring.RUNTIMES, default='pytorch')
    add_timing_arguments(parser, rounds=7)
    parser.add_argument('--max-widths', nargs=4, type=int, default=ARCHS['l3'].widths,
                        metavar='C', help="largest width of each stage (default: L3's, "
                        f'{" ".join(map(str, ARCHS["l3"].widths))})')
    parser.add_argument('--step', type=int, default=16,
                        help='widths are multiples of it (default: 16)')
    parser.add_argument('--check', type=int, default=20, metavar='N',
                        help='number of random networks that predictions are compared with; 0 '
                        'for no comparison (default: 20)')
    parser.add_argument('--seed', type=int, default=0, help='of these networks')
    parser.add_argument('--out', type=Path, metavar='FILE.json',
                        help='default: benchmarks/latency_RUNTIME_HxW.json')
    parser.add_argument('--export-parts', nargs=2, metavar=('RUNTIME', 'DIR'),
                        help='measure nothing: write files to time on a phone; RUNTIME is '
                        f'{" or ".join(phone.RUNTIMES)}')
    parser.add_argument('--import', dest='times', type=Path, metavar='CSV',
                        help='measure nothing: make the table of the times in this list')
    parser.add_argument('--device-name', metavar='NAME', help='of the phone, with --import')
    return parser.parse_args()


def main():
    args = parse_args()
    if args.export_parts:
        return export_parts(args)
    if args.times:
        return import_times(args)
    with exit_on_error():
        if args.check < 0 or args.check == 1:
            raise ValueError(f'check {args.check}: expected 0, or 2 networks or more')
        header = measuring.new_header(args.runtime, args.shape, args.threads, args.max_widths,
                                      args.step, args.rounds)
        require_packages(args.runtime)
        height, width = args.shape
        out = args.out or Path('benchmarks') / f'latency_{args.runtime}_{height}x{width}.json'
        if out.suffix != '.json':
            raise ValueError(f'{out}: the name of a latency table ends in .json')
        table = measuring.open_table(out, header)
        table.save(out)  # fails now rather than after the measurement
    try:
        with progress_bar() as progress:
            measuring.measure(table, out, progress)
            same = table.check and (table.check['count'], table.check['seed']) == (
                args.check, args.seed)
            if args.check and not same:
                table.check = validation.check(table, args.check, args.seed, progress)
                table.save(out)
    except KeyboardInterrupt:
        missing = f'{len(table.missing())} parts are' if table.missing() else 'the check is'
        raise SystemExit(f'latency_table.py: stopped; {missing} missing. Run the same command to '
                         'resume') from None
    saved = [out]
    if args.check:
        saved.append(out.with_suffix('.png'))
        show(table, saved[-1])
    print(f'saved {" and ".join(map(str, saved))}: {len(table.entries)} entries')


def export_parts(args):
    """Write the parts of a table as files for a phone."""
    runtime, folder = args.export_parts[0], Path(args.export_parts[1])
    with exit_on_error():
        header = phone.phone_header(runtime, args.shape, args.max_widths, args.step)
        for package in PACKAGES[runtime]:
            require(package, runtime)
        with progress_bar() as progress:
            listed = phone.export_parts(header, folder, progress)
    print(f'saved {listed}: fill in the ms of {len(phone.rows_of(header))} files in {folder}')


def import_times(args):
    """Make a table of a phone's times, and report how well it predicts the reference network."""
    with exit_on_error():
        if not args.device_name:
            raise ValueError('--import needs --device-name, the name of the phone')
        table = phone.import_times(args.times, args.device_name)
        height, width = table.header['shape']
        out = args.out or Path('benchmarks') / (
            f'latency_{table.header["runtime"]}_phone_{height}x{width}.json')
        if out.suffix != '.json':
            raise ValueError(f'{out}: the name of a latency table ends in .json')
        table.save(out)
    predicted = table.predict(Arch(*table.header['reference']))
    print(f'reference network: {predicted:.4g} ms predicted, '
          f'{table.header["reference_ms"]:.4g} ms measured')
    print(f'saved {out}: {len(table.entries)} entries')


def show(table: LatencyTable, picture: Path):
    """Print predicted and measured times, and plot them."""
    found, where = table.check, title(table.header)
    networks = found['networks']
    summary = (f'median absolute error {found["median_error"]:.1%}, Spearman '
               f'{found["spearman"]:.3f}, {len(networks)} networks')
    rows = [[each['name'], *(' '.join(map(str, each[name]))
                             for name in ('widths', 'depths', 'attention_blocks')),
             f'{each["predicted_ms"]:.4g}', f'{each["measured_ms"]:.4g}',
             f'{each["q1"]:.4g}–{each["q3"]:.4g}',
             f'{each["predicted_ms"] / each["measured_ms"] - 1:+.1%}'] for each in networks]
    print_table(f'{where}: predicted and measured',
                ['network', 'widths', 'depths', 'MB3D', 'predicted, ms', 'measured, ms',
                 'quartiles', 'error'], rows, summary)
    agreement([(each['name'], each['predicted_ms'], each['measured_ms']) for each in networks],
              picture, where, summary)


if __name__ == '__main__':
    main()
