"""Configs of tiny whole models, as files."""
from pathlib import Path

from mmengine.config import Config

from .detectors import NARROW
from .helpers import ROOT

ARCH = dict(widths=(8, 16, 16, 24), depths=(1, 1, 2, 3), attention_blocks=(0, 0, 1, 2))
SEGMENTOR = str(ROOT / 'tests/data/semfpn_tiny.py')
DETECTIONS = 20


def write_detector(folder: Path) -> str:
    """Write the config of a tiny Mask R-CNN, which reads images at 64 x 96 px, to a folder."""
    cfg = Config.fromfile(ROOT / 'configs/demo/maskrcnn_effformer_l1_shapes.py')
    cfg.merge_from_dict({**NARROW, 'model.neck.in_channels': list(ARCH['widths']),
                         'model.test_cfg.rpn.max_per_img': 100,
                         'model.test_cfg.rcnn.max_per_img': DETECTIONS})
    cfg.model.backbone.update(arch=ARCH, bias_grid=3)
    for step in cfg.test_dataloader.dataset.pipeline:
        if step['type'] == 'Resize':
            step['scale'] = (96, 64)
    path = folder / 'maskrcnn_tiny.py'
    cfg.dump(path)
    return str(path)
