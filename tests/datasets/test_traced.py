"""Errors while samples are made name the file and the transform."""
import pickle

import pytest
import torch
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, init_default_scope
from support import broken
from support.broken import config_of
from torch.utils.data import DataLoader

from mmeffformer.datasets import SampleError, TracedDataset
from mmeffformer.utils.errors import TrainingStopped


@pytest.fixture
def coco(drawn, tmp_path):
    return broken.copied(drawn / 'coco', tmp_path / 'coco')


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    return broken.write_both(tmp_path_factory.mktemp('drawn'))


def build(cfg, **wrap):
    init_default_scope(cfg.default_scope)
    dataset = cfg.train_dataloader.dataset
    return TracedDataset(DATASETS.build(dict(wrap, dataset=dataset) if wrap else dataset))


def first_image(dataset):
    return dataset.get_data_info(0)['img_path']


def empty(path):
    open(path, 'wb').close()


@pytest.mark.parametrize('wrap', [{}, dict(type='RepeatDataset', times=2)])
def test_file_and_transform_are_named(coco, wrap):
    dataset = build(config_of(coco), **wrap)
    path = first_image(dataset)
    empty(path)
    with pytest.raises(TrainingStopped, match=rf'^LoadImageFromFile failed on {path} \(image '):
        dataset[0]


def test_failing_transform_is_named_with_its_line(coco):
    def fail(data):
        raise ValueError('of the transform')

    dataset = build(config_of(coco))
    dataset.pipeline.transforms.append(fail)
    with pytest.raises(SampleError, match=r'^function failed on .*: ValueError: of the transform '
                       r'\(.*test_traced.py, line \d+\)$'):
        dataset[0]


def test_missing_package_is_named(coco):
    def fail(data):
        import a_package_that_is_not_there  # noqa: F401

    dataset = build(config_of(coco))
    dataset.pipeline.transforms.insert(0, fail)
    with pytest.raises(SampleError, match="failed on .*: package 'a_package_that_is_not_there' "
                       'is not installed'):
        dataset[0]


def test_mixed_images(coco):
    cfg = config_of(coco)
    mosaic = dict(type='MultiImageMixDataset', pipeline=[
        dict(type='Mosaic', img_scale=(64, 64), pad_val=114.0)])
    cfg.train_dataloader.dataset.pipeline = cfg.train_dataloader.dataset.pipeline[:2]
    dataset = build(cfg, **mosaic)
    assert dataset[0]['img'].shape == (128, 128, 3)
    for index in range(len(dataset)):
        empty(dataset.dataset.dataset.get_data_info(index)['img_path'])
    with pytest.raises(SampleError, match='^LoadImageFromFile failed on '):
        dataset[0]


def test_attributes_of_the_data_set(coco):
    dataset = build(config_of(coco))
    assert dataset.metainfo['classes'] == dataset.dataset.metainfo['classes']
    assert len(dataset) == len(dataset.dataset) == sum(1 for _ in dataset)
    dataset.max_refetch = 77
    assert dataset.dataset.max_refetch == 77
    with pytest.raises(AttributeError, match='nothing'):
        _ = dataset.nothing
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    assert len(pickle.loads(pickle.dumps(dataset))) == len(dataset)


def test_pipeline_set_later_is_traced(coco):
    dataset = build(config_of(coco))
    dataset.pipeline = Compose(dataset.pipeline.transforms[:1])  # as hooks do
    assert 'gt_bboxes' not in dataset[0]
    empty(first_image(dataset))
    with pytest.raises(SampleError, match='^LoadImageFromFile failed on '):
        dataset[0]


def test_same_samples(coco):
    cfg = config_of(coco)
    traced, plain = build(cfg), DATASETS.build(cfg.train_dataloader.dataset)
    for index in range(len(plain)):
        samples = []
        for dataset in plain, TracedDataset(traced):
            torch.manual_seed(index)
            broken.np.random.seed(index)
            samples.append(dataset[index])
        assert torch.equal(samples[0]['inputs'], samples[1]['inputs'])
        assert samples[0]['data_samples'].metainfo == samples[1]['data_samples'].metainfo


def test_message_from_a_worker(coco):
    dataset = build(config_of(coco))
    path = first_image(dataset)
    empty(path)
    loader = DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=pseudo_collate)
    with pytest.raises(SampleError) as info:
        list(loader)
    assert str(info.value).startswith(f'LoadImageFromFile failed on {path} (image ')
