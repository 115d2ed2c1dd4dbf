"""What is read for a config, and what is found in all of it."""
import copy
import json
import os

import pytest
from mmengine.config import Config
from support import broken
from support.broken import ANNOTATIONS, IMAGES, LABEL_MAPS, break_file, config_of

from mmeffformer.datasets import inspect, inspection
from mmeffformer.datasets.inspection import save_report


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    return broken.write_both(tmp_path_factory.mktemp('drawn'))


def test_nothing_is_wrong_with_drawn_sets(drawn):
    for layout, kind, places in (
            ('coco', 'CocoDataset', 'annotations/instances_{}.json, {}/{}/'),
            ('ade20k', 'BaseSegDataset', 'images/{}, {}/annotations/{}')):
        told = []
        report = inspect(config_of(drawn / layout), workers=2,
                         tell=lambda *now, told=told: told.append(now))
        assert report.faults == []
        names = ('train', 'val') if layout == 'coco' else ('training', 'validation')
        assert report.looked_at == {
            f'{splits}: {kind} of {drawn}/{layout}/' + places.format(
                name, drawn / layout, name): images
            for splits, name, images in zip(('train', 'val, test'), names, (6, 2))}
        assert ('train: reading images', 6, 6) in told and told[0][1:] == (0, 0)


def test_every_broken_file_of_a_detector_is_found_and_no_other(drawn, tmp_path):
    root = broken.copied(drawn / 'coco', tmp_path / 'coco')
    # As many images as there are ways to break one, and as annotations to break one.
    path = root / 'annotations/instances_train.json'
    content = json.loads(path.read_text())
    image, data = content['images'][0], (root / 'train/000000000001.jpg').read_bytes()
    item = next(item for item in content['annotations'] if not item['iscrowd'])
    content['images'], content['annotations'], expected = [], [], set()
    for number, (change, kinds) in enumerate(IMAGES.values(), 1):
        name = f'{number}.jpg'
        (root / 'train' / name).write_bytes(data)
        break_file(root / 'train' / name, change)
        content['images'].append(dict(image, id=number, file_name=name))
        expected |= {(kind, str(root / 'train' / name), number, None) for kind in kinds}
    for number, (change, kind, _) in enumerate(ANNOTATIONS.values(), 101):
        name = f'{number}.jpg'
        (root / 'train' / name).write_bytes(data)
        content['images'].append(dict(image, id=number, file_name=name))
        broken_item = dict(item, id=number, image_id=number)
        broken_item.update(change)
        content['annotations'] += [broken_item, dict(item, id=number + 100, image_id=number)]
        if kind:
            expected.add((kind, str(path), broken_item['image_id'], number))
    path.write_text(json.dumps(content))
    report = inspect(config_of(root), workers=2)
    assert {fault[:2] + fault[3:] for _, fault in report.faults} == expected
    assert len(report.faults) == len(expected)
    assert {splits for splits, _ in report.faults} == {'train'}
    assert inspect(config_of(root), ['val']).faults == []


def test_every_broken_file_of_a_segmentor_is_found_and_no_other(drawn, tmp_path):
    root = broken.copied(drawn / 'ade20k', tmp_path / 'ade20k')
    images, labels = root / 'images/training', root / 'annotations/training'
    picture, label_map = (folder.joinpath(f'ADE_train_00000001.{end}').read_bytes()
                          for folder, end in ((images, 'jpg'), (labels, 'png')))
    expected = set()
    ways = [(*way, None, []) for way in IMAGES.values()]
    ways += [(bytes, [], *way) for way in LABEL_MAPS.values()]
    for number, (change, kinds, label_change, label_kinds) in enumerate(ways):
        image, label = images / f'x{number}.jpg', labels / f'x{number}.png'
        image.write_bytes(picture)
        label.write_bytes(label_map)
        break_file(image, change)
        if not image.exists():  # mmseg, which lists the folder, does not know of it
            expected.add(('missing image', str(label)))
            continue
        if kinds == []:
            break_file(label, label_change)
        expected |= {(kind, str(image)) for kind in kinds if kind != 'image size'}
        expected |= {(kind, str(label)) for kind in label_kinds}
        if 'image size' in kinds:
            expected.add(('label map size', str(label)))
    report = inspect(config_of(root), workers=2)
    assert {fault[:2] for _, fault in report.faults} == expected
    assert len(report.faults) == len(expected)


def test_wrapped_data_sets(drawn, tmp_path):
    cfg = config_of(broken.copied(drawn / 'coco', tmp_path / 'coco'))
    inner = cfg.train_dataloader.dataset
    other = copy.deepcopy(inner)
    other.data_prefix.img = 'val/'
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=dict(
        type='ConcatDataset', datasets=[inner, inner, other]))
    report = inspect(cfg, ['train'])
    assert len(report.looked_at) == 2
    # Four of the six names are not in the other folder, and two are of other images.
    assert [(fault.kind, fault.file) for _, fault in report.faults] == [
        ('missing image', f'{tmp_path}/coco/val/{i:012d}.jpg') for i in (3, 4, 5, 6)]


def test_as_the_pipeline_reads(drawn, tmp_path):
    cfg = config_of(broken.copied(drawn / 'coco', tmp_path / 'coco'))
    path = break_file(tmp_path / 'coco/train/000000000003.jpg', IMAGES['EXIF'][0])
    assert [fault[:2] for _, fault in inspect(cfg).faults] == [
        ('EXIF rotation', str(path)), ('image size', str(path))]
    for loading in cfg.train_dataloader.dataset.pipeline[0], cfg.train_pipeline[0]:
        loading.color_type = 'color_ignore_orientation'
    assert [fault[:2] for _, fault in inspect(cfg).faults] == [('EXIF rotation', str(path))]


def test_other_annotation_files(drawn, tmp_path):
    """mmengine's own form, which any data set may have."""
    root = drawn / 'coco'
    entries = [dict(img_path=f'{i:012d}.jpg', height=64, width=96, instances=[])
               for i in (1, 2, 2, 7)]
    (tmp_path / 'a.json').write_text(json.dumps(dict(metainfo={}, data_list=entries)))
    leaf = dict(type='BaseDetDataset', ann_file=str(tmp_path / 'a.json'),
                data_prefix=dict(img_path=str(root / 'train')), pipeline=[])
    cfg = Config(dict(train_dataloader=dict(dataset=leaf), model={}, default_scope='mmdet'))
    assert [fault[:2] for _, fault in inspect(cfg, ['train']).faults] == [
        ('repeated image', f'{root}/train/000000000002.jpg'),
        ('missing image', f'{root}/train/000000000007.jpg')]
    (tmp_path / 'a.json').write_text('{"metainfo": ')
    (_, fault), = inspect(cfg, ['train']).faults
    assert fault.kind == 'wrong form' and fault.file == str(tmp_path / 'a.json')
    assert 'JSONDecodeError' in fault.detail
    with pytest.raises(ValueError, match='no data set for val, test'):
        inspect(cfg, ['val', 'test'])


def test_saved(drawn, tmp_path):
    cfg = config_of(broken.copied(drawn / 'coco', tmp_path / 'coco'))
    path = break_file(tmp_path / 'coco/val/000000000002.jpg', None)
    report = inspect(cfg)
    save_report(report, tmp_path / 'new/report.json')
    assert json.loads((tmp_path / 'new/report.json').read_text()) == dict(
        looked_at=report.looked_at, faults=[dict(
            split='val, test', severity='error', kind='missing image', file=str(path), detail='',
            image_id=2, annotation_id=None)])


def test_a_killed_process_is_no_hang(drawn, monkeypatch):
    monkeypatch.setattr(inspection, '_inspect_all', die)
    with pytest.raises(RuntimeError, match='was killed, maybe for its memory'):
        inspect(config_of(drawn / 'coco'))


def die(*args, **options):
    os._exit(9)
