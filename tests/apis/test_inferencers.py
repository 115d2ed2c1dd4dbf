"""The inferencers of mmdet and mmseg on this project's configs and checkpoints."""
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS


@pytest.fixture
def saved(repo_root, tmp_path):
    """A function that saves random weights for a config: its path, and that of the checkpoint."""
    def save(name, **meta):
        path = repo_root / 'configs' / name
        cfg = Config.fromfile(path)
        with MODELS.switch_scope_and_registry(cfg.default_scope) as registry:
            torch.manual_seed(0)
            model = registry.build(cfg.model)
        checkpoint = tmp_path / 'random.pth'
        torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=meta)), checkpoint)
        return str(path), str(checkpoint)
    return save


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(256, size=(60, 100, 3), dtype=np.uint8)


def test_det_inferencer(saved, image):
    from mmdet.apis import DetInferencer
    inferencer = DetInferencer(*saved('detection/maskrcnn_effformer_l1.py',
                                      classes=[f'class {i}' for i in range(80)]), device='cpu')
    inferencer.pipeline.transforms[1].scale = (160, 96)  # px, to be quick
    inferencer.model.roi_head.test_cfg.score_thr = 0.  # else an untrained model finds nothing
    found, = inferencer(image, no_save_vis=True)['predictions']
    assert len(found['bboxes']) == len(found['scores']) == len(found['masks']) == 100
    boxes = np.array(found['bboxes'])
    assert (boxes >= 0).all() and (boxes <= [100, 60, 100, 60]).all()
    assert found['masks'][0]['size'] == [60, 100]
    assert 0 <= min(found['labels']) and max(found['labels']) < 80


def test_mmseg_inferencer(saved, image):
    from mmseg.apis import MMSegInferencer
    inferencer = MMSegInferencer(*saved('segmentation/semfpn_effformer_l1.py',
                                        classes=[f'class {i}' for i in range(150)],
                                        palette=[[i, i, i] for i in range(150)]), device='cpu')
    inferencer.pipeline.transforms[1].scale = (160, 96)
    labels = inferencer(image, show=False)['predictions']
    assert labels.shape == (60, 100)
    assert 0 <= labels.min() and labels.max() < 150
