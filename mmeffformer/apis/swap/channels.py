"""Channels of neck and heads."""
from typing import Iterator, List, Optional, Sequence, Tuple

from mmengine.config import ConfigDict

from ...utils.config import class_name, iter_dicts
from ...utils.registry import MODELS
from .config import log_change
from .probe import Level, MetaAllocation

# Necks that make a pyramid of a plain transformer's outputs, which all have one stride.
PYRAMID_MAKERS = ('Feature2Pyramid', 'MultiLevelNeck')
# Necks that cannot work with EfficientFormer, and why.
REFUSED_NECKS = {
    'RFP': 'it feeds its outputs back into a backbone made for that; take the FPN of the same '
           'detector',
    'MLANeck': 'it adds up levels of one stride',
    'NASFCOS_FPN': 'it needs four levels but trains three of them, and parameters of the backbone '
                   'would get no gradient',
}


def check_swappable(target: ConfigDict) -> None:
    """Raise a ValueError if a part of the target works only with its own backbone."""
    neck = _first_neck(target) or {}
    roi_head = target.get('roi_head') or ConfigDict()
    backbone = class_name(target.backbone)
    if class_name(neck) in REFUSED_NECKS:
        raise ValueError(f'the neck {class_name(neck)} cannot take another backbone: '
                         f'{REFUSED_NECKS[class_name(neck)]}')
    if 'Trident' in class_name(roi_head):
        raise ValueError(f'roi_head {class_name(roi_head)} takes the branches of the backbone '
                         f'{backbone}, which no other backbone has')
    if roi_head.get('shared_head'):
        raise ValueError(f'roi_head.shared_head {class_name(roi_head.shared_head)} is the last '
                         f'stage of the backbone {backbone}; take a config with a neck')


def check_neck(target: ConfigDict, scope: str) -> None:
    """Raise a ValueError if the neck cannot be built for its channels, as some with GroupNorm."""
    neck = _first_neck(target)
    if not neck:
        return
    try:
        with MODELS.switch_scope_and_registry(scope) as registry, MetaAllocation():
            registry.build(neck)
    except Exception as error:  # a neck of any library can fail in any way
        raise ValueError(f'the neck {class_name(neck)} cannot be built with in_channels '
                         f'{neck.get("in_channels")}: {error}') from error


def adapt_channels(target: ConfigDict, levels: List[Level], widths: Sequence[int],
                   scope: str) -> Tuple[int, ...]:
    """Write the channels of the new backbone into neck and heads.

    Args:
        target: The config of the model, changed in place.
        levels: The outputs of the old backbone.
        widths: The channels of the four stages of the new backbone.
        scope: 'mmdet' or 'mmseg'.

    Returns:
        The stages that neck or heads read, ``out_indices`` of the new backbone.
    """
    _drop_pyramid_neck(target, levels)
    adapt_heads = _adapt_segmentor if scope == 'mmseg' else _adapt_detector
    neck = _first_neck(target)
    if neck:
        read, outputs = _adapt_neck(neck, levels, widths)
        adapt_heads(target, outputs, widths)
        return tuple(level.stage for level in read)
    read = adapt_heads(target, levels, widths)
    if not read:
        raise ValueError(f'the model {class_name(target)} has no neck, and no head of it takes '
                         f'the channels of the backbone {class_name(target.backbone)}, '
                         f'{[level.channels for level in levels]}')
    stages = tuple(sorted({level.stage for level in read}))
    if scope == 'mmseg':
        _renumber_inputs(target, levels, stages)
    return stages


def _first_neck(target: ConfigDict) -> Optional[ConfigDict]:
    """Return the neck, or the first of several, which reads the backbone."""
    neck = target.get('neck')
    return neck[0] if isinstance(neck, (list, tuple)) else neck


def _drop_pyramid_neck(target: ConfigDict, levels: Sequence[Level]) -> None:
    """Drop a neck that only makes a pyramid of outputs of one stride."""
    name = class_name(_first_neck(target) or {})
    if name in PYRAMID_MAKERS and len({level.stride for level in levels}) == 1:
        log_change(f'the neck {name} is dropped: EfficientFormer returns a pyramid')
        target.neck = None


def _adapt_neck(neck: ConfigDict, levels: List[Level],
                widths: Sequence[int]) -> Tuple[List[Level], List[Optional[Level]]]:
    """Write the new channels into the neck.

    Returns:
        The levels that the neck reads, and the level of each of its outputs, None for one that is
        no output of the backbone.
    """
    name, channels = class_name(neck), neck.get('in_channels')
    if channels is None:  # takes any channels, as GlobalAveragePooling
        return levels, [*levels]
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
        # The parameters of a level that the neck ignores would have no gradient.
        order = order[neck.start_level:]
        neck.start_level = 0
    read = sorted(order, key=lambda level: level.stage)
    new = [widths[level.stage] for level in order]
    neck.in_channels = type(channels)(new) if several else new[0]
    if name == 'SSDNeck':  # its first outputs are its inputs
        neck.out_channels = type(neck.out_channels)([*new, *neck.out_channels[len(new):]])
        return read, [*read]
    return read, [*read[:-1], None] if name == 'JPU' else []


def _adapt_detector(target: ConfigDict, seen: Sequence[Optional[Level]],
                    widths: Sequence[int]) -> List[Level]:
    """Write the new channels into all heads that get the levels ``seen``.

    Returns:
        The levels that heads read.
    """
    levels = [level for level in seen if level]
    old = [level.channels for level in levels]
    new = [widths[level.stage] for level in levels]
    found = False
    heads = {key: value for key, value in target.items() if key not in ('backbone', 'neck')}
    for part in iter_dicts(heads) if levels else ():
        for key in ('in_channels', 'out_channels'):
            value = part.get(key)
            if isinstance(value, (list, tuple)) and list(value[:len(old)]) == old:
                part[key] = type(value)([*new, *value[len(old):]])
                found = True
            elif len(old) == 1 and value == old[0]:
                part[key] = new[0]
                found = True
    return levels if found else []


def _adapt_segmentor(target: ConfigDict, seen: Sequence[Optional[Level]],
                     widths: Sequence[int]) -> List[Level]:
    """Write the new channels into the heads that read the levels ``seen``; return those read."""
    read: List[Level] = []
    for head in _segmentation_heads(target) if seen else ():
        if class_name(head) == 'EncHead' and not head.get('add_lateral'):  # reads only the last
            head.in_channels, head.in_index = head.in_channels[-1:], head.in_index[-1:]
        indices = _input_indices(head, len(seen))
        if head.get('c1_in_channels'):  # DeepLabV3+ adds details of the finest level
            indices.append(0)
        levels = [level for level in (seen[i] for i in indices) if level]
        if len(levels) < len(indices):  # reads an output of the neck, whose channels stay
            continue
        if class_name(head) == 'OCRHead' and read and levels[0].stage != read[0].stage:
            raise ValueError('OCRHead takes two levels of one stride, which EfficientFormer '
                             'lacks; take OCRNet with HRNet, whose head joins all levels')
        _adapt_segmentation_head(head, levels, widths)
        read += levels
    return read


def _adapt_segmentation_head(head: ConfigDict, levels: Sequence[Level],
                             widths: Sequence[int]) -> None:
    """Write the new channels into a head that reads ``levels``."""
    old = [level.channels for level in levels]
    new = [widths[level.stage] for level in levels]
    several = isinstance(head.in_channels, (list, tuple))
    given = list(head.in_channels) if several else [head.in_channels]
    head.in_channels = type(head.in_channels)(new[:len(given)]) if several else new[0]
    if head.get('c1_in_channels'):
        given.append(head.c1_in_channels)
        head.c1_in_channels = new[-1]
    if given != old:
        raise ValueError(f'the head {class_name(head)} takes {given} channels where the old '
                         f'backbone gives {old}')
    if head.get('num_convs') == 0 and head.get('channels') == sum(old):
        head.channels = sum(new)  # an FCNHead without convolutions keeps its input's channels


def _renumber_inputs(target: ConfigDict, levels: Sequence[Level], stages: Sequence[int]) -> None:
    """Make ``in_index`` of every head refer to the outputs ``stages`` of the new backbone."""
    for head in _segmentation_heads(target):
        one = isinstance(head.in_channels, int)
        if one or head.get('in_index') is not None:
            index = [stages.index(levels[i].stage) for i in _input_indices(head, len(levels))]
            head.in_index = index[0] if one else index


def _segmentation_heads(target: ConfigDict) -> Iterator[ConfigDict]:
    """Yield the heads of a segmentor that read features, also those inside others (K-Net)."""
    for key in ('decode_head', 'auxiliary_head'):
        heads = target.get(key) or []
        for head in heads if isinstance(heads, (list, tuple)) else [heads]:
            for part in iter_dicts(head):
                if part.get('in_channels') and (part is head or 'in_index' in part):
                    yield part


def _input_indices(head: ConfigDict, number: int) -> List[int]:
    """Return which of ``number`` levels a head of a segmentor reads, from 0."""
    index = head.get('in_index')
    if index is None:  # the last, or all of them (MaskFormer)
        index = -1 if isinstance(head.in_channels, int) else range(number)
    return [i % number for i in ([index] if isinstance(index, int) else index)]
