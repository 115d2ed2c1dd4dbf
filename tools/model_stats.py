"""Parameters and MACs by stage: python tools/model_stats.py l3 --shape 800 1344

Takes the name of an arch, or a config, whose backbone and neck it counts.
"""
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import OrderedDict

from mmengine.registry import init_default_scope
from torch import nn

from mmeffformer.apis.options import exit_on_error, read_config
from mmeffformer.models import ARCHS, ARCHS_V2, backbone_named
from mmeffformer.utils.complexity import complexity
from mmeffformer.utils.config import find_scope
from mmeffformer.utils.console import print_table
from mmeffformer.utils.registry import MODELS


def build(model: str) -> nn.Module:
    """Return the backbone of an arch, or a config's backbone followed by its neck."""
    if not model.endswith('.py'):
        return backbone_named(model)(model, out_norm_cfg=None)
    cfg = read_config(model)
    if 'backbone' not in cfg.get('model', {}):
        raise ValueError(f'{model} has no model.backbone to measure')
    init_default_scope(find_scope(cfg))
    return nn.Sequential(OrderedDict((name, MODELS.build(cfg.model[name]))
                                     for name in ('backbone', 'neck') if name in cfg.model))


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('model', help=f'arch ({", ".join([*ARCHS, *ARCHS_V2])}) or config file')
    parser.add_argument('--shape', nargs=2, type=int, default=(224, 224), metavar=('H', 'W'),
                        help='input size in px (default: 224 224)')
    args = parser.parse_args()

    height, width = args.shape
    # Stages are one level further down in a config's network than in a bare backbone.
    depth = 2 if args.model.endswith('.py') else 1
    with exit_on_error():
        rows = complexity(build(args.model), (height, width), depth)
    print_table(f'{args.model} at {height} x {width} px', ['part', 'params', 'GMACs'],
                [[row.name or 'whole', f'{row.params:,}', f'{row.macs / 1e9:.3f}']
                 for row in rows])


if __name__ == '__main__':
    main()
