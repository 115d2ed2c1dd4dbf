"""A page of training images with their annotations, and the check of a new config."""
from pathlib import Path
from typing import Dict, List

import numpy as np
from mmengine.registry import DATASETS, VISUALIZERS, init_default_scope
from mmengine.structures import BaseDataElement

from ...datasets import check_data
from ...utils import plots
from ...utils.console import progress_bar
from ..options import read_config


def draw_examples(config: Path, out: Path, count: int = 12) -> None:
    """Draw training samples and their annotations as the model gets them, to ``out`` (.png)."""
    cfg = read_config(str(config))
    init_default_scope(cfg.default_scope)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    visualizer = VISUALIZERS.build({**cfg.visualizer, 'vis_backends': None, 'alpha': .5})
    visualizer.dataset_meta = dataset.metainfo
    pictures = []
    for index in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int):
        item = dataset[int(index)]
        image = item['inputs'].permute(1, 2, 0).numpy()[..., ::-1]
        sample = item['data_samples']
        if cfg.default_scope == 'mmdet':
            _unwrap(sample.gt_instances)
        visualizer.add_datasample('', np.ascontiguousarray(image), sample, draw_pred=False)
        pictures.append(visualizer.get_image())
    plots.page(pictures, out)


def _unwrap(instances: BaseDataElement) -> None:
    """Replace boxes and masks by the tensors and arrays that the visualizer draws."""
    from mmdet.structures.mask import BitmapMasks, PolygonMasks
    instances.bboxes = getattr(instances.bboxes, 'tensor', instances.bboxes)
    if isinstance(instances.get('masks'), (BitmapMasks, PolygonMasks)):
        instances.masks = instances.masks.to_ndarray().astype(bool)


def check(config: Path) -> Dict[str, List[str]]:
    """Return the errors, warnings and notes of the check of the data of a config, by kind."""
    with progress_bar() as progress:
        report = check_data(read_config(str(config)), progress=progress)
    return dict(note=report.notes, warning=report.warnings, error=report.errors)
