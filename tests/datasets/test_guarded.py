"""Training on broken data gives a whole sample or stops with the file named."""
import io
import json
import pickle
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, init_default_scope
from support import broken
from support.broken import ANNOTATIONS, IMAGES, LABEL_MAPS, break_file, config_of
from torch.utils.data import DataLoader

from mmeffformer.datasets import BrokenData, GuardedDataset, check_annotations
from mmeffformer.utils.errors import TrainingStopped

ADVICE = '`python tools/check_data.py CONFIG` lists every broken file'


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    return broken.write_both(tmp_path_factory.mktemp('drawn'))


@pytest.fixture
def coco(drawn, tmp_path):
    return broken.copied(drawn / 'coco', tmp_path / 'coco')


@pytest.fixture
def ade20k(drawn, tmp_path):
    return broken.copied(drawn / 'ade20k', tmp_path / 'ade20k')


def build(cfg, wrap=None, serialize=False):
    init_default_scope(cfg.default_scope)
    dataset = cfg.train_dataloader.dataset
    if 'datasets' not in dataset:
        dataset.serialize_data = serialize  # which takes longer here than all else
    with redirect_stdout(io.StringIO()):  # pycocotools tells of its progress
        return GuardedDataset(DATASETS.build(dict(wrap, dataset=dataset) if wrap else dataset))


def sample_of(dataset, path):
    """The sample of an image."""
    index, = [i for i in range(len(dataset))
              if dataset.get_data_info(i)['img_path'] == str(path)]
    return dataset[index]


def refusal(dataset, path):
    with pytest.raises(BrokenData) as info:
        sample_of(dataset, path)
    assert ADVICE in str(info.value)
    return str(info.value)


def first_image(dataset):
    return dataset.get_data_info(0)['img_path']


@pytest.mark.parametrize('name', IMAGES)
def test_images_of_a_detector(coco, name):
    change, kinds = IMAGES[name]
    dataset = build(config_of(coco))
    path = coco / 'train' / first_image(dataset).split('/')[-1]
    clean = sample_of(dataset, path)
    break_file(path, change)
    if kinds[-1] in ('grey image', 'CMYK image', '16-bit image', 'alpha channel',
                     'EXIF rotation'):
        sample = sample_of(dataset, path)
        assert sample['inputs'].shape == clean['inputs'].shape
        assert sample['inputs'].dtype == torch.uint8 and sample['inputs'].float().std() > 5
        assert len(sample['data_samples'].gt_instances) == len(clean['data_samples'].gt_instances)
    else:
        text = refusal(dataset, path)
        assert text.startswith(f'{kinds[-1]}: {path} (image ')
    others = [i for i in range(len(dataset))
              if dataset.get_data_info(i)['img_path'] != str(path)]
    assert [dataset[i]['inputs'].shape for i in others] == [clean['inputs'].shape] * len(others)


@pytest.mark.parametrize('name', IMAGES)
def test_images_of_a_segmentor(ade20k, name):
    change, kinds = IMAGES[name]
    dataset = build(config_of(ade20k))
    path = break_file(ade20k / 'images/training/ADE_train_00000001.jpg', change)
    if kinds[-1] in ('grey image', 'CMYK image', '16-bit image', 'alpha channel',
                     'EXIF rotation'):
        assert sample_of(dataset, path)['inputs'].shape[0] == 3
    elif kinds[-1] == 'image size':  # nothing says what it should be, but the label map
        assert refusal(dataset, path).startswith(
            f'label map size: {ade20k}/annotations/training/ADE_train_00000001.png: 96 x 64 px; '
            f'its image {path} has ')
    else:
        assert refusal(dataset, path).startswith(f'{kinds[-1]}: {path}')


@pytest.mark.parametrize('name', LABEL_MAPS)
def test_label_maps(ade20k, name):
    change, kinds = LABEL_MAPS[name]
    dataset = build(config_of(ade20k))
    image = ade20k / 'images/training/ADE_train_00000001.jpg'
    clean = sample_of(dataset, image)['data_samples'].gt_sem_seg.data
    labels = break_file(ade20k / 'annotations/training/ADE_train_00000001.png', change)
    if kinds:
        assert refusal(dataset, image).startswith(f'{kinds[0]}: {labels}')
    else:
        data = sample_of(dataset, image)['data_samples'].gt_sem_seg.data
        assert data.shape == clean.shape
        assert ({*data.unique().tolist()} <= {*range(7), 255})


@pytest.mark.parametrize('name', ANNOTATIONS)
def test_annotations(coco, name):
    change, kind, left = ANNOTATIONS[name]
    path = coco / 'annotations/instances_train.json'
    content = json.loads(path.read_text())
    item = content['annotations'][0]
    whole = sum(other['image_id'] == item['image_id'] and not other['iscrowd']
                for other in content['annotations'])
    assert not item['iscrowd'] and whole > 1
    cfg = config_of(coco)
    check_annotations(cfg)
    image = coco / 'train' / f'{item["image_id"]:012d}.jpg'
    item.update(change)
    path.write_text(json.dumps(content))
    if left is None:  # the training does not start
        with pytest.raises(BrokenData) as info:
            check_annotations(cfg)
        assert f'\n  {kind}: {path} (image ' in str(info.value)
        assert f', annotation {item["id"]}): ' in str(info.value)
        assert ADVICE in str(info.value)
    else:
        check_annotations(cfg)
        sample = sample_of(build(cfg), image)['data_samples']
        assert len(sample.gt_instances) == len(sample.gt_instances.masks) == whole - 1 + left
        boxes = sample.gt_instances.bboxes.tensor
        assert boxes.isfinite().all() and boxes.min() >= 0 and (boxes[:, 2] <= 192).all()


@pytest.mark.parametrize('name,kind', [
    ('infinite', 'box not finite'), ('empty segmentation', 'no segmentation'),
    ('polygon of text', 'broken polygon'), ('RLE too long', 'broken RLE'),
    ('undecodable RLE', 'broken RLE')])
def test_annotations_that_were_not_checked_before(coco, name, kind):
    path = coco / 'annotations/instances_train.json'
    content = json.loads(path.read_text())
    item = content['annotations'][0]
    item.update(ANNOTATIONS[name][0])
    path.write_text(json.dumps(content))
    image = coco / 'train' / f'{item["image_id"]:012d}.jpg'
    assert f'{kind}: {image} (image {item["image_id"]}): ' in refusal(
        build(config_of(coco)), image)


def cut_off(content):
    return json.dumps(content)[:-500]


def same_ids(content):
    for image in content['images']:
        image['id'] = 5
    return json.dumps(content)


def same_annotation_ids(content):
    content['annotations'][1]['id'] = content['annotations'][0]['id']
    return json.dumps(content)


def no_annotations(content):
    return json.dumps(dict(content, annotations=[]))


@pytest.mark.parametrize('change,kind', [
    (cut_off, 'broken JSON'), (same_ids, 'duplicate image id'),
    (same_annotation_ids, 'duplicate annotation id'), (no_annotations, 'no images'),
    (lambda content: '[]', 'wrong form'),
    (lambda content: json.dumps(dict(content, categories=content['categories'][1:])),
     'missing category')])
def test_annotation_files(coco, change, kind):
    cfg = config_of(coco)
    path = coco / 'annotations/instances_train.json'
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(TrainingStopped, match=f'\n  {kind}: {path}'):
        check_annotations(cfg)
    check_annotations(cfg, ['val'])


def test_a_data_set_that_cannot_be_built(coco):
    cfg = config_of(coco)
    cfg.train_dataloader.dataset.bogus = 7
    with pytest.raises(ValueError, match="'CocoDataset' of the config cannot be built: .*bogus"):
        check_annotations(cfg)


def test_folder_without_images(ade20k):
    cfg = config_of(ade20k)
    cfg.train_dataloader.dataset.img_suffix = '.jpeg'
    with pytest.raises(BrokenData, match=f'\n  no images: {ade20k}/images/training, .* finds none '
                                         'that end in .jpeg'):
        check_annotations(cfg)


WRAPPERS = [
    dict(type='RepeatDataset', times=2), dict(type='ClassBalancedDataset', oversample_thr=1),
    dict(type='ConcatDataset'),
    dict(type='MultiImageMixDataset', pipeline=[dict(type='RandomFlip', prob=0.)])]


@pytest.mark.parametrize('wrap', WRAPPERS, ids=lambda wrap: wrap['type'])
def test_wrapped(coco, wrap):
    cfg = config_of(coco)
    inner = cfg.train_dataloader.dataset
    if wrap['type'] == 'ConcatDataset':
        cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[inner, inner])
        wrap = None
    elif wrap['type'] == 'MultiImageMixDataset':
        inner.pipeline.pop()  # what is mixed is not packed yet
    dataset = build(cfg, wrap)
    path = first_image(dataset)
    assert len(dataset) >= 5 and dataset[0]
    with open(path, 'r+b') as file:
        file.truncate(500)
    with pytest.raises(BrokenData, match=f'^truncated image: {path} '):
        dataset[0]


def test_what_fails_outside_of_the_pipeline(coco):
    dataset = build(config_of(coco), dict(type='MultiImageMixDataset', pipeline=[
        dict(type='MixUp', img_scale=(0, 0))]))
    with pytest.raises(BrokenData) as info:
        dataset[0]
    text = str(info.value)
    assert f'{first_image(dataset)} (image ' in text and ') could not be prepared: ' in text
    # It may be a programmer's.
    assert text.startswith('Traceback') and "\nKeyError: 'gt_bboxes'\n" in text


def test_failing_transforms_keep_their_traceback(coco):
    def fail(data):
        raise KeyError('what is this')

    dataset = build(config_of(coco))
    dataset.pipeline.transforms.append(fail)
    text = refusal(dataset, first_image(dataset))
    assert 'in fail\n' in text
    assert f"{first_image(dataset)} (image " in text
    assert "could not be prepared: KeyError: 'what is this'" in text


def test_other_images_are_taken_as_before(coco):
    cfg = config_of(coco)
    cfg.train_dataloader.dataset.pipeline[0].ignore_empty = True  # users say so to skip
    dataset = build(cfg)
    path = first_image(dataset)
    with open(path, 'wb'):
        pass
    assert {dataset[0]['data_samples'].img_path for _ in range(9)} <= {
        dataset.get_data_info(i)['img_path'] for i in range(1, len(dataset))}
    for i in range(len(dataset)):
        with open(dataset.get_data_info(i)['img_path'], 'wb'):
            pass
    dataset.max_refetch = 3
    with pytest.raises(BrokenData, match='Cannot find valid image after 3!'):
        dataset[0]


def test_it_is_the_data_set_it_holds(coco):
    dataset = build(config_of(coco), serialize=True)
    assert dataset.metainfo['classes'] == dataset.dataset.metainfo['classes']
    assert len(dataset) == len(dataset.dataset) == sum(1 for _ in dataset)
    dataset.max_refetch = 77
    assert dataset.dataset.max_refetch == 77
    with pytest.raises(AttributeError, match='nothing'):
        _ = dataset.nothing
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    again = pickle.loads(pickle.dumps(dataset))
    assert isinstance(again, GuardedDataset) and len(again) == len(dataset)
    path = first_image(dataset)
    with open(path, 'wb'):
        pass
    assert refusal(again, path).startswith('zero-byte image')


def test_pipeline_put_in_later_is_guarded(coco):
    dataset = build(config_of(coco))
    path = first_image(dataset)
    dataset.pipeline = Compose(dataset.pipeline.transforms[:1])  # as hooks do
    assert 'gt_bboxes' not in dataset[0]
    break_file(coco / 'train' / path.split('/')[-1], IMAGES['EXIF'][0])
    assert refusal(dataset, path).startswith('image size')


def test_images_without_boxes_are_skipped_or_used_as_before(coco):
    path = coco / 'annotations/instances_train.json'
    content = json.loads(path.read_text())
    content['annotations'] = [item for item in content['annotations'] if item['image_id'] != 2]
    path.write_text(json.dumps(content))
    cfg = config_of(coco)
    before = len(build(cfg))
    cfg.train_dataloader.dataset.filter_cfg = None
    dataset = build(cfg)
    assert len(dataset) == 6 > before
    sample = sample_of(dataset, coco / 'train/000000000002.jpg')
    assert len(sample['data_samples'].gt_instances) == 0


def test_several_images_at_once(coco):
    """As pipelines for videos load them: not checked, but named."""
    dataset = build(config_of(coco))
    info = dict(img_path=['a.jpg', 'b.jpg'], height=[64, 32], width=[96, 48], img_id=7)
    dataset.pipeline.transforms = [lambda data: dict(
        data, img=[1, 2], ori_shape=[(64, 96), (32, 48)], gt_bboxes=[[], [[float('nan')] * 4]])]
    assert dataset.pipeline(dict(info))['img'] == [1, 2]
    dataset.pipeline.transforms.append(lambda data: 1 / 0)
    with pytest.raises(BrokenData, match=r"\['a.jpg', 'b.jpg'\] \(image 7\) could not be"):
        dataset.pipeline(dict(info))


def test_guarded_twice_is_guarded_once(coco):
    dataset = GuardedDataset(build(config_of(coco)))
    assert all(isinstance(step, object) and type(step).__name__ != 'GuardedPipeline'
               for step in dataset.pipeline.transforms)
    assert len(dataset.pipeline.transforms) == 5 and dataset[0]


def test_same_samples_as_without(coco, ade20k):
    for root in coco, ade20k:
        cfg = config_of(root)
        guarded = build(cfg)
        with redirect_stdout(io.StringIO()):
            plain = DATASETS.build(cfg.train_dataloader.dataset)
        for i in range(len(plain)):
            samples = []
            for dataset in plain, guarded:
                np.random.seed(i)
                samples.append(dataset[i])
            assert torch.equal(samples[0]['inputs'], samples[1]['inputs'])
            assert samples[0]['data_samples'].metainfo == samples[1]['data_samples'].metainfo


def test_values_outside_of_what_is_used(ade20k):
    # Classes left out are mapped away before values are compared.
    cfg = config_of(ade20k)
    dataset = build(cfg)
    dataset.label_map = {0: 0, 1: 1, 2: 255, 3: 2, 4: 255, 5: 255, 6: 255}
    for info in [dataset.get_data_info(i) for i in range(len(dataset))]:
        info['label_map'] = dataset.label_map
        found = dataset.pipeline(info)['data_samples'].gt_sem_seg.data.unique().tolist()
        assert {*found} <= {0, 1, 2, 255}


def test_in_a_worker(coco):
    dataset = build(config_of(coco))
    path = first_image(dataset)
    with open(path, 'r+b') as file:
        file.truncate(700)
    loader = DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=pseudo_collate)
    with pytest.raises(BrokenData) as info:
        list(loader)
    assert str(info.value).startswith(f'truncated image: {path} (image ')
    assert 'Traceback' not in str(info.value)
