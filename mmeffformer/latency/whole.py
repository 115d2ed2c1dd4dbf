"""Whole detectors and segmentors as candidates, from a config and with random weights."""
from copy import deepcopy
from pathlib import Path
from typing import Any, List, Optional, Tuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

from ..datasets.shapes import draw
from ..deploy.evaluation import ExportedModel
from ..deploy.export import input_channels, window_size, write_unchecked
from ..deploy.runtimes import SUFFIXES, ExportedFile
from ..engine.configs import read_config
from ..models.fuse import fuse
from ..models.precision import DTYPES as HALF_PRECISIONS
from ..models.precision import half_precision
from ..ops import torchvision_only
from ..utils.complexity import count_macs
from ..utils.config import find_scope, iter_dicts, model_cfg
from ..utils.registry import MODELS
from ..utils.stopwatch import REST, watch
from .building import Built, compiled, in_precision, set_tf32
from .candidates import Candidate, Setting
from .exported import FILES
from .timing import Call, kept_bytes, peak_bytes

# What a trained detector finds in a photograph of COCO, about.
BOXES, DETECTIONS = 300, 100  # above the score threshold, and of those after nms
OBJECTS = 10  # drawn in an image for training


def random_model(cfg: Config) -> nn.Module:
    """Return the model of a config with random weights, in eval mode; nothing is downloaded."""
    init_default_scope(find_scope(cfg))
    network = model_cfg(cfg)
    for part in iter_dicts(network):
        part.pop('pretrained', None)
    torch.manual_seed(0)
    return revert_sync_batchnorm(MODELS.build(network)).eval()


def make_samples(model: nn.Module, shape: Tuple[int, int], batch: int) -> List[Any]:
    """Return a data sample of mmdet or mmseg for each image of H, W ``shape``, not resized."""
    if hasattr(model, 'encode_decode'):
        from mmseg.structures import SegDataSample as DataSample
    else:
        from mmdet.structures import DetDataSample as DataSample
    meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape,
                scale_factor=(1., 1.))
    return [DataSample(metainfo=meta) for _ in range(batch)]


@torch.no_grad()
def set_score_threshold(model: nn.Module, image: Tensor) -> None:
    """Set the score threshold of a detector with random weights.

    Random scores are all alike, below or above the threshold of the config. The new threshold
    leaves ``BOXES`` before nms, and more as long as fewer than ``DETECTIONS`` remain after it.
    Models without a threshold, such as segmentors, stay as they are.

    Args:
        image: (1, C, H, W), normalised.
    """
    samples = make_samples(model, tuple(image.shape[2:]), 1)
    roi = getattr(model, 'roi_head', None)
    head = (roi or model).bbox_head if roi or hasattr(model, 'bbox_head') else None
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    cfg = (roi or head).test_cfg if head else None
    if not cfg or 'score_thr' not in cfg or not hasattr(head, 'predict_by_feat'):
        return
    scores: List[Tensor] = []
    original = head.predict_by_feat

    def record(*args, **kwargs):
        logits = kwargs['cls_scores'] if 'cls_scores' in kwargs else args[0]
        scores[:] = ([each.softmax(1)[:, :-1] for each in logits] if roi else
                     [each.sigmoid() for each in logits])
        return original(*args, **kwargs)

    head.predict_by_feat = record
    model.predict(image, samples)
    del head.predict_by_feat
    ranked, boxes = torch.cat([each.flatten() for each in scores]).sort(descending=True)[0], BOXES
    wanted = min(DETECTIONS, cfg.get('max_per_img', DETECTIONS))
    while boxes < 4 * len(ranked):
        cfg.score_thr = ranked[min(boxes, len(ranked)) - 1].item()
        if _count(model.predict(image, samples)) >= wanted:
            break
        boxes *= 4


def _count(found: List[Any]) -> int:
    return sum(len(sample.get('pred_instances', ())) for sample in found)


def _remark(found: List[Any]) -> str:
    count = _count(found)
    return f'{count} detections' if count else ''


def add_ground_truth(samples: List[Any], shape: Tuple[int, int], classes: int) -> None:
    """Give each data sample about ``OBJECTS`` drawn objects, or a map of them.

    Args:
        shape: H, W of the images in px.
        classes: Number of the model's classes.
    """
    rng = np.random.default_rng(0)
    for sample in samples:
        masks: List[np.ndarray] = []
        while len(masks) < OBJECTS:
            masks += [each.mask for each in draw(rng, shape)[1] if each.annotated]
        labels = torch.from_numpy(rng.integers(classes, size=len(masks)))
        if type(sample).__name__ == 'SegDataSample':
            classes_map = torch.zeros(1, *shape, dtype=torch.long)
            for mask, label in zip(masks, labels):
                classes_map[0, torch.from_numpy(mask)] = label
            sample.gt_sem_seg = PixelData(data=classes_map)
            continue
        from mmdet.structures.mask import BitmapMasks
        bitmaps = BitmapMasks(np.array(masks, np.uint8), *shape)
        sample.gt_instances = InstanceData(
            bboxes=bitmaps.get_bboxes(dst_type='hbox').tensor, labels=labels, masks=bitmaps)
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))


def build(candidate: Candidate, setting: Setting, folder: Path) -> Built:
    """Build a whole model with random weights, and run it once.

    Args:
        folder: Receives exported files; keep it as long as the candidate runs.

    Raises:
        Exception: Any error of the model, the exporter or the runtime.
    """
    torch.set_num_threads(setting.threads)
    cfg = read_config(candidate.model)
    if 'with_cp' in candidate.variants:
        cfg.model.backbone.with_cp = True
    model = random_model(cfg)
    params = sum(p.numel() for p in model.parameters())
    torch.manual_seed(0)
    image = torch.randn(setting.batch, input_channels(model), *setting.shape)
    samples = make_samples(model, setting.shape, setting.batch)
    if setting.train:
        classes = min((part['num_classes'] for part in iter_dicts(cfg.model)
                       if isinstance(part.get('num_classes'), int)), default=1)
        add_ground_truth(samples, setting.shape, classes)
        return _train(candidate, setting, model, image, samples)
    if candidate.runtime not in FILES:
        model, image = model.to(setting.device), image.to(setting.device)
    set_score_threshold(model, image[:1])
    macs = count_macs(model, lambda: model.predict(image[:1], samples[:1])).get('Global')
    if candidate.runtime in FILES:
        model = exported(model, candidate.runtime, candidate.dtype, setting.shape, folder,
                         setting.threads)
        call = _predicting(model, candidate, image, samples)
        return Built(call, params, macs, remark=_remark(call()))
    image = _prepare(model, candidate, setting, image)
    stopwatch = watch(model) if setting.device == 'cpu' else None
    call = _predicting(model, candidate, image, samples)
    if stopwatch:
        call = stopwatch.section(REST)(call)
    if setting.device == 'cuda':
        call = set_tf32(call, candidate.dtype)
    remark = _remark(call())
    return Built(call, params, macs, peak_bytes(call, setting.device), remark=remark,
                 stopwatch=stopwatch)


def _train(candidate: Candidate, setting: Setting, model: nn.Module, image: Tensor,
           samples: List[Any]) -> Built:
    """Return a step of training, forward and backward."""
    params = sum(p.numel() for p in model.parameters())
    image = _prepare(model.train(), candidate, setting, image)
    samples = [sample.to(setting.device) for sample in samples]
    forward = in_precision(lambda: model.parse_losses(model.loss(image, samples))[0], candidate,
                           setting)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        forward().backward()

    call = _plain(step, candidate)
    call()
    model.zero_grad(set_to_none=True)
    peak, kept = peak_bytes(call, setting.device), None
    if candidate.runtime == 'pytorch':
        kept = kept_bytes(_plain(forward, candidate), [*model.parameters(), *model.buffers()])
    return Built(call, params, None, peak, kept)


def _prepare(model: nn.Module, candidate: Candidate, setting: Setting, image: Tensor) -> Tensor:
    """Give the model its precision, its memory format and its device; return the image alike."""
    plain = 'plain' in candidate.variants
    if not (setting.train or plain or 'unfused' in candidate.variants):
        fuse(model)
    layout = (torch.contiguous_format if plain or 'nchw' in candidate.variants
              else torch.channels_last)
    model.to(setting.device, memory_format=layout)
    if candidate.dtype in HALF_PRECISIONS and not setting.train:
        half_precision(model, candidate.dtype)
    if candidate.runtime == 'compile':  # between the modules, Python lists of results remain
        for name in ('backbone', 'neck'):
            if getattr(model, name, None) is not None:
                setattr(model, name, compiled(getattr(model, name)))
    return image.to(setting.device, memory_format=layout)


def _predicting(model: nn.Module, candidate: Candidate, image: Tensor, samples: List[Any]) -> Call:
    """Return a call that predicts for the image."""

    @torch.no_grad()
    def call() -> List[Any]:
        return model.forward(image, samples, mode='predict')

    return _plain(call, candidate)


def _plain(call: Call, candidate: Candidate) -> Call:
    return torchvision_only()(call) if 'plain' in candidate.variants else call


def exported(model: nn.Module, to: str, dtype: str, shape: Tuple[int, int], folder: Path,
             threads: Optional[int] = None, dynamic: bool = False) -> ExportedModel:
    """Export a whole model into ``folder``, and return it as one that the file computes.

    The file is not compared with PyTorch: scores of random weights are so close to each other that
    rounding decides which detections are kept.

    Args:
        model: Not watched, and in eval mode.
        to: 'onnx' or 'openvino'.
        dtype: One of ``PRECISIONS[to]``.
        shape: H, W in px; a segmentor that slides windows takes their size instead.
        threads: Of the CPU; None leaves the number to the runtime.
        dynamic: Make a file for any size.
    """
    shape = window_size(model) or shape
    path = folder / f'{len([*folder.iterdir()])}{SUFFIXES[to]}'
    # Rounding changes no time, so noise is enough to calibrate on.
    calibration = [torch.randn(1, input_channels(model), *shape) for _ in range(2)]
    write_unchecked(deepcopy(model), path, to, 'model', shape, dynamic, dtype, calibration)
    return ExportedModel(model, ExportedFile(path, to, threads))
