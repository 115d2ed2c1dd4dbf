"""Evaluate a checkpoint: python tools/test.py CONFIG work_dirs/NAME/epoch_12.pth

Or a file exported from it: python tools/test.py CONFIG --backend onnx --model FILE.onnx
"""
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from mmengine.dist import is_main_process
from mmengine.evaluator import DumpResults

from mmeffformer.apis.options import (
    add_config_arguments,
    exit_on_error,
    finish_distributed,
    is_local_main_process,
    load_config,
    require_file,
)
from mmeffformer.apis.runs import record_evaluation
from mmeffformer.datasets import check_annotations, check_dataset
from mmeffformer.deploy.evaluation import ExportedModel
from mmeffformer.deploy.runtimes import ExportedFile
from mmeffformer.engine.runner import Runner
from mmeffformer.utils.errors import TrainingStopped
from mmeffformer.utils.modules import unwrap_model
from mmeffformer.weights.compatibility import check_compatible


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument('checkpoint', nargs='?', help='file saved by tools/train.py')
    parser.add_argument('--backend', choices=['onnx', 'openvino'],
                        help='evaluate --model with this runtime, instead of a checkpoint')
    parser.add_argument('--model', metavar='FILE', help='whole model saved by tools/export.py')
    parser.add_argument('--deploy', action='store_true',
                        help='fuse the model first, which leaves the metrics as they are')
    parser.add_argument('--out', help='also save the predictions to this .pkl file')
    parser.add_argument('--show-dir', help='also save pictures of the predictions to this folder')
    parser.add_argument('--at-least', nargs='+', default=[], metavar='METRIC=VALUE',
                        help='exit with an error where a metric is lower')
    args = parser.parse_args()
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out {args.out!r} must end in .pkl or .pickle')
    if bool(args.backend) != bool(args.model) or bool(args.model) == bool(args.checkpoint):
        parser.error('give either a checkpoint, or --backend and --model')
    if args.deploy and args.model:
        parser.error('--deploy is for a checkpoint; an exported file is fused already')
    floors = {}
    for word in args.at_least:
        metric, _, value = word.partition('=')
        try:
            floors[metric] = float(value)
        except ValueError:
            parser.error(f'--at-least {word!r}: expected METRIC=VALUE, as coco/bbox_mAP=0.38')

    with exit_on_error((ValueError, OSError, TrainingStopped)):
        cfg = load_config(args)
        if args.model:
            exported = ExportedFile(args.model, args.backend)
        else:
            cfg.load_from = require_file(args.checkpoint, 'checkpoint')
        check_dataset(cfg, splits=('test',))
        if is_local_main_process(args):
            check_annotations(cfg, splits=('test',))
        if 'backbone' in cfg.model:  # the checkpoint has every weight, so none are fetched
            cfg.model.backbone.init_cfg = None
        if args.deploy:
            cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='mmeffformer.DeployHook')]
        if args.show_dir:
            if 'visualization' not in cfg.get('default_hooks', {}):
                raise ValueError('--show-dir: the config has no default_hooks.visualization')
            # Some versions of mmseg draw every 50th batch unless told otherwise.
            cfg.default_hooks.visualization.update(draw=True, interval=1)
            cfg.visualizer.save_dir = args.show_dir
        runner = Runner.from_cfg(cfg)
        if args.model:
            runner.model = ExportedModel(unwrap_model(runner.model), exported)
        else:
            check_compatible(runner.model, args.checkpoint)
    if args.out:
        runner.test_evaluator.metrics.append(DumpResults(args.out))
    with exit_on_error(TrainingStopped):
        metrics = runner.test()
    if is_main_process() and args.checkpoint:
        record_evaluation(runner, args.config, args.checkpoint, metrics)
    low = [f'{metric} is {metrics.get(metric)}, expected at least {floor}'
           for metric, floor in floors.items() if not metrics.get(metric, -1) >= floor]
    if low:
        sys.exit('\n'.join(low))
    finish_distributed()


if __name__ == '__main__':
    main()
