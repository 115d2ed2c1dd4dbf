"""Checks of data: what training cannot use is an error, what is legal is not."""
import json
import random
import warnings

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS, MODELS, TRANSFORMS, init_default_scope
from mmengine.runner import Runner
from support import broken
from support.broken import ANNOTATIONS, IMAGES, LABEL_MAPS, break_file, config_of

from mmeffformer.datasets import check_data
from mmeffformer.utils.config import model_cfg

VAL = 'instances_val.json'
TRAIN = 'instances_train.json'
models = {}


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    return broken.write_both(tmp_path_factory.mktemp('drawn'))


@pytest.fixture
def coco(drawn, tmp_path):
    return broken.copied(drawn / 'coco', tmp_path / 'coco')


@pytest.fixture
def ade20k(drawn, tmp_path):
    return broken.copied(drawn / 'ade20k', tmp_path / 'ade20k')


def check(cfg, *splits, **options):
    """Check a config with the unchanged model of its library."""
    scope = cfg.default_scope
    init_default_scope(scope)
    if 'model' not in options:
        options['model'] = models.get(scope) or MODELS.build(model_cfg(cfg))
        models[scope] = options['model']
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return check_data(cfg, splits or ('train', 'val', 'test'), workers=1, **options)


def edit(root, name, change):
    path = root / 'annotations' / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def each(change):
    return lambda content: [change(item) for item in content['annotations']]


def test_sound_data(drawn):
    report = check(config_of(drawn / 'coco'))
    assert report.errors == report.warnings == []
    best = ', '.join(f'coco/{kind}_mAP{at} 1' for kind in ('bbox', 'segm')
                     for at in ('', '_50', '_75'))
    assert report.notes == [
        'train_dataloader: 6 samples; circle 5, rectangle 3, triangle 2, star 1, ring 2, cross 1',
        'val_dataloader: 2 samples; circle 1, triangle 1, star 1, ring 2',
        f'val_evaluator: the ground truth as predictions gives {best}']
    report = check(config_of(drawn / 'ade20k'))
    assert report.errors == report.warnings == []
    assert report.notes[-1] == ('val_evaluator: the ground truth as predictions gives aAcc 100, '
                                'mIoU 100, mAcc 100')
    assert str(report).endswith('\nerrors: 0, warnings: 0')


def test_random_numbers_and_transforms_stay_as_they_are(drawn):
    cfg = config_of(drawn / 'coco')
    check(cfg)  # which builds the model
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    check(cfg)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


@pytest.mark.parametrize('name', IMAGES)
def test_images(coco, name):
    change, error = IMAGES[name]
    path = break_file(coco / 'train/000000000001.jpg', change)
    report = check(config_of(coco), 'train')
    assert len(report.errors) == bool(error)
    if error:
        assert error.format(path) in report.errors[0] and str(path) in report.errors[0]


@pytest.mark.parametrize('name', LABEL_MAPS)
def test_label_maps(ade20k, name):
    change, error = LABEL_MAPS[name]
    path = break_file(ade20k / 'annotations/training/ADE_train_00000001.png', change)
    report = check(config_of(ade20k), 'train')
    assert len(report.errors) == bool(error)
    if error:
        image = ade20k / 'images/training/ADE_train_00000001.jpg'
        assert error.format(image) in report.errors[0]
        assert f'{image} with label map {path}' in report.errors[0]


@pytest.mark.parametrize('name', ANNOTATIONS)
def test_annotations(coco, name):
    change, error, left_out = ANNOTATIONS[name]

    def only_the_first(content):
        content['annotations'] = [dict(content['annotations'][0], **change)]
        content['images'] = content['images'][:1]

    edit(coco, TRAIN, only_the_first)
    cfg = config_of(coco)
    cfg.train_dataloader.dataset.filter_cfg = None
    report = check(cfg, 'train')
    path = coco / 'train/000000000001.jpg'
    if error:
        assert error.format(path) in report.errors[0]
    elif left_out:
        assert report.errors[0].startswith('train_dataloader: no usable object is left in 1 sam')
    else:
        assert report.errors == []


def test_process_that_dies_names_the_file(coco):
    @TRANSFORMS.register_module(force=True)
    class Die:
        def __call__(self, data):
            if data['img_path'].endswith('3.jpg'):
                import os
                os._exit(3)
            return data

    cfg = config_of(coco)
    cfg.train_dataloader.dataset.pipeline.insert(1, dict(type='mmengine.Die'))
    report = check(cfg, 'train')
    assert report.errors[0].startswith('a process stopped while it prepared '
                                       f'{coco}/train/000000000003.jpg (image 3); ')


@pytest.mark.parametrize('change, texts', [
    (lambda content: [item.update(id=i) for i, item in enumerate(content['annotations'])],
     ['bbox_mAP 0.', '1 objects of its file have id 0', '(annotation 0 of image 1)']),
    (each(lambda item: item.pop('iscrowd')), ["the key 'iscrowd' is missing"]),
    (lambda content: content['images'].append(dict(content['images'][0], id=77, file_name='n.jpg'))
     or content['annotations'].append(dict(content['annotations'][0], id=77, image_id=77)),
     ['n.jpg']),
], ids=['id 0', 'no iscrowd', 'image is missing'])
def test_wrong_figures_are_found_before_training(coco, change, texts):
    edit(coco, VAL, change)
    report = check(config_of(coco), 'val')
    assert all(text in report.errors[0] for text in texts)


def test_evaluator_of_another_file(coco):
    cfg = config_of(coco)
    cfg.val_evaluator.ann_file = str(coco / 'annotations' / TRAIN)
    error, = check(cfg, 'val').errors
    assert 'coco/bbox_mAP 0, coco/bbox_mAP_50 0 instead of 1' in error
    assert (f'val_evaluator.ann_file is {coco}/annotations/{TRAIN}; the ann_file of its data set '
            f'is {coco}/annotations/{VAL}') in error


def test_more_objects_than_the_metric_counts(coco):
    def crowded(content):
        first = content['annotations'][0]
        content['annotations'] = [dict(first, id=i + 1, area=36, bbox=[2 + i % 10 * 9,
                                  2 + i // 10 * 5, 6, 4], segmentation=[[
                                      2 + i % 10 * 9, 2 + i // 10 * 5, 8 + i % 10 * 9,
                                      2 + i // 10 * 5, 8 + i % 10 * 9, 6 + i // 10 * 5]])
                                  for i in range(110)]

    edit(coco, VAL, crowded)
    report = check(config_of(coco), 'val')
    assert report.errors == []
    assert ('the best that this evaluator can give. 1 of 2 images have more than 100 objects'
            in report.warnings[0])


def test_objects_that_the_data_set_leaves_out_lower_the_best_figure(coco):
    edit(coco, VAL, lambda content: content['annotations'].append(dict(
        content['annotations'][0], id=50, bbox=[3, 3, 0.5, 9])))
    report = check(config_of(coco), 'val')
    assert report.errors == []
    assert '1 objects of its file are left out by the data set' in report.warnings[-1]
    assert '(annotation 50 of image 1)' in report.warnings[-1]


def test_nothing_to_learn(coco):
    edit(coco, TRAIN, each(lambda item: item.update(iscrowd=1)))
    errors = check(config_of(coco), 'train').errors
    assert errors == ['train_dataloader: no usable object is left in 6 samples (ignored by the '
                      'annotations: 14): training would learn nothing']


def test_left_out_objects_are_counted_by_reason(coco):
    edit(coco, TRAIN, lambda content: [item.update(segmentation=[[1, 1, 9, 9]])
                                       for item in content['annotations'][:3]])
    cfg = config_of(coco)
    cfg.train_dataloader.dataset.pipeline.insert(
        2, dict(type='FilterAnnotations', min_gt_bbox_wh=(20, 20)))
    report = check(cfg, 'train')
    assert 'LoadAnnotations: 3, FilterAnnotations: ' in report.warnings[0]


def test_broken_annotation_file_is_named(coco):
    path = coco / 'annotations' / TRAIN
    path.write_text(path.read_text()[:100])
    error, = check(config_of(coco), 'train').errors
    assert error.startswith(f'train_dataloader.dataset cannot be built from {path}: JSONDecode')


def test_no_image_of_the_chosen_class(coco):
    edit(coco, TRAIN, lambda content: content.update(annotations=[
        item for item in content['annotations'] if item['category_id'] != 4]))
    cfg = config_of(coco)
    cfg.train_dataloader.dataset.metainfo = dict(classes=('star', ))
    errors = check(cfg, 'train').errors
    assert errors[0].startswith('train_dataloader: none of the 6 images of CocoDataset is left. '
                                'No image has an object of these classes (star)')


@pytest.mark.parametrize('classes, text', [
    (('rectangle', 'circle', 'triangle', 'star', 'ring', 'cross'), 'are in another order than'),
    (('circle', 'rectangle', 'triangle', 'stars', 'ring', 'cross'), "has no category 'stars'")])
def test_classes_unlike_the_categories(coco, classes, text):
    cfg = config_of(coco)
    cfg.train_dataloader.dataset.metainfo = dict(classes=classes)
    assert text in check(cfg, 'train').errors[0]


def test_classes_unlike_the_heads(drawn):
    cfg = config_of(drawn / 'coco')
    cfg.model.roi_head.bbox_head.num_classes = 80
    errors = check(cfg, 'train', model=None).errors
    assert errors == [
        'model.roi_head.bbox_head has num_classes=80, and train data has 6 classes (circle, '
        'rectangle, triangle, star, ring, ...). Set num_classes=6, or correct metainfo.classes']
    for count in (6, 9):
        cfg = config_of(drawn / 'ade20k')
        cfg.model.decode_head.num_classes = count
        assert check(cfg, 'train', model=None).errors[0].startswith(
            f'model.decode_head has num_classes={count}, and train data has 7 classes')
    cfg = config_of(drawn / 'ade20k')
    cfg.model.decode_head.loss_decode.class_weight = [1.] * 6
    cfg.model.data_preprocessor.seg_pad_val = 9
    weight, pad = check(cfg, 'train', model=None).errors
    assert weight == 'model.decode_head.loss_decode.class_weight has 6 values for 7 classes'
    assert pad.startswith('model.data_preprocessor.seg_pad_val=9 is not a class')


def test_void_label_of_the_head_is_legal(ade20k):
    for split in ('training', 'validation'):
        for path in (ade20k / 'annotations' / split).iterdir():
            labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED) - 1
            labels[:9] = 7
            cv2.imwrite(str(path), labels)
    cfg = config_of(ade20k)
    for split in ('train', 'val'):
        data = cfg[f'{split}_dataloader'].dataset
        data.reduce_zero_label = False
        for step in data.pipeline:
            step.pop('reduce_zero_label', None)
    cfg.model.decode_head.ignore_index = cfg.model.data_preprocessor.seg_pad_val = 7
    error, = check(cfg, 'train', 'val', model=None).errors  # the evaluator's is still 255
    assert error.startswith('val_evaluator: the ground truth as predictions gives mIoU ')
    assert error.endswith('2 label maps have 7, neither a class nor ignore_index=255 of IoUMetric')
    cfg.val_evaluator.ignore_index = 7
    assert check(cfg, 'train', 'val', model=None).errors == []


def test_channels(ade20k):
    for split in ('training', 'validation'):
        for path in (ade20k / 'images' / split).iterdir():
            image = cv2.imread(str(path))
            cv2.imwrite(str(path.with_suffix('.png')), np.dstack([image, image[..., :1]]))
    cfg = config_of(ade20k)
    cfg.model.backbone.in_channels = 4
    cfg.model.data_preprocessor.update(mean=None, std=None, bgr_to_rgb=False)
    for split in ('train', 'val'):
        data = cfg[f'{split}_dataloader'].dataset
        data.img_suffix = '.png'
        data.pipeline[0].color_type = 'unchanged'
    assert check(cfg, 'train', 'val', model=None).errors == []
    cfg.model.backbone.in_channels = 3
    errors = check(cfg, 'train', 'val', model=None).errors
    assert len(errors) == 2
    assert 'has 4 channels, and model.backbone takes 3' in errors[0]


def test_images_of_several_sizes(ade20k):
    path = ade20k / 'images/training/ADE_train_00000002.jpg'
    labels = ade20k / 'annotations/training/ADE_train_00000002.png'
    for file in (path, labels):
        cv2.imwrite(str(file), cv2.imread(str(file), cv2.IMREAD_UNCHANGED)[:33])
    cfg = config_of(ade20k)
    assert check(cfg, 'train').errors == []
    cfg.model.data_preprocessor.update(size=(16, 16), size_divisor=None)  # pads smaller ones only
    error, = check(cfg, 'train', model=None).errors
    assert 'model.data_preprocessor fails on' in error
    assert error.endswith('Set its size or size_divisor, or use batch_size=1')


def test_images_of_several_sizes_one_by_one(ade20k):
    path = ade20k / 'images/validation/ADE_val_00000001.jpg'
    labels = ade20k / 'annotations/validation/ADE_val_00000001.png'
    for file in (path, labels):
        cv2.imwrite(str(file), cv2.imread(str(file), cv2.IMREAD_UNCHANGED)[:33])
    cfg = config_of(ade20k)
    assert check(cfg, 'val').errors == []
    cfg.val_dataloader.batch_size = 2
    error, = check(cfg, 'val').errors
    assert 'The image size in a batch should be the same' in error


def test_metric_that_needs_other_predictions(coco):
    @METRICS.register_module(force=True)
    class Speed(BaseMetric):
        def process(self, data_batch, data_samples):
            self.results.append(data_samples[0]['seconds'])

        def compute_metrics(self, results):
            return dict(seconds=sum(results))

    cfg = config_of(coco)
    cfg.val_evaluator = dict(type='mmengine.Speed')
    report = check(cfg, 'val')
    assert report.errors == [] and report.notes[-1].startswith('val_evaluator is not checked: ')
    assert report.notes[-1].endswith("the key 'seconds' is missing")


def test_samples_of_other_tasks(tmp_path):
    """Classes of images are counted, and what is unknown is left alone."""
    for name in ('cat', 'dog'):
        (tmp_path / name).mkdir()
        cv2.imwrite(str(tmp_path / name / '1.jpg'), np.zeros((32, 32, 3), np.uint8))
    pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
    cfg = Config(dict(
        default_scope='mmpretrain',
        model=dict(type='ImageClassifier', backbone=dict(type='ResNet', depth=18),
                   head=dict(type='LinearClsHead', num_classes=2, in_channels=512),
                   data_preprocessor=dict(type='ClsDataPreprocessor')),
        train_dataloader=dict(batch_size=2, sampler=dict(type='DefaultSampler', shuffle=True),
                              dataset=dict(type='CustomDataset', data_root=str(tmp_path),
                                           with_label=True, pipeline=pipeline))))
    report = check(cfg, 'train', model=None)
    assert report.errors == [] and report.notes == ['train_dataloader: 2 samples; cat 1, dog 1']
    pipeline[1]['type'] = 'mmengine.PackNothing'
    cfg.train_dataloader.dataset.pipeline = pipeline

    @TRANSFORMS.register_module(force=True)
    class PackNothing:
        def __call__(self, data):
            return dict(inputs=torch.zeros(3, 32, 32), data_samples=None)

    assert check(cfg, 'train', model=None).errors == []


def test_augmentation_of_batches_that_needs_a_training(drawn):
    cfg = config_of(drawn / 'coco')
    cfg.model.data_preprocessor.batch_augments = [dict(
        type='BatchSyncRandomResize', random_size_range=(64, 96), size_divisor=32, interval=1)]
    assert check(cfg, 'train', model=None).errors == []


def test_masks_that_the_model_does_not_predict(drawn):
    cfg = config_of(drawn / 'coco')
    for name in ('mask_head', 'mask_roi_extractor'):
        cfg.model.roi_head.pop(name)
    error, = check(cfg, 'val', model=None).errors
    assert error == "val_evaluator has metric='segm', and the model has no mask head. Use " \
        "metric='bbox'"


def test_no_whole_batch(drawn):
    cfg = config_of(drawn / 'coco')
    cfg.train_dataloader.update(batch_size=20, drop_last=True, batch_sampler=None,
                                sampler=dict(type='DefaultSampler', shuffle=True))
    error, = check(cfg, 'train').errors
    assert error.startswith('train_dataloader has no batch: 6 samples are fewer than batch_size')
    cfg.train_dataloader.sampler.type = 'InfiniteSampler'
    assert check(cfg, 'train').errors == []


def test_loader_keeps_its_order(drawn):
    cfg = config_of(drawn / 'coco')
    cfg.train_dataloader.update(batch_size=4, sampler=dict(type='DefaultSampler', shuffle=False),
                                batch_sampler=dict(type='AspectRatioBatchSampler'))
    init_default_scope('mmdet')
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    assert check(cfg, 'train', loaders=dict(train=lambda: loader)).errors == []
    assert [*loader.batch_sampler] == [[0, 1, 2, 3], [4, 5]]


def test_one_folder_of_masks_for_all_splits(ade20k):
    masks = ade20k / 'masks'
    masks.mkdir()
    for split in ('training', 'validation'):
        for path in (ade20k / 'annotations' / split).iterdir():
            path.rename(masks / path.name)
    cfg = config_of(ade20k)
    for split in ('train', 'val'):
        cfg[f'{split}_dataloader'].dataset.data_prefix.seg_map_path = 'masks'
    assert check(cfg, 'train', 'val').errors == []


def test_limit(drawn, monkeypatch):
    report = check(config_of(drawn / 'coco'), 'train', limit=2)
    assert report.errors == [] and report.notes[0].startswith('train_dataloader: 2 samples; ')
    monkeypatch.setattr('mmeffformer.datasets.check.LIMIT', 1)
    report = check(config_of(drawn / 'coco'), 'val', limit=2)
    assert 'the ground truth of 2 images is not evaluated here' in report.notes[-1]


def voc(root):
    """Write the drawn COCO data in the layout of Pascal VOC, with one broken file."""
    for split in ('train', 'val'):
        content = json.loads((root / f'annotations/instances_{split}.json').read_text())
        names = {item['id']: item['name'] for item in content['categories']}
        (root / 'VOC2007/Annotations').mkdir(parents=True, exist_ok=True)
        (root / 'VOC2007/JPEGImages').mkdir(exist_ok=True)
        ids = []
        for image in content['images']:
            name = f'{split}{image["id"]}'
            ids.append(name)
            (root / 'VOC2007/JPEGImages' / f'{name}.jpg').write_bytes(
                (root / split / image['file_name']).read_bytes())
            objects = ''.join(
                '<object><name>{}</name><difficult>0</difficult><bndbox><xmin>{}</xmin><ymin>{}'
                '</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>'.format(
                    names[item['category_id']], *(int(v) for v in (x + 1, y + 1, x + w, y + h)))
                for item in content['annotations'] if item['image_id'] == image['id']
                for x, y, w, h in [item['bbox']])
            (root / 'VOC2007/Annotations' / f'{name}.xml').write_text(
                f'<annotation><size><width>{image["width"]}</width><height>{image["height"]}'
                f'</height></size>{objects}</annotation>')
        (root / f'VOC2007/{split}.txt').write_text('\n'.join(ids))
    dataset = dict(
        type='VOCDataset', data_root=str(root), data_prefix=dict(sub_data_root='VOC2007/'),
        metainfo=dict(classes=[*names.values()]),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
                  dict(type='PackDetInputs')])
    cfg = config_of(root)
    cfg.merge_from_dict(dict(default_scope='mmdet'))
    for split in ('train', 'val'):
        cfg[f'{split}_dataloader'] = Config(dict(
            batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=dict(dataset, ann_file=f'VOC2007/{split}.txt', test_mode=split == 'val')))
    cfg.val_evaluator = dict(type='VOCMetric', metric='mAP', eval_mode='11points')
    return cfg


def test_voc(coco):
    cfg = voc(coco)
    assert check(cfg, 'train', 'val').errors == []
    path = coco / 'VOC2007/Annotations/train2.xml'
    path.write_text('<annotation><size>')
    (coco / 'VOC2007/JPEGImages/train4.jpg').unlink()
    broken_file, missing = check(cfg, 'train').errors
    assert broken_file.startswith('train_dataloader: VOCDataset cannot read 1 entries: ')
    assert str(path.name) in broken_file and 'ParseError' in broken_file
    assert 'train4.jpg' in missing


@pytest.mark.parametrize('wrap', [
    lambda data: dict(type='RepeatDataset', times=2, dataset=data),
    lambda data: dict(type='ClassBalancedDataset', oversample_thr=0.1, dataset=data),
    lambda data: dict(type='ConcatDataset', datasets=[data, data]),
    lambda data: dict(type='MultiImageMixDataset', dataset=dict(
        data, pipeline=[data['pipeline'][0], dict(type='LoadAnnotations', with_bbox=True)]),
        pipeline=[dict(type='Mosaic', img_scale=(96, 64)), dict(type='PackDetInputs')]),
], ids=['repeat', 'class-balanced', 'concat', 'mosaic'])
def test_wrapped_data_sets(coco, wrap):
    cfg = config_of(coco)
    data = cfg.train_dataloader.dataset.to_dict()
    cfg.train_dataloader.dataset = wrap(data)
    assert check(cfg, 'train').errors == []
    (coco / 'train/000000000001.jpg').unlink()
    assert 'LoadImageFromFile failed on' in check(cfg, 'train').errors[0]
