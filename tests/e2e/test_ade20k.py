"""The ADE20K recipe on drawn images of ADE20K's sizes, with its 150 classes."""
import math

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS
from support.helpers import cache_published_l1, run_tool, scalars

from mmeffformer.apis.options import set_data_root
from mmeffformer.datasets import write_ade20k

CONFIG = 'configs/segmentation/semfpn_effformer_l1.py'


def dataset(repo_root, data, split):
    cfg = Config.fromfile(repo_root / CONFIG)
    set_data_root(cfg, str(data))
    init_default_scope('mmseg')
    return DATASETS.build(cfg[f'{split}_dataloader'].dataset)


# Size of an image, and its size in a test: 512 px for the short side, the long one rounded up.
@pytest.mark.parametrize('size, tested', [
    ((256, 256), (512, 512)), ((341, 256), (704, 512)), ((97, 140), (512, 768)),
    ((150, 100), (768, 512))])
def test_images_are_resized_and_labels_are_not(size, tested, repo_root, tmp_path):
    write_ade20k(tmp_path / 'ade', train=0, val=3, size=size, progress=False)
    images = dataset(repo_root, tmp_path / 'ade', 'val')
    assert len(images) == 3 and len(images.metainfo['classes']) == 150
    for image in images:
        sample = image['data_samples']
        assert tuple(image['inputs'].shape) == (3, *tested)
        assert sample.ori_shape == size
        drawn = cv2.imread(sample.seg_map_path, cv2.IMREAD_UNCHANGED).astype(int)
        # 0 (no class) becomes 255, and the first class 0.
        assert np.array_equal(sample.gt_sem_seg.data[0].numpy(),
                              np.where(drawn == 0, 255, drawn - 1))


def test_training_sees_crops_of_512(repo_root, tmp_path):
    write_ade20k(tmp_path / 'ade', train=4, val=0, size=(512, 683), progress=False)
    for image in dataset(repo_root, tmp_path / 'ade', 'train'):
        shape, labels = image['inputs'].shape, image['data_samples'].gt_sem_seg.data
        assert labels.shape[1:] == shape[1:]
        # A smaller image is padded when the batch is made.
        assert max(shape[1:]) <= 512
        assert {*labels.unique().tolist()} <= {*range(7), 255}


def test_recipe_from_published_weights_to_miou(repo_root, tmp_path):
    """The config and the name of its weights are the published ones; the images are drawn."""
    data, work_dir = tmp_path / 'ade', tmp_path / 'work'
    write_ade20k(data, train=2, val=1, size=(512, 683), progress=False)
    cache_published_l1(tmp_path)
    printed = run_tool(
        'tools/train.py', CONFIG, '--data-root', data, '--work-dir', work_dir, '--cfg-options',
        'train_cfg.max_iters=2', 'train_dataloader.batch_size=1',
        'default_hooks.logger.interval=1', 'randomness.seed=0', env={'TORCH_HOME': str(tmp_path)})
    assert 'layout transformers' in printed
    assert 'bias tables resampled from 7 x 7 to 16 x 16' in printed
    first, second, last = scalars(work_dir)
    # An untrained head gives 150 classes about the same probability. Padding, at most two thirds
    # of a crop, has a loss of 0.
    assert math.log(150) / 3 - .5 < first['decode.loss_ce'] < math.log(150) + .7
    assert math.isfinite(second['loss'])
    assert 0 <= last['mIoU'] <= last['mAcc'] <= 100 and 0 < last['aAcc'] <= 100
    assert (work_dir / 'iter_2.pth').is_file()
