"""Evaluate a checkpoint: python tools/test.py CONFIG work_dirs/NAME/epoch_12.pth

Or an exported file: python tools/test.py CONFIG --backend onnx --model FILE.onnx
"""
import sys
from argparse import (
    ArgumentParser,
    ArgumentTypeError,
    Namespace,
    RawDescriptionHelpFormatter,
)
from typing import Tuple

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.evaluator import BaseMetric, DumpResults

from mmeffformer.apis.options import (
    add_config_arguments,
    exit_on_error,
    load_config,
    require_file,
    require_keys,
)
from mmeffformer.apis.report import record_evaluation
from mmeffformer.apis.tta import add_tta, check_tta
from mmeffformer.datasets import check_dataset
from mmeffformer.deploy.evaluation import ExportedModel
from mmeffformer.deploy.runtimes import ExportedFile, SizeError
from mmeffformer.engine.launch import exit_distributed
from mmeffformer.engine.runner import Runner
from mmeffformer.utils.config import dataset_metainfo
from mmeffformer.utils.errors import TrainingStopped
from mmeffformer.utils.modules import unwrap_model
from mmeffformer.weights.compatibility import check_compatible


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument('checkpoint', nargs='?', help='file saved by tools/train.py')
    parser.add_argument('--backend', choices=['onnx', 'openvino', 'executorch'],
                        help='runtime for --model, which is evaluated instead of a checkpoint')
    parser.add_argument('--model', metavar='FILE', help='whole model saved by tools/export.py')
    parser.add_argument('--deploy', action='store_true',
                        help='fuse the model first; the metrics stay the same')
    parser.add_argument('--tta', action='store_true',
                        help="test-time augmentation by the config's tta_model and tta_pipeline "
                        '(default: each image and its mirror image)')
    parser.add_argument('--out', help='also save the predictions to this .pkl file')
    parser.add_argument('--show-dir', help='also save pictures of the predictions to this folder')
    parser.add_argument('--no-check', action='store_true',
                        help='do not check the data before the evaluation')
    parser.add_argument('--at-least', nargs='+', default=[], metavar='METRIC=VALUE',
                        type=parse_floor, help='exit with an error if a metric is lower')
    args = parser.parse_args()
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out {args.out!r} must end in .pkl or .pickle')
    if bool(args.backend) != bool(args.model) or bool(args.model) == bool(args.checkpoint):
        parser.error('give either a checkpoint, or --backend and --model')
    if args.deploy and args.model:
        parser.error('--deploy is for a checkpoint; an exported file is already fused')
    if args.tta and args.model:
        parser.error('--tta is for a checkpoint; an exported file predicts without it')
    return args


def parse_floor(word: str) -> Tuple[str, float]:
    metric, _, value = word.partition('=')
    try:
        return metric, float(value)
    except ValueError:
        raise ArgumentTypeError(
            f'{word!r}: expected METRIC=VALUE, such as coco/bbox_mAP=0.38') from None


def prepare_config(cfg: Config, args: Namespace) -> None:
    """Check the data and apply the options to the config."""
    require_keys(cfg, 'test_dataloader', 'test_evaluator', 'test_cfg')
    check_dataset(cfg, splits=('test',))
    model = cfg.model
    while 'module' in model:  # a model for test-time augmentation
        model = model.module
    if 'backbone' in model:  # the checkpoint has all weights, so none are fetched
        model.backbone.init_cfg = None
    if args.tta:
        add_tta(cfg)
    if args.deploy:
        cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='mmeffformer.DeployHook')]
    if args.show_dir:
        if 'visualization' not in cfg.get('default_hooks', {}):
            raise ValueError('--show-dir: the config has no default_hooks.visualization')
        # Some versions of mmseg draw every 50th batch by default.
        cfg.default_hooks.visualization.update(draw=True, interval=1)
        cfg.visualizer.save_dir = args.show_dir
        if cfg.visualizer.type in ('DetLocalVisualizer', 'mmdet.DetLocalVisualizer'):
            cfg.visualizer.type = 'mmeffformer.DetVisualizer'


def dump_metric(path: str) -> BaseMetric:
    """Return the metric that saves predictions, masks as RLE where mmdet is installed."""
    try:
        from mmdet.evaluation import DumpDetResults
    except ImportError:
        return DumpResults(path)
    return DumpDetResults(path)


def main():
    args = parse_args()
    with exit_on_error((ValueError, OSError, TrainingStopped)):
        cfg = load_config(args)
        if args.model:
            exported = ExportedFile(args.model, args.backend)
        else:
            cfg.load_from = require_file(args.checkpoint, 'checkpoint')
        prepare_config(cfg, args)
        runner = Runner.from_cfg(cfg)
        if not args.no_check:  # by every process: what it builds may wait for the others
            runner.check_data(('test', ))
        if args.model:
            runner.model = ExportedModel(unwrap_model(runner.model), exported)
        else:
            check_tta(runner.model)
            check_compatible(runner.model, args.checkpoint)
    if args.show_dir and runner.test_loop:  # whose visualizer has the data set's own palette
        runner.visualizer.dataset_meta |= dataset_metainfo(cfg)
    if args.out:
        runner.test_evaluator.metrics.append(dump_metric(args.out))
    with exit_on_error((TrainingStopped, SizeError)):
        metrics = runner.test()
    if is_main_process() and args.checkpoint and not args.tta:  # the report compares plain figures
        record_evaluation(runner, args.config, args.checkpoint, metrics)
    low = [f'{metric} is {metrics.get(metric)}, expected at least {floor}'
           for metric, floor in args.at_least if not metrics.get(metric, -1) >= floor]
    if low:
        sys.exit('\n'.join(low))
    exit_distributed()


if __name__ == '__main__':
    main()
