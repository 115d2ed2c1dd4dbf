"""Parts of a config other than backbone, neck and heads: preprocessor, weights, optimizer."""
from math import lcm
from pathlib import Path
from typing import Mapping, Optional, Union

from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log

from ...models import EfficientFormer, EfficientFormerV2
from ...models.backbone import STRIDES
from ...utils.config import LOADERS, class_name, iter_dicts, preprocessor_cfg

# The configs of this project that define the backbone for each library.
CONFIGS = {'mmdet': 'detection/maskrcnn_{}.py', 'mmseg': 'segmentation/semfpn_{}.py'}
FAMILIES = {'effformer': EfficientFormer, 'effformerv2': EfficientFormerV2}

# Names that optimizer options have for a transformer's position tables and class token.
POSITIONS = ('absolute_pos_embed', 'relative_position_bias_table', 'pos_block', 'pos_embed',
             'cls_token')


def log_change(text: str) -> None:
    """Log a change that a user may not expect."""
    print_log(f'swap_backbone: {text}', logger='current')


def find_target(cfg: Config) -> ConfigDict:
    """Return the model, or the detector in it (trackers, semi-supervised detectors).

    Raises:
        ValueError: Neither has a backbone.
    """
    model = cfg.get('model') or ConfigDict()
    for target in (model, model.get('detector') or ConfigDict()):
        if isinstance(target.get('backbone'), dict) and 'type' in target.backbone:
            return target
    raise ValueError(f'model {class_name(model)} has no backbone to replace, neither as '
                     'model.backbone nor as model.detector.backbone')


def load_model(arch: Union[str, dict], scope: Optional[str], options: dict) -> ConfigDict:
    """Return the model of this project's config for an arch, with ``options`` in its backbone."""
    if scope not in CONFIGS:
        raise ValueError(f'config with default_scope {scope!r}: expected mmdet or mmseg')
    options = dict(options)
    family = str(options.pop('type', 'EfficientFormer')).rsplit('.', 1)[-1]
    names = {name: f'{prefix}_{name}' for prefix, kind in FAMILIES.items() for name in kind.archs}
    if isinstance(arch, Mapping):
        first = {kind.__name__: f'{prefix}_{next(iter(kind.archs))}'
                 for prefix, kind in FAMILIES.items()}
        if family not in first:
            raise ValueError(f'type {family!r}: expected {" or ".join(first)}')
        name, options = first[family], dict(arch=dict(arch), init_cfg=None) | options
    elif arch in names:
        name = names[arch]
    else:
        raise ValueError(f'arch {arch!r} is unknown; choose from {", ".join(names)} or pass a '
                         'dict')
    if 'out_indices' in options:
        raise ValueError('out_indices follows from the stages that neck and heads read; '
                         'leave it out')
    folder = Path(__file__).parents[2] / '.mim' / 'configs'
    model = Config.fromfile(folder / CONFIGS[scope].format(name)).model
    model.backbone = {**model.backbone, **options}  # update() would merge dicts that are values
    return model


def image_channels(backbone: Mapping) -> int:
    """Return the number of channels of the images that a backbone takes."""
    return backbone.get('in_channels', backbone.get('in_chans', 3))


def other_images(cfg: Config, target: ConfigDict) -> str:
    """Return how the images differ from what ImageNet weights take, 3 channels from 0 to 255.

    It is empty where they do not. mean and std show the range of the values.
    """
    channels = image_channels(target.backbone)
    preprocessor = preprocessor_cfg(cfg) or {}
    scale = max(value for key in ('mean', 'std') for value in preprocessor.get(key) or [0])
    steps = {class_name(part) for part in iter_dicts([cfg.get(loader) for loader in LOADERS])}
    if channels != 3:
        return f'{channels} channels'
    if scale > 255:
        return f'values beyond 255, normalised by mean or std of {scale}'
    return 'values normalised in the pipeline' if 'Normalize' in steps else ''


def set_preprocessor(preprocessor: ConfigDict, norm: Mapping) -> None:
    """Set padding to a multiple of the last stride, and ``norm``: mean and std of RGB, or {}."""
    while 'data_preprocessor' in preprocessor:  # MultiBranchDataPreprocessor wraps the actual one
        preprocessor = preprocessor.data_preprocessor
    if norm:
        preprocessor.update(mean=norm['mean'], std=norm['std'])
        preprocessor.pop('rgb_to_bgr', None)
        # That of mmpretrain has to_rgb.
        preprocessor['to_rgb' if 'to_rgb' in preprocessor else 'bgr_to_rgb'] = True
    if 'to_rgb' in preprocessor:  # does not pad
        return
    if 'SegData' not in class_name(preprocessor):
        _pad(preprocessor, 'pad_size_divisor')
        return
    if not preprocessor.get('size'):
        _pad(preprocessor, 'size_divisor')
    preprocessor.test_cfg = preprocessor.get('test_cfg') or {}
    if not preprocessor.test_cfg.get('size'):
        _pad(preprocessor.test_cfg, 'size_divisor')


def _pad(part: ConfigDict, key: str) -> None:
    part[key] = lcm(part.get(key) or 1, STRIDES[-1])


def drop_old_weights(cfg: Config, target: ConfigDict) -> None:
    """Drop the weights of the old backbone and of the old model."""
    if cfg.get('load_from'):
        log_change(f'load_from={cfg.load_from!r}, of the old model, is dropped')
        cfg.load_from = None
    for model in (cfg.model, target):
        model.pop('pretrained', None)
        init_cfg = model.get('init_cfg')
        if isinstance(init_cfg, dict) and class_name(init_cfg) in ('Pretrained', 'PretrainedInit'):
            log_change(f'init_cfg={init_cfg["checkpoint"]!r}, of the old model, is dropped')
            model.pop('init_cfg')


def drop_optimizer_options(cfg: Config) -> None:
    """Drop layer decay and options for parameters of the old backbone."""
    wrapper = cfg.get('optim_wrapper') or {}
    options = wrapper.get('paramwise_cfg') or {}
    decay = [key for key in ('decay_rate', 'decay_type', 'layer_decay_rate', 'num_layers')
             if options.pop(key, None) is not None]
    if decay:
        log_change(f'{wrapper.pop("constructor", None)}, made for the layers of the old backbone, '
                   'is dropped')
    keys = options.get('custom_keys') or {}
    for key in list(keys):
        if 'backbone.' in key or key in POSITIONS:
            keys.pop(key)
    if 'custom_keys' in options and not keys:
        options.pop('custom_keys')


def add_import(cfg: Config) -> None:
    """Add mmeffformer to ``custom_imports``."""
    custom = dict(cfg.get('custom_imports') or {})
    imports = custom.get('imports') or []
    imports = [imports] if isinstance(imports, str) else list(imports)
    if 'mmeffformer' not in imports:
        imports.append('mmeffformer')
    cfg.custom_imports = custom | dict(imports=imports)
