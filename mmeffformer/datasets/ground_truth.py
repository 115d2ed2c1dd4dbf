"""The best figures that an evaluator can give: those of the ground truth as predictions."""
import contextlib
import copy
import io
import os.path as osp
import re
import tempfile
from collections import Counter
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
from mmcv.transforms import LoadAnnotations
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.registry import EVALUATOR, TRANSFORMS
from mmengine.structures import InstanceData, PixelData
from torch.utils.data import Dataset
from torchvision.ops import box_iou

from .traced import explain, leaves

FIGURE = re.compile(r'(AP[_@]?\d*|IoU|Acc|Dice|Fscore|PQ)$')
LIMIT = 1000  # images; a larger split is evaluated by tools/check_data.py only


def build_evaluator(cfg: Any, folder: str) -> Evaluator:
    """Build an evaluator as the Runner does, but with its files in ``folder``."""
    cfg = copy.deepcopy(cfg)
    for metric in metric_cfgs(cfg):
        for name in ('outfile_prefix', 'output_dir', 'out_file_path'):
            if metric.get(name):
                metric[name] = osp.join(folder, osp.basename(metric[name]))
    if isinstance(cfg, dict) and 'metrics' in cfg:
        return EVALUATOR.build({'type': 'Evaluator', **cfg})
    return Evaluator(cfg)


def metric_cfgs(cfg: Any) -> List[dict]:
    """Return the configs of all metrics of an evaluator."""
    if isinstance(cfg, (list, tuple)):
        return [metric for item in cfg for metric in metric_cfgs(item)]
    if isinstance(cfg, dict):
        return metric_cfgs(cfg['metrics']) if 'metrics' in cfg else [cfg]
    return []


def truth_samples(dataset: Dataset) -> Iterator[Any]:
    """Yield the data samples of a data set with their ground truth, without loading images.

    Where a data set does not know the sizes of its images, they are loaded.
    """
    for leaf in leaves(dataset):
        steps = leaf.pipeline.transforms
        load = next((copy.copy(step) for step in steps if isinstance(step, LoadAnnotations)), None)
        pack = next((step for step in steps if type(step).__name__.startswith('Pack')), None)
        infos = range(len(leaf))
        masks = any('mask' in item for index in infos
                    for item in leaf.get_data_info(index).get('instances') or ())
        for index in infos:
            info = leaf.get_data_info(index)
            instances, size = info.get('instances'), (info.get('height'), info.get('width'))
            if pack is None or instances is not None and None in size:
                yield leaf[index]['data_samples']
                continue
            if instances is not None:
                load = load or TRANSFORMS.build(dict(type='LoadAnnotations', with_bbox=True))
                load.with_mask, load.poly2mask = masks, True
                info.update(ori_shape=size, img_shape=size, scale_factor=(1., 1.))
            yield pack(load(info) if load else info)['data_samples']


def as_predictions(sample: Any, classes: int) -> Any:
    """Add the ground truth of a data sample to it as predictions, with scores of 1."""
    if 'gt_instances' in sample and 'bboxes' in sample.gt_instances:
        for name in ('gt_instances', 'ignored_instances'):
            if name in sample and 'bboxes' in (instances := getattr(sample, name)):
                boxes = getattr(instances.bboxes, 'tensor', instances.bboxes)
                instances.bboxes = torch.as_tensor(boxes)
        truth = sample.gt_instances
        found = InstanceData(bboxes=truth.bboxes, labels=truth.labels,
                             scores=torch.ones(len(truth)))
        if 'masks' in truth:
            found.masks = torch.from_numpy(truth.masks.to_ndarray().astype(bool))
        sample.pred_instances = found
    if 'gt_sem_seg' in sample:
        labels = sample.gt_sem_seg.data
        # A model predicts a class also where the label is to be ignored.
        sample.pred_sem_seg = PixelData(data=torch.where((labels >= 0) & (labels < classes),
                                                         labels, torch.zeros_like(labels)))
    return sample


Found = Tuple[List[str], List[str], List[str]]  # errors, warnings, notes


def check_best_figures(cfg: Any, dataset: Dataset, key: str) -> Found:
    """Evaluate the ground truth of a data set as predictions.

    Args:
        cfg: The evaluator's config.
        dataset: The data set, built.
        key: Name of the evaluator in the config, such as ``val_evaluator``.

    Returns:
        Errors, warnings and notes.
    """
    truth = Truth()
    with tempfile.TemporaryDirectory() as folder, _quietly():
        try:
            evaluator = build_evaluator(cfg, folder)
        except Exception as error:  # any that a metric may have
            return [explain(f'{key} cannot be built', error)], [], []
        try:
            metrics = truth.evaluate(evaluator, dataset)
        except Exception as error:
            # The ground truth cannot stand for all that a model predicts.
            if str(error).startswith("'pred_") or not all(
                    type(metric).__module__.startswith(('mmdet.', 'mmseg.'))
                    for metric in evaluator.metrics):
                return [], [], [explain(f'{key} is not checked: it needs other predictions than '
                                        'boxes, masks and label maps', error)]
            return [explain(f'{key} fails on the ground truth of the data set', error)], [], []
    if metrics is None:
        return [], [], [f'{key} is not checked: the data set has no boxes, masks or label maps']
    figures = {name: float(value) for name, value in metrics.items()
               if FIGURE.search(name) and np.isscalar(value)}
    real = {name: value for name, value in figures.items() if np.isfinite(value) and value >= 0}
    if not figures and any(metric.get('format_only') for metric in metric_cfgs(cfg)):
        return [], [], [f'{key} only writes files (format_only)']
    if not real and not any(len(boxes) for boxes, _ in truth.objects.values()):
        return [], [f'{key} gives no figure: the data set has no object'], []
    if not real:
        return [f'{key} gives no figure for the ground truth as predictions ({figures or metrics}'
                '): nothing in the data set can be evaluated'], [], []
    top = 100. if any(value > 1 for value in real.values()) else 1.
    low = [f'{name} {value:g}' for name, value in real.items() if value < top * 0.9995]
    text = f'{key}: the ground truth as predictions gives '
    if not low:
        return [], [], [text + ', '.join(f'{name} {value:g}' for name, value in real.items())]
    text += f'{", ".join(low[:2])} instead of {top:g}'
    wrong, legal = truth.reasons(evaluator)
    if legal and not wrong:
        return [], ['. '.join([f'{text}: the best that this evaluator can give', *legal])], []
    files = _different_files(cfg, dataset, key)
    return ['. '.join([text, *(wrong or ['No reason was found']), *files])], [], []


def _different_files(cfg: Any, dataset: Dataset, key: str) -> Iterator[str]:
    """Yield whether the annotation file of an evaluator is another one than the data set's."""
    named = sorted({str(metric['ann_file']) for metric in metric_cfgs(cfg)
                    if metric.get('ann_file')})
    own = sorted({str(leaf.ann_file) for leaf in leaves(dataset)
                  if getattr(leaf, 'ann_file', None)})
    if named and named != own:
        yield (f'{key}.ann_file is {", ".join(named)}; the ann_file of its data set is '
               f'{", ".join(own)}')


class Truth:
    """Ground truth that was evaluated, and the reasons for figures that are not the best."""

    def __init__(self):
        self.objects: Dict[Any, Tuple[torch.Tensor, torch.Tensor]] = {}  # image id: boxes, labels
        self.strange: Dict[int, int] = Counter()  # label outside the classes: label maps with it

    def evaluate(self, evaluator: Evaluator, dataset: Dataset) -> Optional[dict]:
        """Return the metrics of a data set's ground truth, or None without ground truth."""
        evaluator.dataset_meta = dataset.metainfo
        classes, count = len(dataset.metainfo.get('classes') or ()), 0
        for sample in truth_samples(dataset):
            sample = as_predictions(sample, classes)
            if 'pred_instances' in sample:
                found = sample.pred_instances
                self.objects[sample.get('img_id', count)] = found.bboxes, found.labels
            elif 'pred_sem_seg' in sample:
                self.strange.update(value for value in sample.gt_sem_seg.data.unique().tolist()
                                    if not 0 <= value < classes)
            else:
                return None
            evaluator.process(data_samples=[sample], data_batch=dict())
            count += 1
        # Evaluator.evaluate would wait for the other processes of a job, which do not check.
        return {'/'.join(filter(None, (metric.prefix, name))): value
                for metric in evaluator.metrics
                for name, value in metric.compute_metrics(metric.results).items()}

    def reasons(self, evaluator: Evaluator) -> Tuple[List[str], List[str]]:
        """Return reasons for a lower figure: those that are mistakes, and those that are legal."""
        wrong, legal = [], []
        for metric in evaluator.metrics:
            most = getattr(metric, 'proposal_nums', (100, ))[0]
            crowded = sum(len(boxes) > most for boxes, _ in self.objects.values())
            if crowded:
                legal.append(f'{crowded} of {len(self.objects)} images have more than {most} '
                             'objects, the most that it counts (proposal_nums)')
            if getattr(metric, '_coco_api', None) is not None:
                _compare_with_coco(metric, self.objects, wrong, legal)
            ignored = getattr(metric, 'ignore_index', None)
            wrong += [f'{number} label maps have {value}, neither a class nor ignore_index='
                      f'{ignored} of {type(metric).__name__}'
                      for value, number in self.strange.items() if value != ignored]
        double = sum(int((box_iou(boxes, boxes).triu(1) > 0.95).logical_and(
            labels[:, None] == labels).sum()) for boxes, labels in self.objects.values())
        return wrong, legal + ([f'{double} objects are drawn twice'] if double else [])


def _compare_with_coco(metric: Any, objects: Dict[Any, Any], wrong: List[str],
                       legal: List[str]) -> None:
    """Compare the objects of an evaluator's file with those of the data set."""
    api, reasons, first = metric._coco_api, Counter(), {}
    for image in api.get_img_ids():
        annotations = [item for item in api.load_anns(api.get_ann_ids(img_ids=[image]))
                       if item['category_id'] in metric.cat_ids and not item.get('iscrowd')]
        boxes = objects.get(image, [torch.zeros(0, 4)])[0]
        for item in annotations:
            x, y, width, height = item['bbox']
            box = torch.tensor([x, y, x + width, y + height], dtype=boxes.dtype)
            same = len(boxes) and bool(((boxes - box).abs() < 0.01).all(1).any())
            if image not in objects:
                reason = 'are of images that the data set does not have'
            elif not same:
                reason = ('are left out by the data set (box below 1 px, without area, outside '
                          'the image, or marked to be ignored)')
            elif item['id'] == 0:
                reason = 'have id 0, which pycocotools counts as never found: number from 1'
            else:
                continue
            reasons[reason] += 1
            first.setdefault(reason, f'annotation {item["id"]} of image {image}')
    known = {*api.get_img_ids()}
    strange = [image for image in objects if image not in known]
    if strange:
        wrong.append(f'its file lacks {len(strange)} images of the data set, such as {strange[0]}')
    for reason, count in reasons.items():
        found = f'{count} objects of its file {reason} ({first[reason]})'
        (legal if 'left out' in reason else wrong).append(found)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Context manager: drop what metrics log and print."""
    logger = MMLogger.get_current_instance()  # which logging.disable does not reach
    handlers, logger.handlers = logger.handlers, []
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.handlers = handlers
