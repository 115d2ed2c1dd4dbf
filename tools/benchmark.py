"""Time backbones of this project and of timm, and whole models, interleaved in rounds:

  python tools/benchmark.py l1 l3:legacy,unfused,nchw timm:resnet50 --runtimes pytorch openvino \\
      --shape 800 1344 --out benchmarks/NAME

A model is NAME or NAME:OPTION,OPTION. Options are variants (legacy, unfused, nchw; with --mode
train also with_cp), runtimes and precisions; --runtimes and --dtype are for models that name none.
The config of a detector or segmentor is a whole model, with the variants unfused, nchw and plain.
The folder --out receives results.json, results.md and accuracy.png.
"""
import json
import os
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from datetime import datetime
from functools import partial
from pathlib import Path

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler logs every start and stop

import torch  # noqa: E402

from mmeffformer.apis import inference  # noqa: E402
from mmeffformer.apis.options import (  # noqa: E402
    add_timing_arguments,
    exit_on_error,
    read_config,
    require_file,
)
from mmeffformer.apis.report import (  # noqa: E402
    read_library_published,
    read_peers,
    read_published,
)
from mmeffformer.latency import benchmark, end_to_end  # noqa: E402
from mmeffformer.latency.candidates import DTYPES, RUNTIMES, Setting, candidates  # noqa: E402
from mmeffformer.latency.results import load, markdown, notes, title  # noqa: E402
from mmeffformer.utils import plots  # noqa: E402
from mmeffformer.utils.console import print_table, progress_bar  # noqa: E402
from mmeffformer.utils.markdown import markdown_table  # noqa: E402

# Axis label, and the metafiles' names of model and metric, where {} is the network's name.
ACCURACIES = {
    'top1': ('ImageNet-1K top-1, %', '{}', 'Top 1 Accuracy 300 Epochs'),
    'box_ap': ('Mask R-CNN 1x, COCO box AP, %', 'maskrcnn_{}', 'box AP'),
    'mask_ap': ('COCO mask AP, %', 'maskrcnn_{}', 'mask AP'),
    'miou': ('Semantic FPN, ADE20K mIoU, %', 'semfpn_{}', 'mIoU'),
}


def parse_args():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', metavar='MODEL',
                        help='l1, l3, l7, s0, s1, s2, l, timm:NAME, or the config of a whole '
                        'model (a file or mmdet::PATH), with options after a colon')
    parser.add_argument('--runtimes', nargs='+', choices=RUNTIMES, default=['pytorch'],
                        metavar='NAME', help=f'{", ".join(RUNTIMES)} (default: pytorch)')
    parser.add_argument('--baseline', nargs='+', metavar='MODEL',
                        help='compare all with these, which are timed too (default: the first)')
    add_timing_arguments(parser, rounds=15)
    parser.add_argument('--batch', type=int, default=1, help='images at once (default: 1)')
    parser.add_argument('--mode', choices=['inference', 'train'], default='inference',
                        help='train: forward and backward of a training step')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument('--dtype', choices=DTYPES, default='fp32',
                        help='bf16 and fp16 through autocast (default: fp32)')
    parser.add_argument('--seed', type=int, default=0, help='of the order within rounds')
    parser.add_argument('--accuracy', choices=ACCURACIES, default='top1',
                        help='published figure that times are plotted against (default: top1)')
    parser.add_argument('--out', type=Path, metavar='DIR',
                        help='default: benchmarks/ and the time')
    parser.add_argument('--render', action='store_true',
                        help='time nothing: make table and plot from the results.json in --out')
    parser.add_argument('--end-to-end', nargs='+', metavar=('CONFIG', 'CHECKPOINT'),
                        help='time a model from image files to drawn predictions instead, by '
                        'stage; without a checkpoint with random weights')
    parser.add_argument('--images', metavar='FOLDER',
                        help='with --end-to-end: images (default: some are drawn)')
    parser.add_argument('--streams', type=int, default=1, metavar='N',
                        help='with --end-to-end: images at once in exported files, whose '
                        'throughput is timed too if N is more than 1')
    return parser.parse_args()


def main():
    args = parse_args()
    if args.end_to_end:
        return time_end_to_end(args)
    with exit_on_error():
        if args.render:
            if not args.out or args.models:
                raise ValueError('--render needs --out, the folder of results, and no models')
            return report(load(args.out), args.out, args.accuracy)
        if not args.models:
            raise ValueError('no model is given; for example: l1 l3 timm:resnet50')
        if args.rounds < 1:
            raise ValueError(f'rounds {args.rounds}: expected 1 or more')
        setting = Setting(tuple(args.shape), args.batch, args.threads, args.device,
                          args.mode == 'train')
        chosen = [candidate for spec in args.models
                  for candidate in candidates(spec, args.runtimes, args.dtype, setting)]
        baselines = [candidates(spec, args.runtimes, args.dtype, setting)[0]
                     for spec in args.baseline or []] or chosen[:1]
    out = args.out or Path('benchmarks') / f'{datetime.now():%Y%m%d_%H%M%S}'
    # In training, the number of regions with a mask changes, and each would start a search.
    torch.backends.cudnn.benchmark = not (setting.train and any(
        candidate.is_whole for candidate in [*chosen, *baselines]))
    with progress_bar() as progress:
        results = benchmark.run(chosen, baselines, setting, args.rounds, args.seed, out, progress)
    report(results, out, args.accuracy)
    if not any(entry['samples_ms'] for entry in results['candidates']):
        raise SystemExit('benchmark.py: nothing was timed')


def time_end_to_end(args):
    """Time a model from image files to drawn predictions; print and save the results."""
    config, *checkpoint = args.end_to_end
    with exit_on_error():
        wrong = [name for name in args.runtimes if name not in end_to_end.RUNTIMES]
        if wrong or args.models or len(checkpoint) > 1:
            raise ValueError('--end-to-end takes CONFIG [CHECKPOINT], no models, and the runtimes '
                             f'{", ".join(end_to_end.RUNTIMES)}')
        if (args.mode, args.device, args.dtype) != ('inference', 'cpu', 'fp32'):
            raise ValueError('--end-to-end is for inference on CPUs in fp32')
        if min(args.rounds, args.streams) < 1:
            raise ValueError('--rounds and --streams: expected 1 or more')
        setting = Setting(batch=args.batch, threads=args.threads)
        cfg = read_config(config)
        inference.require_visualizer(cfg)
        inference.init_scope(cfg)
        out = args.out or Path('benchmarks') / f'{datetime.now():%Y%m%d_%H%M%S}'
        with tempfile.TemporaryDirectory() as folder, progress_bar() as progress:
            files = ([path for path, _ in inference.find_media([args.images], out)
                      if path.suffix.lower() in inference.IMAGE_SUFFIXES]
                     if args.images else end_to_end.draw_images(Path(folder)))
            results = end_to_end.run(
                cfg, require_file(checkpoint[0], 'checkpoint') if checkpoint else None,
                partial(inference.load_sample_drawer, cfg), files, args.runtimes, setting,
                args.rounds, args.streams, progress)
    columns, rows = end_to_end.table(results)
    lines, name = end_to_end.notes(results), f'{Path(config).stem}, from file to drawn prediction'
    print_table(name, columns, rows, '\n'.join([*lines, end_to_end.LEGEND]))
    out.mkdir(parents=True, exist_ok=True)
    (out / 'end_to_end.json').write_text(json.dumps(results, indent=1))
    (out / 'end_to_end.md').write_text('\n'.join([
        f'### {name}', '', *(f'- {line}' for line in lines), '',
        markdown_table(columns, rows), '', end_to_end.LEGEND, '']))
    print(f'saved {out / "end_to_end.json"}, {out / "end_to_end.md"}')
    if not any(entry['stages_ms'] for entry in results['runtimes'].values()):
        raise SystemExit('benchmark.py: nothing was timed')


def report(results: dict, out: Path, accuracy: str):
    """Print the table, and save it and the plot in the folder of ``results.json``."""
    columns, rows = benchmark.table(results)
    print_table(title(results), columns, rows, '\n'.join(notes(results)))
    saved, tables = [out / 'results.json', out / 'results.md'], [(columns, rows, benchmark.LEGEND)]
    if parts := benchmark.parts_table(results):
        print_table('parts of whole models', *parts)
        tables.append((*parts, benchmark.PARTS_LEGEND))
    saved[1].write_text(markdown(results, *tables))
    label, _, metric = ACCURACIES[accuracy]
    panels = benchmark.tradeoff(results, published(results, accuracy), label)
    if panels and results['header']['mode'] == 'inference':
        saved.append(out / 'accuracy.png')
        peers = read_peers(metric)
        plots.tradeoff(panels, 'time, ms', saved[-1], front=True, levels=peers,
                       caption=benchmark.caption(results, bool(peers)))
    print(f'saved {", ".join(map(str, saved))}')


def published(results: dict, accuracy: str) -> dict:
    """Return the published figure of each model that was timed, '' for none."""
    _, name, metric = ACCURACIES[accuracy]
    models, figures = read_published(), {}
    for model in {entry['model'] for entry in results['candidates']}:
        if '::' in model:
            found = read_library_published(model)
        else:
            network = benchmark.network_name(model)
            found = models.get(network if model.endswith('.py') else name.format(network), {})
        figures[model] = found.get(metric, '')
    return figures


if __name__ == '__main__':
    main()
