"""EfficientFormer in place of the backbone of any detector or segmentor of mmdet or mmseg.

What a host's neck and heads take follows from its old backbone: that is built without memory for
its weights and run on an image without pixels, which tells the channels and the stride of each of
its outputs, its *levels*. Neck and heads name these channels in their configs, and there ours
take their place.
"""
from copy import deepcopy
from math import lcm
from pathlib import Path
from typing import Any, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from torch.overrides import TorchFunctionMode

from ..models import EfficientFormer, EfficientFormerV2
from ..models.backbone import STRIDES
from ..utils.config import iter_dicts
from ..utils.registry import MODELS

# The configs of ours that say how a backbone is used in each library.
OURS = {'mmdet': 'detection/maskrcnn_{}.py', 'mmseg': 'segmentation/semfpn_{}.py'}
FAMILIES = {'effformer': EfficientFormer, 'effformerv2': EfficientFormerV2}

# Necks that make a pyramid of a plain transformer's outputs, which all have one stride.
PYRAMID_MAKERS = ('Feature2Pyramid', 'MultiLevelNeck')
# Necks that cannot work with ours, and why.
REFUSED_NECKS = {
    'RFP': 'it feeds its outputs back into a backbone made for that; take the FPN of the same '
           'detector',
    'MLANeck': 'it adds up levels of one stride',
    'NASFCOS_FPN': 'it counts on four levels but trains three of them, and parameters of the '
                   'backbone would go without a gradient',
}
# Names that optimizer options have for a transformer's position tables and class token.
POSITIONS = ('absolute_pos_embed', 'relative_position_bias_table', 'pos_block', 'pos_embed',
             'cls_token')


class Level(NamedTuple):
    """An output of the old backbone, and the stage of ours (from 0) that takes its place."""
    channels: int
    stride: int
    stage: int


def swap_backbone(cfg: Config, arch: Union[str, dict], **options: Any) -> Config:
    """Return a config of mmdet or mmseg with an EfficientFormer as its backbone.

    The backbone is that of this project's own config for the arch and library: ImageNet weights,
    bias grid (25 in mmdet, 16 in mmseg), norms. Neck and heads get its channels, the preprocessor
    ImageNet's mean and std in RGB and padding to a multiple of 32 px. Weights of the old model
    (``pretrained``, ``load_from``, the model's ``init_cfg``) and optimizer options for parts of
    the old backbone or its layer decay are left out. Only the stages that neck and heads read are
    put out (``out_indices``), so no parameter goes without a gradient. All else stays as it is;
    ``cfg`` itself is not changed.

    In mmdet a level keeps its stride, which anchors and RoI extractors count on. In mmseg a
    dilated or single-scale backbone's levels are spread, the last at stride 32, and a note of
    this is logged.

    Args:
        cfg: A loaded config with ``default_scope`` 'mmdet' or 'mmseg'.
        arch: 'l1', 'l3', 'l7' for EfficientFormer, 's0', 's1', 's2', 'l' for EfficientFormerV2,
            or a dict (:class:`mmeffformer.models.Arch`), which starts from random weights.
        options: Further arguments of the backbone, as ``frozen_stages=1``. With a dict
            ``type='EfficientFormerV2'`` makes it a V2.

    Raises:
        ValueError: The arch is unknown, or a part of the config cannot take the backbone; the
            message names the part and the reason.
    """
    cfg = deepcopy(cfg)
    scope = cfg.get('default_scope')
    if scope not in OURS:
        raise ValueError(f'config with default_scope {scope!r}: expected mmdet or mmseg')
    host = find_host(cfg)
    ours = _our_model(arch, scope, options)
    try:
        with torch.device('meta'):
            network = MODELS.build(ours.backbone | dict(out_indices=(0, 1, 2, 3), init_cfg=None))
    except TypeError as error:
        raise ValueError(f'the backbone does not take these options: {error}') from error

    _refuse(host)
    levels = _levels(host.backbone, scope)
    stages = _fit(host, levels, network.out_channels, scope)
    _check_neck(host, scope)
    host.backbone = ours.backbone | dict(out_indices=stages)
    for part in (cfg, cfg.model, host):
        if part.get('data_preprocessor'):
            _set_preprocessor(part.data_preprocessor, ours.data_preprocessor)
    _forget_weights(cfg, host)
    _drop_optimizer_options(cfg)
    _import_mmeffformer(cfg)
    return cfg


def _note(text: str):
    print_log(f'swap_backbone: {text}', logger='current')


def _type(part: Mapping) -> str:
    """The class name of a config's part, whose type is a name, a scoped name or a class."""
    kind = part.get('type')
    return getattr(kind, '__name__', str(kind)).rsplit('.', 1)[-1]


def find_host(cfg: Config) -> dict:
    """The model, or the detector inside of it (trackers, semi-supervised detectors)."""
    model = cfg.get('model') or {}
    for host in (model, model.get('detector') or {}):
        if isinstance(host.get('backbone'), dict) and 'type' in host.backbone:
            return host
    raise ValueError(f'model {_type(model)} has no backbone to replace, neither as '
                     'model.backbone nor as model.detector.backbone')


def _our_model(arch: Union[str, dict], scope: str, options: dict) -> dict:
    """The model of our config for the arch, with the options in its backbone."""
    options = dict(options)
    wanted = str(options.pop('type', 'EfficientFormer')).rsplit('.', 1)[-1]
    names = {name: f'{family}_{name}' for family, kind in FAMILIES.items() for name in kind.archs}
    if isinstance(arch, Mapping):
        stems = {kind.__name__: f'{family}_{next(iter(kind.archs))}'
                 for family, kind in FAMILIES.items()}
        if wanted not in stems:
            raise ValueError(f'type {wanted!r}: expected {" or ".join(stems)}')
        stem, options = stems[wanted], dict(arch=dict(arch), init_cfg=None) | options
    elif arch in names:
        stem = names[arch]
    else:
        raise ValueError(f'arch {arch!r} is unknown; choose from {", ".join(names)} or pass a '
                         'dict')
    if 'out_indices' in options:
        raise ValueError('out_indices follows from what neck and heads read: leave it out')
    configs = Path(__file__).parents[1] / '.mim' / 'configs'
    model = Config.fromfile(configs / OURS[scope].format(stem)).model
    model.backbone = {**model.backbone, **options}  # update() would mix dicts that are values
    return model


# The old backbone ------------------------------------------------------------------------------


class MetaAllocation(TorchFunctionMode):
    """Puts on the meta device what layers allocate, ``torch.empty``, and nothing else.

    Some backbones compute their arguments with tensors and read the values back, which
    ``torch.device('meta')`` does not allow.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs['device'] = 'meta'
        return func(*args, **kwargs)


def _levels(backbone: dict, scope: str) -> List[Level]:
    """What the old backbone puts out, with the stages of ours in its place."""
    name = _type(backbone)
    bare = {key: value for key, value in backbone.items() if key not in ('init_cfg', 'pretrained')}
    side = bare.get('img_size', 512)
    size = side if isinstance(side, (tuple, list)) else (side, side)
    try:
        with MODELS.switch_scope_and_registry(scope) as registry, MetaAllocation():
            network = registry.build(bare).to('meta')
        image = torch.empty(2, bare.get('in_channels', 3), *size, device='meta')
        with torch.no_grad():
            network.train()
            training = network(image)
            network.eval()
            outs = network(image)
    except Exception as error:  # anything can fail in a backbone of anybody's
        raise ValueError(
            f'the backbone {name} cannot be built and run to see what neck and heads get from it: '
            f'{type(error).__name__}: {error}') from error
    training, outs = ([out] if isinstance(out, torch.Tensor) else list(out)
                      for out in (training, outs))
    if len(training) != len(outs):
        raise ValueError(f'the backbone {name} has {len(training)} outputs in training but '
                         f'{len(outs)} otherwise, which its heads count on')
    if not all(isinstance(out, torch.Tensor) and out.dim() == 4 for out in outs):
        raise ValueError(f'the backbone {name} gives more than feature maps (B, C, H, W), as a '
                         'class token; EfficientFormer has nothing of the kind')
    channels = [out.shape[1] for out in outs]
    strides = [round(size[0] / out.shape[2]) for out in outs]
    return [Level(*level) for level in zip(channels, strides,
                                           _stages(name, channels, strides, scope))]


def _stages(name: str, channels: Sequence[int], strides: Sequence[int],
            scope: str) -> List[int]:
    """The stage of ours for each level of the old backbone."""
    told = f'the backbone {name} has outputs of strides {", ".join(map(str, strides))}'
    have = f'EfficientFormer has {", ".join(map(str, STRIDES))}'
    if list(strides) == sorted({*strides} & {*STRIDES}) and (scope == 'mmdet' or len(strides) > 1):
        return [STRIDES.index(stride) for stride in strides]
    if scope == 'mmdet':
        raise ValueError(f'{told}, which the heads count on; {have}')
    if (min(strides) < STRIDES[0] or len(strides) > len(STRIDES)
            or list(strides) != sorted(strides) or list(channels) != sorted(channels)):
        raise ValueError(f'{told} and {", ".join(map(str, channels))} channels, which is no '
                         f'pyramid from fine to coarse; {have}')
    stages = list(range(len(STRIDES) - len(strides), len(STRIDES)))
    if [STRIDES[i] for i in stages] != list(strides):
        _note(f'{told}; in their places are strides {", ".join(str(STRIDES[i]) for i in stages)}')
    return stages


# Neck and heads --------------------------------------------------------------------------------


def _neck(host: dict) -> Optional[dict]:
    """The neck, or the first of several, which reads the backbone."""
    neck = host.get('neck')
    return neck[0] if isinstance(neck, (list, tuple)) else neck


def _refuse(host: dict):
    """Raise a ValueError if a part of the model is tied to its own backbone."""
    neck, roi_head = _neck(host) or {}, host.get('roi_head') or {}
    backbone = _type(host.backbone)
    if _type(neck) in REFUSED_NECKS:
        raise ValueError(f'the neck {_type(neck)} cannot take another backbone: '
                         f'{REFUSED_NECKS[_type(neck)]}')
    if 'Trident' in _type(roi_head):
        raise ValueError(f'roi_head {_type(roi_head)} takes the branches of the backbone '
                         f'{backbone}, which no other has')
    if roi_head.get('shared_head'):
        raise ValueError(f'roi_head.shared_head {_type(roi_head.shared_head)} is the last stage '
                         f'of the backbone {backbone}; take a config with a neck')


def _fit(host: dict, levels: List[Level], widths: Sequence[int], scope: str) -> Tuple[int, ...]:
    """Write our channels into neck and heads; return the stages which they read."""
    neck = _neck(host)
    if neck and _type(neck) in PYRAMID_MAKERS and len({level.stride for level in levels}) == 1:
        _note(f'the neck {_type(neck)} is left out, EfficientFormer puts out a pyramid by itself')
        neck = host.neck = None
    if neck:
        read, seen = _fit_neck(neck, levels, widths)
    else:
        read, seen = [], levels
    fit_heads = _fit_segmentor if scope == 'mmseg' else _fit_detector
    read_by_heads = fit_heads(host, seen, widths)
    if neck:
        return tuple(level.stage for level in read)
    if not read_by_heads:
        raise ValueError(f'the model {_type(host)} has no neck, and no head of it takes the '
                         f'channels of the backbone {_type(host.backbone)}, '
                         f'{[level.channels for level in levels]}')
    stages = tuple(sorted({level.stage for level in read_by_heads}))
    if scope == 'mmseg':
        for head in _segmentation_heads(host):
            if head.get('in_index') is not None or isinstance(head.in_channels, int):
                at = [stages.index(levels[i].stage) for i in _indices(head, levels)]
                head.in_index = at[0] if isinstance(head.in_channels, int) else at
    return stages


def _fit_neck(neck: dict, levels: List[Level],
              widths: Sequence[int]) -> Tuple[List[Level], List[Optional[Level]]]:
    """Fit the neck; return the levels it reads, and those among its outputs (None: its own)."""
    name, channels = _type(neck), neck.get('in_channels')
    if channels is None:  # as GlobalAveragePooling, of any channels
        return levels, levels
    several = isinstance(channels, (list, tuple))
    given = list(channels) if several else [channels]
    last, first = levels[-len(given):], levels[:len(given)]
    # In reverse as YOLOV3Neck, without the deepest as CLRFPN.
    for order in [last, last[::-1], first] if several else [last]:
        if given == [level.channels for level in order]:
            break
    else:
        raise ValueError(f'the neck {name} takes in_channels {channels}, but the old backbone '
                         f'gives {[level.channels for level in levels]}')
    if neck.get('start_level'):
        # The parameters of a level that the neck leaves out would have no gradient.
        order = order[neck.start_level:]
        neck.start_level = 0
    read = sorted(order, key=lambda level: level.stage)
    ours = [widths[level.stage] for level in order]
    neck.in_channels = type(channels)(ours) if several else ours[0]
    if name == 'SSDNeck':  # its first outputs are its inputs
        neck.out_channels = type(neck.out_channels)([*ours, *neck.out_channels[len(ours):]])
        return read, read
    return read, [*read[:-1], None] if name == 'JPU' else []


def _check_neck(host: dict, scope: str):
    """Raise a ValueError if the neck cannot be built for our channels, as some with GroupNorm."""
    neck = _neck(host)
    if not neck:
        return
    try:
        with MODELS.switch_scope_and_registry(scope) as registry, MetaAllocation():
            registry.build(neck)
    except Exception as error:
        raise ValueError(f'the neck {_type(neck)} cannot be built with in_channels '
                         f'{neck.get("in_channels")}: {error}') from error


def _fit_detector(host: dict, seen: List[Level], widths: Sequence[int]) -> List[Level]:
    """Write our channels into all heads of a detector that see the levels ``seen``.

    Returns:
        The levels that heads read.
    """
    old = [level.channels for level in seen]
    ours = [widths[level.stage] for level in seen]
    found = False
    for part in iter_dicts({key: value for key, value in host.items()
                        if key not in ('backbone', 'neck')}) if seen else ():
        for key in ('in_channels', 'out_channels'):
            value = part.get(key)
            if isinstance(value, (list, tuple)) and list(value[:len(old)]) == old:
                part[key] = type(value)([*ours, *value[len(old):]])
                found = True
            elif len(old) == 1 and value == old[0]:
                part[key] = ours[0]
                found = True
    return seen if found else []


def _fit_segmentor(host: dict, seen: List[Optional[Level]], widths: Sequence[int]) -> List[Level]:
    """As :func:`_fit_detector`; heads of a segmentor say which levels they read."""
    read = []
    for head in _segmentation_heads(host) if seen else ():
        if _type(head) == 'EncHead' and not head.get('add_lateral'):  # it ignores all but the last
            head.in_channels, head.in_index = head.in_channels[-1:], head.in_index[-1:]
        levels = [seen[i] for i in _indices(head, seen)]
        if not all(levels):
            continue
        old = [level.channels for level in levels]
        several = isinstance(head.in_channels, (list, tuple))
        given = list(head.in_channels) if several else [head.in_channels]
        if head.get('c1_in_channels'):  # DeepLabV3+ adds details from the first level
            levels, old, given = [*levels, seen[0]], [*old, seen[0].channels], [
                *given, head.c1_in_channels]
            head.c1_in_channels = widths[seen[0].stage]
        if given != old:
            raise ValueError(f'the head {_type(head)} takes {given} channels where the old '
                             f'backbone gives {old}')
        ours = [widths[level.stage] for level in levels]
        head.in_channels = type(head.in_channels)(ours) if several else ours[0]
        if head.get('num_convs') == 0 and head.get('channels') == sum(old):
            head.channels = sum(ours)  # an FCNHead without convolutions passes on what it gets
        if _type(head) == 'OCRHead' and read and levels[0].stage != read[0].stage:
            raise ValueError('OCRHead takes two levels of one stride, which EfficientFormer does '
                             'not have; take OCRNet with HRNet, whose head joins all levels')
        read += levels
    return read


def _segmentation_heads(host: dict) -> Iterator[dict]:
    """The heads of a segmentor that read features, also those inside of others (K-Net)."""
    for key in ('decode_head', 'auxiliary_head'):
        heads = host.get(key) or []
        for head in heads if isinstance(heads, (list, tuple)) else [heads]:
            for part in iter_dicts(head):
                if part.get('in_channels') and (part is head or 'in_index' in part):
                    yield part


def _indices(head: dict, seen: Sequence) -> List[int]:
    """Which of the levels a segmentor's head reads, from 0."""
    index = head.get('in_index')
    if index is None:  # the last, or all of them (MaskFormer)
        index = -1 if isinstance(head.in_channels, int) else range(len(seen))
    return [i % len(seen) for i in ([index] if isinstance(index, int) else index)]


# The rest of the config ------------------------------------------------------------------------


def _set_preprocessor(preprocessor: dict, ours: dict):
    """Normalise as ImageNet's classifiers, in RGB, and pad to whole cells of the last stage."""
    while 'data_preprocessor' in preprocessor:  # of several branches, with one inside for all
        preprocessor = preprocessor.data_preprocessor
    preprocessor.update(mean=ours.mean, std=ours.std)
    preprocessor.pop('rgb_to_bgr', None)
    if 'to_rgb' in preprocessor:  # mmpretrain's, which does not pad
        preprocessor.to_rgb = True
        return
    preprocessor.bgr_to_rgb = True
    if 'SegData' not in _type(preprocessor):
        _pad(preprocessor, 'pad_size_divisor')
        return
    if not preprocessor.get('size'):
        _pad(preprocessor, 'size_divisor')
    preprocessor.test_cfg = preprocessor.get('test_cfg') or {}
    if not preprocessor.test_cfg.get('size'):
        _pad(preprocessor.test_cfg, 'size_divisor')


def _pad(part: dict, key: str):
    part[key] = lcm(part.get(key) or 1, STRIDES[-1])


def _forget_weights(cfg: Config, host: dict):
    """Leave out the weights of the old backbone, and of the old model as a whole."""
    if cfg.get('load_from'):
        _note(f'load_from={cfg.load_from!r} is left out, it is of the old model')
        cfg.load_from = None
    for model in (cfg.model, host):
        model.pop('pretrained', None)
        init_cfg = model.get('init_cfg')
        if isinstance(init_cfg, dict) and _type(init_cfg) in ('Pretrained', 'PretrainedInit'):
            _note(f'init_cfg={model.init_cfg.checkpoint!r} is left out, it is of the old model')
            model.pop('init_cfg')


def _drop_optimizer_options(cfg: Config):
    """Leave out layer decay and options for parameters that only the old backbone had."""
    wrapper = cfg.get('optim_wrapper') or {}
    options = wrapper.get('paramwise_cfg') or {}
    decay = [key for key in ('decay_rate', 'decay_type', 'layer_decay_rate', 'num_layers')
             if options.pop(key, None) is not None]
    if decay:
        _note(f'{wrapper.pop("constructor", None)} is left out, its layers are of the old '
              'backbone')
    keys = options.get('custom_keys') or {}
    for key in list(keys):
        if 'backbone.' in key or key in POSITIONS:
            keys.pop(key)
    if 'custom_keys' in options and not keys:
        options.pop('custom_keys')


def _import_mmeffformer(cfg: Config):
    custom = dict(cfg.get('custom_imports') or {})
    imports = custom.get('imports') or []
    imports = [imports] if isinstance(imports, str) else list(imports)
    if 'mmeffformer' not in imports:
        imports.append('mmeffformer')
    cfg.custom_imports = custom | dict(imports=imports)
