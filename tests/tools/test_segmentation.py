"""The command lines on a config of mmseg, run as a user runs them."""
import math
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.fileio import load
from mmseg.apis import inference_model, init_model
from support.helpers import ROOT, scalars
from support.helpers import run_tool as run

from mmeffformer.datasets import SEG_CLASSES, write_ade20k

CONFIG = 'tests/data/semfpn_tiny.py'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Train the tiny segmentor for two steps and return (data root, work dir)."""
    folder = tmp_path_factory.mktemp('segmentation')
    data, work_dir = folder / 'shapes_ade20k', folder / 'work'
    write_ade20k(data, train=8, val=3, size=(64, 96), progress=False)
    run('tools/train.py', CONFIG, '--data-root', data, '--work-dir', work_dir)
    return data, work_dir


def test_training_saves_and_evaluates(trained):
    _, work_dir = trained
    *steps, last = scalars(work_dir)
    assert [step['iter'] for step in steps] == [1, 2]
    # An untrained segmentor gives every class about the same probability.
    assert steps[0]['loss'] == pytest.approx(math.log(len(SEG_CLASSES)), abs=.3)
    assert np.isfinite(steps[1]['loss'])
    assert last['step'] == 2
    assert 0 < last['mIoU'] <= last['mAcc'] < 100 and 0 < last['aAcc'] < 100
    checkpoint = torch.load(work_dir / 'iter_2.pth', map_location='cpu', weights_only=False)
    assert tuple(checkpoint['meta']['dataset_meta']['classes']) == SEG_CLASSES
    assert {'backbone.stages.3.blocks.1.layer_scale1', 'neck.lateral_convs.3.conv.weight',
            'decode_head.conv_seg.weight'} < {*checkpoint['state_dict']}


def test_evaluation_repeats_what_training_measured(trained, tmp_path):
    data, work_dir = trained
    printed = run('tools/test.py', CONFIG, work_dir / 'iter_2.pth', '--data-root', data,
                  '--work-dir', tmp_path / 'test', '--out', tmp_path / 'found.pkl',
                  '--show-dir', tmp_path / 'shown')
    measured = float(re.search(r'\bmIoU: (\S+)', printed)[1])
    assert measured == pytest.approx(scalars(work_dir)[-1]['mIoU'], abs=.02)
    assert measured == pytest.approx(mean_iou(data, load(tmp_path / 'found.pkl')), abs=.02)
    # The ground truth and the prediction, side by side.
    shown = [cv2.imread(str(path)) for path in (tmp_path / 'shown').rglob('*.png')]
    assert [picture.shape for picture in shown] == [(64, 2 * 96, 3)] * 3


def test_test_time_augmentation_is_the_mean_with_the_mirror_image(trained, tmp_path):
    data, work_dir = trained
    run('tools/test.py', CONFIG, work_dir / 'iter_2.pth', '--data-root', data, '--work-dir',
        tmp_path, '--tta', '--out', tmp_path / 'found.pkl')
    model = init_model(str(ROOT / CONFIG), str(work_dir / 'iter_2.pth'), device='cpu')
    for sample in load(tmp_path / 'found.pkl'):
        image = cv2.imread(sample['img_path'])
        plain, mirrored = (inference_model(model, np.ascontiguousarray(view)).seg_logits.data
                           for view in (image, image[:, ::-1]))
        expected = plain.softmax(0) + mirrored.softmax(0).flip(-1)
        labels = sample['pred_sem_seg']['data'][0]
        assert (labels == expected.argmax(0)).float().mean() > 0.999  # equal except for rounding
        assert (labels != plain.argmax(0)).any()


def mean_iou(data: Path, found: list) -> float:
    """Mean IoU of dumped predictions in percent, counted from the label maps themselves."""
    assert len(found) == 3
    truth = np.stack([cv2.imread(str(data / 'annotations/validation' / Path(
        item['img_path']).with_suffix('.png').name), cv2.IMREAD_UNCHANGED) for item in found])
    labels = np.stack([np.asarray(item['pred_sem_seg']['data'])[0] for item in found]) + 1
    known = truth > 0  # 0 stands for no class
    union = [((truth == i) | (labels == i))[known].sum() for i in range(1, 8)]
    shared = [((truth == i) & (labels == i))[known].sum() for i in range(1, 8)]
    return 100 * np.mean([a / b for a, b in zip(shared, union) if b])


def test_drawing_on_a_folder(trained, tmp_path):
    data, work_dir = trained
    sources = sorted((data / 'images/validation').iterdir())
    printed = run('tools/infer.py', CONFIG, work_dir / 'iter_2.pth', data / 'images/validation',
                  '--out-dir', tmp_path / 'out', '--page', tmp_path / 'page.png')
    assert '3 drawn files' in printed
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [
        path.name for path in sources]
    for source in sources:
        drawn, image = cv2.imread(str(tmp_path / 'out' / source.name)), cv2.imread(str(source))
        assert drawn.shape == image.shape == (64, 96, 3)
        # Every pixel has a class, whose colour covers most of the image's.
        assert cv2.absdiff(drawn, image).mean() > 20
    assert cv2.imread(str(tmp_path / 'page.png')).std() > 10


def test_learning_curve(trained, tmp_path):
    picture = tmp_path / 'curve.png'
    run('tools/analysis_tools/learning_curve.py', trained[1], '--out', picture)
    curve = cv2.imread(str(picture)).astype(int)
    width = curve.shape[1]
    assert width > 1000
    # Lines and markers are coloured, all else is grey: losses to the left, metrics to the right.
    coloured = np.ptp(curve, axis=2) > 60
    assert coloured[:, :width // 2].sum() > 50 and coloured[:, width // 2:].sum() > 50
