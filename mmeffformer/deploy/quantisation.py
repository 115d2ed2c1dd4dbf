"""Images to calibrate int8 files on, and int8 files for OpenVINO by NNCF's quantisation.

Weights are quantised per channel; the ranges of activations are measured on training images.
Convolutions and matrix products, which take most of the time, compute in int8. Norms, softmax,
the mixing of attention heads, sampling, the decoding of boxes and nms stay in fp32.
"""
import json
import logging
from copy import deepcopy
from pathlib import Path
from typing import Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import DATASETS
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset

from ..datasets import check_dataset
from ..utils.config import class_name, iter_dicts, test_pipeline_cfg
from .inputs import preprocess
from .runtimes import META, describe, openvino_core, require

# OpenVINO's operators that compute in int8.
QUANTISED = {'Convolution', 'GroupConvolution', 'ConvolutionBackpropData', 'MatMul'}
UNTYPED = {'Constant', 'Parameter', 'Result'}
COMPARED = 4  # training images that an int8 file is compared on, not calibrated on


def check_int8(to: str) -> None:
    """Raise a ValueError if the format has no int8 files, or a package is missing."""
    if to == 'executorch':
        require('torchao', to)
        return
    if to != 'openvino':
        raise ValueError(f'int8: expected openvino or executorch, got {to}')
    require('openvino', 'openvino')
    require('nncf', 'int8')


class TrainingImages(Dataset):
    """Images (1, 3, H, W) of a config's training set, preprocessed as in testing.

    The test pipeline reads them, without annotations; the model's preprocessor normalises and
    pads them.

    Args:
        cfg: A config of mmdet or mmseg, whose scope is the default scope.
        preprocessor: The model's ``data_preprocessor``.

    Attributes:
        source: Type and location of the dataset.

    Raises:
        FileNotFoundError: The dataset is missing; the message lists the missing files.
        ValueError: The config has no training set.
    """

    def __init__(self, cfg: Config, preprocessor: nn.Module):
        check_dataset(cfg, splits=('train', ))
        datasets = [deepcopy(part)
                    for part in iter_dicts(cfg.get('train_dataloader', {}).get('dataset'))
                    if 'pipeline' in part and not {'dataset', 'datasets'} & {*part}]
        if not datasets:
            raise ValueError('int8: expected train_dataloader.dataset with a pipeline in the '
                             'config, because files are calibrated on training images')
        for dataset in datasets:
            dataset.pipeline = test_pipeline_cfg(cfg)
        self.source = ', '.join(' '.join([class_name(dataset)] + [
            str(dataset[key]) for key in ('data_root', 'ann_file') if dataset.get(key)])
            for dataset in datasets)
        self.images = ConcatDataset([DATASETS.build(dataset) for dataset in datasets])
        self.preprocessor = preprocessor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return preprocess(self.preprocessor, self.images[index])

    def split(self, count: int) -> Tuple[Subset, Subset]:
        """Return ``count`` images to calibrate on and ``COMPARED`` others to compare on.

        Images are drawn at random with a fixed seed.

        Raises:
            ValueError: The training set is too small.
        """
        if not 1 <= count <= len(self) - COMPARED:
            raise ValueError(f'int8: {count} images to calibrate on, of a training set of '
                             f'{len(self)}: expected 1 to {len(self) - COMPARED}, as {COMPARED} '
                             'more are compared on')
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0)).tolist()
        return Subset(self, order[:count]), Subset(self, order[count:count + COMPARED])


def quantise(source: Path, target: Path, images: Sequence[Tensor],
             shape: Optional[Tuple[int, int]] = None) -> None:
    """Write the int8 file of an fp32 file for OpenVINO.

    Args:
        source: The .xml file of :func:`mmeffformer.deploy.export.export`.
        target: The .xml file to write, not ``source``.
        images: Normalised float images (1, 3, H, W) to calibrate on.
        shape: H, W in px to resize the images to; None keeps their sizes.

    Raises:
        ValueError: OpenVINO or NNCF is not installed.
    """
    openvino, nncf = require('openvino', 'openvino'), require('nncf', 'int8')
    nncf.set_log_level(logging.ERROR)

    def values(image: Tensor):
        if shape and tuple(image.shape[2:]) != tuple(shape):
            image = F.interpolate(image, size=shape, mode='bilinear', antialias=True)
        return image.numpy()

    model = openvino_core().read_model(str(source))
    others = {op.get_type_name() for op in model.get_ops()} - QUANTISED - UNTYPED
    # Talking heads, the product of a weight and scores, stay in fp32: NNCF takes the last axis
    # for the channels, which is that of tokens here, and fails when it corrects the bias.
    mixing = [op.get_friendly_name() for op in model.get_ops() if op.get_type_name() == 'MatMul'
              and op.input_value(0).get_node().get_type_name() == 'Constant']
    # Symmetric ranges, because int8 products need no correction for an offset then.
    model_int8 = nncf.quantize(
        model, nncf.Dataset(images, values), subset_size=len(images),
        preset=nncf.QuantizationPreset.PERFORMANCE, target_device=nncf.TargetDevice.CPU,
        ignored_scope=nncf.IgnoredScope(names=mixing, types=sorted(others)))
    meta = dict(json.loads(model.get_rt_info(META).astype(str)), precision='int8')
    for key, value in describe(**meta).items():
        model_int8.set_rt_info(value, key)
    openvino.save_model(model_int8, str(target), compress_to_fp16=False)
