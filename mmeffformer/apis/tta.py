"""Test-time augmentation: predictions for several versions of an image, merged."""
from copy import deepcopy

from mmengine.config import Config, ConfigDict
from torch import nn

from ..utils.config import iter_dicts


def add_tta(cfg: Config) -> None:
    """Add test-time augmentation to a config, as the tools of mmdet and mmseg do with ``--tta``.

    The config's ``tta_model`` and ``tta_pipeline`` are used. Without them, the predictions for
    each image and its mirror image are merged by DetTTAModel or SegTTAModel.

    Raises:
        ValueError: There is no ``tta_model``, and none that is known for this kind of model; or
            the model is augmented already.
    """
    defaults = {'mmdet': dict(type='DetTTAModel', tta_cfg=dict(
        nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)),
        'mmseg': dict(type='SegTTAModel')}
    model = cfg.get('tta_model') or defaults.get(cfg.get('default_scope'))
    if model is None or 'module' in cfg.model:
        raise ValueError('--tta: expected a config with tta_model, or with default_scope mmdet or '
                         'mmseg, whose model is not augmented already; its model is '
                         f'{cfg.model.type}, its scope {cfg.get("default_scope")}')
    cfg.model = ConfigDict(model, module=cfg.model)
    datasets = {id(part): part for part in iter_dicts(cfg.test_dataloader.dataset)
                if 'pipeline' in part}  # one may be there twice
    for part in datasets.values():
        part['pipeline'] = cfg.get('tta_pipeline') or _mirror(part['pipeline'])


def check_tta(model: nn.Module) -> None:
    """Raise a ValueError if the model predicts masks, which DetTTAModel cannot merge."""
    if type(model).__name__ == 'DetTTAModel' and getattr(model.module, 'with_mask', False):
        raise ValueError('DetTTAModel merges boxes, but no masks. To measure the boxes, remove '
                         'the mask head: --cfg-options model.roi_head.mask_head=None '
                         'test_evaluator.metric=bbox')


def _mirror(pipeline: list) -> list:
    """Return a pipeline that packs each image and its mirror image."""
    *load, pack = deepcopy(pipeline)
    if 'meta_keys' in pack:
        pack['meta_keys'] = tuple({**dict.fromkeys(pack['meta_keys']),
                                   'flip': None, 'flip_direction': None})
    # The first one's ground truth is evaluated.
    flips = [dict(type='RandomFlip', prob=probability) for probability in (0., 1.)]
    return [*load, dict(type='TestTimeAug', transforms=[flips, [pack]])]
