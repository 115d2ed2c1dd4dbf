"""Files of a data set of any layout: images, their annotations and the splits."""
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import (
    Callable,
    Collection,
    Dict,
    Iterable,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

SPLITS = ('train', 'val', 'test')
MARKER = '.new_config'  # is in folders that tools/new_config.py writes
_WORD = re.compile(
    r'(?:^|[^a-z])(?:(train|training)|(val|valid|validation|dev)|(test|testing))'
    r'(?=annot|labels?|masks?|images?|[^a-z]|$)', re.IGNORECASE)
# A photograph's name with the position or number of a crop, or the hash of an augmented copy.
_CROPS = tuple(re.compile(pattern, re.IGNORECASE) for pattern in (
    r'(.+?)\.rf\.[0-9a-f]+$',
    r'(.+?)[_-]*(?:crop|tile|patch|slice|aug)[a-z]*[_-]?\d+(?:[_-]\d+)*$',
    r'(.+?)[_-]*(?:[xc]\d+[_-]?[yr]\d+|[yr]\d+[_-]?[xc]\d+)$',
))
_POSITION = re.compile(r'(.+?)_+(\d+)_+(\d+)(?:_+\d+_+\d+)?$')


class Options(NamedTuple):
    """Options for what a folder leaves open; see ``tools/new_config.py --help``."""

    annotations: Tuple[Path, ...] = ()
    images: Tuple[Path, ...] = ()
    format: Optional[str] = None
    target: Optional[str] = None
    label_suffix: Optional[str] = None
    classes: Tuple[str, ...] = ()
    void: Optional[str] = None
    val_share: float = .2
    seed: int = 0


class Log(NamedTuple):
    """Notes on what was found and decided, and warnings."""

    notes: List[str]
    warnings: List[str]


def names(items: Iterable[object]) -> str:
    """Return the number of ``items`` and the first three of them."""
    items = [str(item) for item in items]
    return f'{len(items):,} ({", ".join(items[:3])}{", ..." if len(items) > 3 else ""})'


def list_files(root: Path, suffixes: Collection[str], within: Sequence[Path] = ()) -> List[Path]:
    """Return the files below ``root``, or below the folders ``within``, with one of ``suffixes``.

    Hidden files and folders, and folders with the file ``MARKER``, are skipped.
    """
    found = {path for folder in within or [root] for path in
             ([folder] if folder.is_file() else folder.rglob('*'))
             if path.suffix.lower() in suffixes and path.is_file()}
    written = {path.parent for path in root.rglob(MARKER)}
    return sorted(path for path in found if written.isdisjoint(path.parents) and not any(
        part.startswith('.') for part in path.relative_to(root).parts))


def list_images(root: Path, options: Options) -> List[Path]:
    """Return the images below ``root`` or the folders of ``--images``.

    Raises:
        FileNotFoundError: There are none.
    """
    found = list_files(root, IMG_EXTENSIONS, options.images)
    if not found:
        raise FileNotFoundError(f'{root} has no images: expected files with suffix '
                                f'{", ".join(IMG_EXTENSIONS)}')
    return found


def split_of(path: Path) -> Optional[str]:
    """Return the split that a relative path names: 'train', 'val', 'test' or None.

    The innermost folder or file name with such a word counts.
    """
    for part in reversed(path.parts):
        found = {SPLITS[match.lastindex - 1] for match in _WORD.finditer(part)}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def match_files(images: Sequence[Path], files: Sequence[Path], root: Path,
                ) -> Dict[Path, List[Tuple[str, Path]]]:
    """Return the files of each image with the tails of their names, in the nearest folders.

    The name of a file is that of its image, without a suffix that all images share, and a tail,
    which is empty or starts with a character that is neither letter nor digit.
    """
    shared = common_suffix([path.stem for path in images])
    by_name = defaultdict(list)
    for path in images:
        by_name[path.stem.removesuffix(shared)].append(path)
    found: Dict[Path, List[Tuple[str, Path]]] = defaultdict(list)
    for file in files:
        stem = file.stem
        ends = [len(stem), *(i for i in range(len(stem) - 1, 0, -1) if not stem[i].isalnum())]
        name = next((stem[:end] for end in ends if stem[:end] in by_name), None)
        if name is not None:
            for image in nearest(file, by_name[name], root):
                found[image].append((stem[len(name):] + file.suffix, file))
    return found


def common_suffix(stems: Sequence[str]) -> str:
    """Return the longest suffix of all ``stems`` that starts with ``_``, ``-`` or ``.``."""
    if len(stems) < 2:
        return ''
    size, shortest = 0, min(map(len, stems))
    while size < shortest - 1 and len({stem[-size - 1] for stem in stems}) == 1:
        size += 1
    start = re.search(r'[_.-][A-Za-z].*', stems[0][len(stems[0]) - size:])
    return start[0] if start else ''


def nearest(file: Path, candidates: Sequence[Path], root: Path) -> List[Path]:
    """Return the candidates whose split and folders are most like those of ``file``."""
    if len(candidates) == 1:
        return list(candidates)
    own = file.relative_to(root)

    def likeness(path: Path) -> Tuple[bool, int, bool]:
        other = path.relative_to(root)
        return (split_of(own.parent) == split_of(other.parent),
                len({*own.parts[:-1]} & {*other.parts[:-1]}), file.parent == path.parent)

    best = max(map(likeness, candidates))
    return [path for path in candidates if likeness(path) == best]


def read_lists(root: Path, images: Sequence[Path], task: str) -> Dict[Path, str]:
    """Return the split of each image that a text file train.txt, val.txt or test.txt lists.

    A line holds the name of an image, with or without folder and suffix; the rest is ignored.
    Of VOC's lists, those in ``Main`` count for detection and those in ``Segmentation`` for
    segmentation.

    Raises:
        ValueError: Several files list a split.
    """
    lists = defaultdict(list)
    for path in list_files(root, ('.txt',)):
        if path.stem.lower() in ('train', 'val', 'valid', 'validation', 'test'):
            lists[split_of(Path(path.stem))].append(path)
    by_stem = defaultdict(list)
    for path in images:
        by_stem[path.stem].append(path)
    splits: Dict[Path, str] = {}
    for split, paths in lists.items():
        folder = {'det': 'Main', 'seg': 'Segmentation'}[task]
        paths = [path for path in paths if path.parent.name == folder] or paths
        if len(paths) > 1:
            raise ValueError(f'{split} is listed by {names(paths)}: expected one list; remove '
                             'the others, or name the folders with --images and --annotations')
        for line in paths[0].read_text(errors='replace').splitlines():
            path = Path(line.split()[0] if line.split() else '.')
            for image in by_stem.get(path.stem) or by_stem.get(path.name, ()):
                if image.parts[-len(path.parts):-1] == path.parts[1:-1] or len(
                        by_stem[image.stem]) == 1:
                    splits[image] = split
    return splits


def splits_of_pairs(pairs: Dict[Path, Path], root: Path, options: Options, task: str,
                    tables: Callable[[Path], Optional[str]] = lambda image: None,
                    ) -> Dict[Path, Optional[str]]:
    """Return the split of each image of (image, annotation file) pairs.

    It is given by the options, the folders, ``tables`` or lists, the first of them that has it.
    """
    splits = {image: split_by_options(file, options.annotations)
              or split_by_options(image, options.images)
              or split_of(file.parent.relative_to(root))
              or split_of(image.parent.relative_to(root)) or tables(image)
              for image, file in pairs.items()}
    lists = {} if any(splits.values()) else read_lists(root, list(pairs), task)
    return {image: split or lists.get(image) for image, split in splits.items()}


def split_by_options(path: Path, folders: Sequence[Path]) -> Optional[str]:
    """Return the split of a path within the first (train) or second (val) of two ``folders``."""
    if len(folders) < 2:
        return None
    return next((split for split, folder in zip(SPLITS, folders)
                 if path == folder or folder in path.parents), None)


def photograph(name: str, all_names: Collection[str] = ()) -> str:
    """Return the name of the photograph that an image's name, without suffix, is a crop of.

    Two numbers at the end are a position only if ``all_names`` has the crop at the origin.
    """
    for pattern in _CROPS:
        match = pattern.fullmatch(name)
        if match:
            return match[1]
    match = _POSITION.fullmatch(name)
    if match:
        head = re.compile(re.escape(match[1]) + r'_+0+_+0+(?:_+\d+_+\d+)?')
        if any(head.fullmatch(other) for other in all_names):
            return match[1]
    return name


def photographs(paths: Sequence[Path]) -> Dict[Path, str]:
    """Return the photograph of each image; see :func:`photograph`."""
    origins = {path.stem for path in paths if re.search(r'_+0+_+0+(?:_+\d+_+\d+)?$', path.stem)}
    return {path: photograph(path.stem, origins) for path in paths}


def complete_splits(splits: Dict[Path, Optional[str]], options: Options, log: Log,
                    ) -> Dict[Path, str]:
    """Return the split of each image, with a validation split if it was missing.

    The split that is made is random with ``options.seed``, and keeps crops of one photograph
    together.

    Raises:
        ValueError: There are images of other splits, but not of training, or there is one image.
    """
    found = Counter(splits.values())
    known = {path: split for path, split in splits.items() if split}
    if not known:
        known = dict.fromkeys(splits, 'train')
    elif found[None]:
        log.warnings.append('left out, as no folder or list gives their split: '
                            + names(path.name for path in splits if not splits[path]))
    if 'train' not in known.values():
        raise ValueError('expected a training split, found only '
                         f'{", ".join(sorted({*known.values()}))}; name the folders or '
                         'files with --annotations TRAIN VAL')
    origin = photographs(list(known))
    if 'val' not in known.values():
        train = sorted(path for path in known if known[path] == 'train')
        if len(train) < 2:
            raise ValueError('1 image was found: expected at least 2, one to validate on')
        kind, group = 'photograph', origin
        if not 5 <= len({origin[path] for path in train}) < len(train):
            kind, group = 'image', {path: str(path) for path in train}
        groups = sorted({group[path] for path in train})
        count = min(max(1, round(options.val_share * len(groups))), len(groups) - 1)
        chosen = np.random.default_rng(options.seed).permutation(len(groups))[:count]
        held_out = {groups[i] for i in chosen}
        known.update({path: 'val' for path in train if group[path] in held_out})
        log.notes.append(f'made a validation split, by {kind}: {count} of {len(groups)} '
                         f'{kind}s at random (--val-share {options.val_share:g}, '
                         f'--seed {options.seed})')
    parts = defaultdict(set)
    for path, split in known.items():
        parts[origin[path]].add(split)
    crops = {origin[path] for path in known if origin[path] != path.stem}
    both = sorted(name for name in crops if len(parts[name]) > 1)
    if both:
        log.warnings.append('crops or copies of one photograph are in several splits, so the '
                            f'evaluation is too good: {names(both)}')
    return known
