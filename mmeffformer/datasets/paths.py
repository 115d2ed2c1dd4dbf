"""Tell what is missing of a data set before a model is built for it."""
import os
import os.path as osp

from .shapes import CATEGORIES, SEG_CLASSES

# Where a data set type comes from, and the layout of make_shapes.py that can stand in for it.
SOURCES = {
    'CocoDataset': ('COCO 2017, from https://cocodataset.org/#download', 'coco2017'),
    'ADE20KDataset': ('ADE20K, from http://data.csail.mit.edu/places/ADEchallenge/'
                      'ADEChallengeData2016.zip', 'ade20k'),
}
DRAWN = {CATEGORIES: 'coco', SEG_CLASSES: 'ade20k'}  # classes -> layout


def check_dataset(cfg, splits=('train', 'val')):
    """Check that the files and folders which a config's data sets name exist.

    Looks at ``data_root``, ``ann_file`` and ``data_prefix`` of every data set in the dataloaders,
    wrapped ones included, and at ``ann_file`` of the evaluators. What is not on the local disk is
    not checked, and neither is what a data set type names otherwise.

    Args:
        cfg (mmengine.Config | dict): A config of mmdet or mmseg for training or testing.
        splits (Sequence[str]): Of 'train', 'val' and 'test', those that will be used.

    Raises:
        FileNotFoundError: If something is missing; the message tells all that is, the expected
            tree of folders, and what to do.
    """
    leaves = [leaf for split in splits
              for leaf in _leaves(_get(cfg, f'{split}_dataloader', 'dataset'),
                                  f'{split}_dataloader.dataset')]
    evaluators = [leaf for split in splits
                  for leaf in _leaves(_get(cfg, f'{split}_evaluator'), f'{split}_evaluator')]
    paths = {}  # absolute path -> (config key, is a folder)
    for key, leaf in leaves:
        for name, path, folder in _paths(leaf):
            paths.setdefault(osp.abspath(path), (f'{key}.{name}', folder))
    for key, leaf in evaluators:
        for name, path, folder in _paths(dict(leaf, data_root=None, data_prefix=None)):
            paths.setdefault(osp.abspath(path), (f'{key}.{name}', folder))
    missing = {path: (key, problem) for path, (key, folder) in paths.items()
               if (problem := _problem(path, folder))}
    # Where a folder is missing, what would be in it goes without saying.
    missing = {path: why for path, why in missing.items()
               if not any(_below(path, other) for other in missing)}
    if missing:
        raise FileNotFoundError(_message(missing, paths, leaves, evaluators))


def _get(node, *keys):
    for key in keys:
        node = node.get(key) if hasattr(node, 'get') else None
    return node


def _leaves(node, key):
    """(config key, dict) of each data set or evaluator that wraps no others."""
    if isinstance(node, (list, tuple)):
        for i, item in enumerate(node):
            yield from _leaves(item, f'{key}.{i}')
    elif isinstance(node, dict):
        inner = [name for name in ('dataset', 'datasets', 'metrics')
                 if any(isinstance(item, dict) for item in _list(node.get(name)))]
        for name in inner:
            yield from _leaves(node[name], f'{key}.{name}')
        if not inner:
            yield key, node


def _paths(leaf):
    """(name in the config, path, is a folder) of all that a data set reads, its root first."""
    backend = leaf.get('backend_args') or leaf.get('file_client_args') or {}
    if backend.get('backend', 'local') not in ('local', 'disk'):
        return
    root = leaf.get('data_root')
    root = root if _is_path(root) else ''
    named = [('data_root', root, True)] if root else []
    named += [('ann_file', path, False) for path in _list(leaf.get('ann_file'))]
    prefix = leaf.get('data_prefix')
    named += ([(f'data_prefix.{name}', path, True) for name, path in prefix.items()]
              if isinstance(prefix, dict) else [('data_prefix', prefix, True)])
    for name, path, folder in named:
        if _is_path(path):
            # As mmengine does: relative paths start at data_root.
            path = path if name == 'data_root' else osp.join(root, path)
            if '://' not in path:
                yield name, path, folder


def _is_path(value):
    return isinstance(value, (str, os.PathLike)) and str(value) != ''


def _list(value):
    return value if isinstance(value, (list, tuple)) else [value]


def _below(path, folder):
    return path != folder and path.startswith(osp.join(folder, ''))


def _problem(path, folder):
    if not osp.exists(path):
        return 'does not exist'
    if folder and not osp.isdir(path):
        return 'is not a folder'
    try:
        if folder and next(os.scandir(path), None) is None:
            return 'is empty'
    except OSError as error:
        return f'cannot be read ({error.strerror})'


def _origin(leaf, root):
    """Return lines on where to get a data set."""
    classes = _get(leaf, 'metainfo', 'classes')
    kind = leaf.get('type')
    kind = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
    source, layout = SOURCES.get(str(kind).split('.')[-1], (None, None))
    if classes:  # then it is not the published data set
        source, layout = None, DRAWN.get(tuple(classes))
    draw = f'python tools/make_shapes.py {root} --layout {layout}'
    if source:
        return [f'Get it: {source}', f'or, to try things out, draw a stand-in: {draw}']
    return [f'Draw it: {draw}'] if layout else []


def _message(missing, paths, leaves, evaluators):
    lines = ['The data set of this config is not there:']
    lines += [f'  {path} {problem}  ({key})' for path, (key, problem) in missing.items()]
    groups = {}  # data_root as written in the config -> data sets that miss something
    for key, leaf in leaves:
        mine = {osp.abspath(path) for _, path, _ in _paths(leaf)}
        if _is_path(leaf.get('data_root')) and mine & missing.keys():
            groups.setdefault(str(leaf['data_root']), []).append((key, leaf))
    for root, members in groups.items():
        base, here = osp.abspath(root), root.rstrip('/')
        lines += ['', 'Expected:', osp.join(base, '')]
        lines += _tree({tuple(osp.relpath(path, base).split(os.sep)): folder
                        for path, (_, folder) in paths.items() if _below(path, base)})
        lines += [''] + _origin(members[0][1], here)
        if not osp.exists(base):
            parent = osp.dirname(here)
            lines += ['To link it from elsewhere:',
                      (f'  mkdir -p {parent} && ' if parent else '  ') +
                      f'ln -s /path/to/the/data {here}']
        options = [f'{key}.data_root=/path/to/the/data' for key, _ in members]
        options += [f'{key}.ann_file=/path/to/the/data/{osp.relpath(path, base)}'
                    for key, leaf in evaluators for path in _list(leaf.get('ann_file'))
                    if _is_path(path) and _below(osp.abspath(path), base)]
        lines += ['To name another place when you start:', '  --cfg-options ' + ' '.join(options)]
    if not groups:
        lines += ['', 'To name another place when you start:', '  --cfg-options ' +
                  ' '.join(f'{key}=/path/to/it' for key, _ in missing.values())]
    return '\n'.join(lines)


def _tree(entries, indent=''):
    """Return the lines of a drawn tree. ``entries``: path as tuple of names -> is a folder."""
    lines, names = [], sorted({path[0] for path in entries if path})
    for name in names:
        below = {path[1:]: folder for path, folder in entries.items()
                 if path[:1] == (name, ) and len(path) > 1}
        last = name == names[-1]
        slash = '/' if below or entries.get((name, )) else ''
        lines.append(f'{indent}{"└── " if last else "├── "}{name}{slash}')
        lines += _tree(below, indent + ('    ' if last else '│   '))
    return lines
