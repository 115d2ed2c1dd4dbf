"""Configs, read as mmengine's Runner reads them.

They may be in either style: types are names, or classes where the config imports them.
"""
from colorsys import hsv_to_rgb
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from mmengine import registry
from mmengine.config import Config, ConfigDict
from mmengine.fileio import list_from_file
from mmengine.registry import DATASETS, TRANSFORMS, Registry

Colour = Tuple[int, ...]  # RGB, 0 to 255

TESTING = ('test_dataloader', 'val_dataloader')
LOADERS = (*TESTING, 'train_dataloader')
GOLDEN_RATIO = 0.618034  # as a step it spreads any number of hues


def iter_dicts(value: Any) -> Iterator[dict]:
    """Yield every dict nested in ``value``, outer ones first."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    for item in value if isinstance(value, (list, tuple)) else ():
        yield from iter_dicts(item)


def class_name(part: Mapping) -> str:
    """Return the class name of a part of a config, without its scope or module."""
    kind = part.get('type')
    return getattr(kind, '__name__', str(kind)).rsplit('.', 1)[-1]


def find_scope(cfg: Config) -> str:
    """Return the registry scope of a config: its default scope, or the library of its model.

    A config that imports its types may have no default scope.
    """
    kind = (cfg.get('model') or {}).get('type')
    modules = [each.__module__ for each in kind.__mro__] if isinstance(kind, type) else [str(kind)]
    libraries = [module.partition('.')[0] for module in modules]
    return cfg.get('default_scope') or next(
        (name for name in libraries if name in ('mmdet', 'mmseg')), 'mmengine')


def name_types(cfg: Config) -> None:
    """Write the types that a config imports as names, and its library as its default scope.

    mmengine saves an imported type as the path of its module. mmdet and mmcv do not find all
    types by these paths, and tools that change configs would need to know both styles.
    """
    parts = [part for part in iter_dicts([cfg[key] for key in cfg])
             if not isinstance(part.get('type', ''), str)]
    if parts:
        from mmcv import ops
        cfg.default_scope = find_scope(cfg)
        names = _registered_names(cfg.default_scope)
    for part in parts:
        kind = part['type']
        name = getattr(kind, '__name__', '')  # operators of mmcv have no registry
        part['type'] = name if getattr(ops, name, None) is kind else names.get(kind, kind)


def _registered_names(scope: str) -> Dict[Any, str]:
    """Return the name of every class and function in mmengine's registries, seen from a scope."""
    names = {}
    for root in vars(registry).values():
        if isinstance(root, Registry):
            own = root.children.get(scope, root)
            for each in (*root.children.values(), root, own):
                each.import_from_location()
                for name, kind in each.module_dict.items():
                    hidden = each is not own and (each is not root or name in own.module_dict)
                    names[kind] = f'{each.scope}.{name}' if hidden else name
    return names


def model_cfg(cfg: Config) -> ConfigDict:
    """Return a copy of the config of the model, with the preprocessor that Runner gives it.

    Raises:
        ValueError: There is no model.
    """
    if not isinstance(cfg.get('model'), dict):
        raise ValueError('the config has no model: expected a config for mmdet or mmseg')
    model = deepcopy(cfg.model)
    if cfg.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', deepcopy(cfg.data_preprocessor))
    return model


def preprocessor_cfg(cfg: Config) -> Optional[dict]:
    """Return a copy of the config of the preprocessor that images pass through, None if none.

    It is looked for in the model inside a wrapper for test-time augmentation, and inside a
    preprocessor for several branches.
    """
    model = model_cfg(cfg)
    inner = model.get('module') or {}
    part = inner.get('data_preprocessor') or model.get('data_preprocessor')
    while part and part.get('data_preprocessor'):
        part = part['data_preprocessor']
    return part or None


def test_pipeline_cfg(cfg: Config) -> list:
    """Return a copy of the steps that read and prepare an image in testing.

    They are those of the test set, or else of the validation set, or else ``test_pipeline``.
    Steps that load annotations are left out.

    Raises:
        ValueError: There is no such pipeline.
    """
    datasets = [(cfg.get(loader) or {}).get('dataset') for loader in TESTING]
    for steps in [*map(_pipeline, datasets), cfg.get('test_pipeline')]:
        if steps:
            with TRANSFORMS.switch_scope_and_registry(find_scope(cfg)) as transforms:
                return _without_annotations(deepcopy(steps), transforms)
    raise ValueError('the config has no pipeline for images: expected one in '
                     + ', '.join(f'{loader}.dataset.pipeline' for loader in TESTING)
                     + ' or test_pipeline')


test_pipeline_cfg.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it


def _pipeline(dataset: Any) -> list:
    """Return the steps of a data set, those of the one that it wraps first."""
    if not isinstance(dataset, dict):
        return []
    inner = _wrapped(dataset)
    return [*_pipeline(inner[0] if inner else None), *(dataset.get('pipeline') or [])]


def _wrapped(dataset: Mapping) -> List[dict]:
    parts = [dataset.get('dataset'), *(dataset.get('datasets') or [])]
    return [part for part in parts if isinstance(part, dict)]


def _without_annotations(steps: Sequence, transforms: Registry) -> list:
    """Return the steps, and those nested in them, that load no annotations."""
    kept = []
    for step in steps:
        if isinstance(step, (list, tuple)):
            kept += [inner] if (inner := _without_annotations(step, transforms)) else []
        elif not _loads_annotations(step, transforms):
            if isinstance(step.get('transforms'), (list, tuple)):
                step['transforms'] = _without_annotations(step['transforms'], transforms)
            kept.append(step)
    return kept


def _loads_annotations(step: Mapping, transforms: Registry) -> bool:
    from mmcv.transforms import LoadAnnotations
    kind = step.get('type')
    kind = transforms.get(kind) if isinstance(kind, str) else kind
    # mmseg's own loaders of annotations do not all derive from mmcv's.
    return 'Annotation' in class_name(step) or (
        isinstance(kind, type) and issubclass(kind, LoadAnnotations))


def dataset_metainfo(cfg: Config, meta: Optional[Mapping] = None) -> dict:
    """Return the classes of a config and a palette with a colour for each.

    Classes are those that the data set of a split names (test, val, train), or else those of the
    checkpoint, of the data set's type, or numbered as in the heads. The palette is that of the
    config, then of the type, then of the checkpoint; missing colours are made.

    Args:
        cfg: A config of mmdet or mmseg. No data set of it is built.
        meta: The ``meta`` of a checkpoint.

    Returns:
        ``classes``, a tuple of names, and ``palette``, a list of as many RGB colours.
    """
    given, default = _metainfo(cfg)
    trained = dataset_meta(meta or {})
    heads = [part['num_classes'] for part in iter_dicts(cfg.get('model'))
             if isinstance(part.get('num_classes'), int)]
    classes = (_names(given) or _names(trained) or _names(default)
               or tuple(f'class {i}' for i in range(max(heads, default=0))))
    known = dict(zip(_names(default), _colours(default)))
    palette = _colours(given) or (
        [known[name] for name in classes] if known.keys() >= {*classes} else _colours(trained))
    return dict(classes=classes, palette=_complete(palette, len(classes)))


def dataset_meta(meta: Mapping) -> dict:
    """Return the metadata of the data set in a checkpoint's ``meta``, such as ``classes``.

    It is empty where there are no class names.
    """
    found = meta.get('dataset_meta') or {  # else as mmdet 2.x and mmseg 0.x
        'classes': meta.get('CLASSES'), 'palette': meta.get('PALETTE')}
    found = {str(key).lower(): value for key, value in found.items()} if isinstance(
        found, dict) else {}
    return found if _names(found) else {}


def _metainfo(cfg: Config) -> Tuple[dict, dict]:
    """Return the metadata that the data sets are given, and that of their types."""
    given: dict = {}
    default: dict = {}
    with DATASETS.switch_scope_and_registry(find_scope(cfg)) as datasets:
        for loader in LOADERS:
            for dataset in _leaves((cfg.get(loader) or {}).get('dataset')):
                kind = dataset.get('type')
                kind = datasets.get(kind) if isinstance(kind, str) else kind
                for key, value in (dataset.get('metainfo') or {}).items():
                    given.setdefault(key, value)
                for key, value in (getattr(kind, 'METAINFO', None) or {}).items():
                    default.setdefault(key, value)
    return given, default


def _leaves(dataset: Any) -> Iterator[dict]:
    """Yield the data sets that wrap no others."""
    if isinstance(dataset, dict):
        inner = _wrapped(dataset)
        for part in inner:
            yield from _leaves(part)
        if not inner:
            yield dataset


def _names(metainfo: Mapping) -> Tuple[str, ...]:
    names: Any = metainfo.get('classes')
    if isinstance(names, str) and Path(names).is_file():  # as mmengine's BaseDataset
        names = list_from_file(names)
    valid = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return tuple(names) if valid else ()


def _colours(metainfo: Mapping) -> List[Colour]:
    palette: Any = metainfo.get('palette')
    valid = isinstance(palette, (list, tuple)) and all(
        isinstance(colour, (list, tuple)) and len(colour) == 3 for colour in palette)
    return [tuple(colour) for colour in palette] if valid else []


def _complete(palette: Sequence[Colour], length: int) -> List[Colour]:
    """Return ``length`` colours: those of the palette, then others that differ from all before."""
    colours = list(palette[:length])
    made = (tuple(round(255 * part) for part in hsv_to_rgb(
        i * GOLDEN_RATIO % 1, 1 - i % 3 / 4, 1 - i // 3 % 3 / 5)) for i in count())
    while len(colours) < length:
        colours.append(next(colour for colour in made if colour not in colours))
    return colours
