import copy
import os

import pytest
from mmengine import Config

from mmeffformer.datasets import CATEGORIES, SEG_CLASSES, check_dataset, write_ade20k, write_coco


def coco_config(root='data/coco/', **options):
    def loader(split):
        return dict(dataset=dict(
            type='CocoDataset', data_root=root, backend_args=None, pipeline=[],
            ann_file=f'annotations/instances_{split}2017.json',
            data_prefix=dict(img=f'{split}2017/'), **options))

    evaluator = dict(type='CocoMetric', metric=['bbox', 'segm'], backend_args=None,
                     ann_file=root + 'annotations/instances_val2017.json')
    return Config(dict(
        train_dataloader=loader('train'), val_dataloader=loader('val'),
        test_dataloader=loader('val'), val_evaluator=evaluator, test_evaluator=evaluator))


def ade_config(root='data/ade/ADEChallengeData2016', **options):
    def loader(split):
        return dict(dataset=dict(
            type='ADE20KDataset', data_root=root, pipeline=[], data_prefix=dict(
                img_path=f'images/{split}', seg_map_path=f'annotations/{split}'), **options))

    evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
    return Config(dict(
        train_dataloader=loader('training'), val_dataloader=loader('validation'),
        val_evaluator=evaluator))


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'')


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def coco(here):
    for split in 'train', 'val':
        touch(here / f'data/coco/annotations/instances_{split}2017.json')
        touch(here / f'data/coco/{split}2017/1.jpg')
    return here / 'data/coco'


@pytest.fixture
def ade(here):
    for split in 'training', 'validation':
        touch(here / f'data/ade/ADEChallengeData2016/images/{split}/1.jpg')
        touch(here / f'data/ade/ADEChallengeData2016/annotations/{split}/1.png')
    return here / 'data/ade/ADEChallengeData2016'


def message(cfg, **options):
    with pytest.raises(FileNotFoundError) as info:
        check_dataset(cfg, **options)
    return str(info.value)


def test_good_trees_pass(coco, ade):
    for cfg in coco_config(), ade_config():
        before = copy.deepcopy(cfg.to_dict())
        assert check_dataset(cfg, splits=('train', 'val', 'test')) is None
        assert cfg.to_dict() == before


def test_written_sets_pass(here):
    write_coco('data/coco', 1, 1, (64, 64), coco2017=True, progress=False)
    write_ade20k('data/ade/ADEChallengeData2016', 1, 1, (64, 64), progress=False)
    check_dataset(coco_config())
    check_dataset(ade_config())


def test_no_coco_at_all(here):
    assert message(coco_config()) == f'''\
The data set of this config is not there:
  {here}/data/coco does not exist  (train_dataloader.dataset.data_root)

Expected:
{here}/data/coco/
├── annotations/
│   ├── instances_train2017.json
│   └── instances_val2017.json
├── train2017/
└── val2017/

Get it: COCO 2017, from https://cocodataset.org/#download
or, to try things out, draw a stand-in: python tools/make_shapes.py data/coco --layout coco2017
To link it from elsewhere:
  mkdir -p data && ln -s /path/to/the/data data/coco
To name another place when you start:
  --cfg-options train_dataloader.dataset.data_root=/path/to/the/data \
val_dataloader.dataset.data_root=/path/to/the/data \
val_evaluator.ann_file=/path/to/the/data/annotations/instances_val2017.json'''


def test_no_ade20k_at_all(here):
    text = message(ade_config())
    assert f'  {here}/data/ade/ADEChallengeData2016 does not exist' in text
    assert '''\
├── annotations/
│   ├── training/
│   └── validation/
└── images/
    ├── training/
    └── validation/
''' in text
    assert 'http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip' in text
    assert 'mkdir -p data/ade && ln -s /path/to/the/data data/ade/ADEChallengeData2016' in text
    assert 'val_dataloader.dataset.data_root=/path/to/the/data' in text
    assert 'ann_file' not in text


@pytest.mark.parametrize('name,key', [
    ('annotations/instances_train2017.json', 'train_dataloader.dataset.ann_file'),
    ('annotations/instances_val2017.json', 'val_dataloader.dataset.ann_file'),
    ('train2017/1.jpg', 'train_dataloader.dataset.data_prefix.img'),
    ('val2017/1.jpg', 'val_dataloader.dataset.data_prefix.img'),
])
def test_each_missing_part_of_coco(coco, name, key):
    (coco / name).unlink()
    path, problem = ((coco / name, 'does not exist') if name.endswith('json') else
                     ((coco / name).parent, 'is empty'))
    lines = message(coco_config()).splitlines()
    assert lines[1] == f'  {path} {problem}  ({key})'
    assert lines[2] == ''  # and nothing else is missing
    assert not any('ln -s' in line for line in lines)  # there is a folder in its place
    if problem == 'is empty':
        path.rmdir()
        assert message(coco_config()).splitlines()[1] == f'  {path} does not exist  ({key})'


def test_missing_part_of_ade20k(ade):
    (ade / 'annotations/training/1.png').unlink()
    assert (f'{ade}/annotations/training is empty  '
            '(train_dataloader.dataset.data_prefix.seg_map_path)') in message(ade_config())
    (ade / 'images/validation/1.jpg').unlink()
    (ade / 'images/validation').rmdir()
    touch(ade / 'images/validation')
    lines = message(ade_config()).splitlines()
    assert lines[2] == (f'  {ade}/images/validation is not a folder  '
                        '(val_dataloader.dataset.data_prefix.img_path)')
    assert lines[3] == ''


def test_only_the_splits_in_use(coco):
    (coco / 'annotations/instances_val2017.json').unlink()
    check_dataset(coco_config(), splits=('train', ))
    for split in 'val', 'test':
        assert f'({split}_dataloader.dataset.ann_file)' in message(coco_config(), splits=[split])


def test_evaluators_file(coco):
    cfg = coco_config()
    cfg.val_evaluator.ann_file = 'data/coco/annotations/other.json'
    assert (f'{coco}/annotations/other.json does not exist  (val_evaluator.ann_file)'
            in message(cfg))
    check_dataset(cfg, splits=['train'])
    cfg.val_evaluator = [dict(type='A'), dict(type='B', ann_file='gone.json', metrics=['mIoU'])]
    text = message(cfg)
    assert '(val_evaluator.1.ann_file)' in text
    assert '--cfg-options val_evaluator.1.ann_file=/path/to/it' in text
    cfg.val_evaluator = dict(ann_file=None)
    check_dataset(cfg)


def test_wrappers(here, coco):
    cfg = coco_config()
    good = cfg.train_dataloader.dataset
    bad = dict(good, data_root='data/more')
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=dict(
        type='ConcatDataset', datasets=[good, bad]))
    text = message(cfg)
    key = 'train_dataloader.dataset.dataset.datasets.1.data_root'
    assert text.splitlines()[1:3] == [f'  {here}/data/more does not exist  ({key})', '']
    assert f'--cfg-options {key}=/path/to/the/data' in text
    assert 'val_evaluator' not in text
    cfg.merge_from_dict({key: 'data/coco'})  # the advice works
    check_dataset(cfg)


def test_absolute_names_do_not_start_at_the_root(coco, here):
    cfg = coco_config()
    cfg.train_dataloader.dataset.ann_file = str(here / 'mine.json')
    assert f'{here}/mine.json does not exist' in message(cfg)
    touch(here / 'mine.json')
    check_dataset(cfg)


def test_without_a_root(coco, here):
    cfg = coco_config()
    cfg.train_dataloader.dataset.update(
        data_root=None, ann_file='data/coco/annotations/instances_train2017.json',
        data_prefix=dict(img='data/coco/gone'))
    text = message(cfg)
    assert f'{here}/data/coco/gone does not exist' in text
    assert '--cfg-options train_dataloader.dataset.data_prefix.img=/path/to/it' in text


@pytest.mark.parametrize('options', [
    dict(backend_args=dict(backend='petrel')),
    dict(file_client_args=dict(backend='memcached')),
    dict(data_root='s3://bucket/coco/'),
])
def test_remote_data_are_not_checked(here, options):
    cfg = coco_config()
    cfg.train_dataloader.dataset.update(options)
    check_dataset(cfg, splits=['train'])
    cfg.train_dataloader.dataset.update(
        data_root='gone', backend_args=dict(backend='local'), file_client_args=None)
    assert f'{here}/gone does not exist' in message(cfg, splits=['train'])


def test_remote_evaluator(coco):
    cfg = coco_config()
    cfg.val_evaluator.ann_file = 's3://bucket/val.json'
    check_dataset(cfg)


@pytest.mark.parametrize('classes,layout,config', [
    (CATEGORIES, 'coco', coco_config), (SEG_CLASSES, 'ade20k', ade_config)])
def test_drawn_sets_are_drawn(here, classes, layout, config):
    text = message(config('data/drawn/', metainfo=dict(classes=classes)))
    assert f'Draw it: python tools/make_shapes.py data/drawn --layout {layout}\n' in text
    assert 'http' not in text


def test_unknown_data_sets(here):
    class Odd:
        pass

    touch(here / 'data/x.txt')
    for dataset in [
            dict(type='Odd'), dict(type=Odd, data_root='data', ann_file=['x.txt']), dict(), None,
            dict(type='Odd', data_prefix='data', ann_file=''), 'data', [], 3,
            dict(type='Odd', data_root='data', data_prefix=dict(img='', seg=None), ann_file=7)]:
        check_dataset(dict(train_dataloader=dict(dataset=dataset)))
    check_dataset({})
    check_dataset(Config(dict(train_dataloader=None, val_evaluator=None)))
    check_dataset(dict(train_dataloader=object()))
    text = message(dict(train_dataloader=dict(dataset=dict(
        type=Odd, data_root='data', ann_file=['x.txt', 'y.txt'], metainfo=dict(classes='abc')))))
    assert f'{here}/data/y.txt does not exist' in text
    assert 'x.txt does not' not in text and 'Get it' not in text and 'Draw it' not in text


def test_linked_folder(coco, here):
    os.rename(coco, here / 'disk')
    with pytest.raises(FileNotFoundError):
        check_dataset(coco_config())
    os.symlink(here / 'disk', coco)
    check_dataset(coco_config())
