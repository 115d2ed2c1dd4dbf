"""int8 files for OpenVINO, by NNCF's quantisation after training.

Weights are rounded channel by channel; the range that activations are rounded in is measured on
training images. Only what takes the time computes in int8: convolutions and matrix products.
Norms, softmax, the mixing of attention's heads, sampling, the decoding of boxes and nms stay fp32.
"""
import json
import logging
from copy import deepcopy
from pathlib import Path
from typing import Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset

from ..datasets import check_dataset
from ..utils.config import iter_dicts
from .runtimes import META, describe, openvino_core, require

# OpenVINO's operators that compute in int8.
QUANTISED = {'Convolution', 'GroupConvolution', 'ConvolutionBackpropData', 'MatMul'}
UNTYPED = {'Constant', 'Parameter', 'Result'}
COMPARED = 4  # training images that a file is compared on, and not calibrated on


def check_int8(to: str):
    """Raise a ValueError where no int8 file can be made, as of a package that is missing."""
    if to != 'openvino':
        raise ValueError(f'int8: made for openvino, not for {to}')
    require('openvino', 'openvino')
    require('nncf', 'int8')


class TrainingImages(Dataset):
    """Images of a config's training set as its model sees images in a test, (1, 3, H, W).

    They are read as the test pipeline does, without annotations and augmentation, then
    normalised and padded by the model's preprocessor.

    Args:
        cfg: A config of mmdet or mmseg, whose scope is the default one.
        preprocessor: The model's ``data_preprocessor``.

    Attributes:
        source: What data set it is.

    Raises:
        FileNotFoundError: The data set is not there; the message says what is missing.
        ValueError: The config has no training set.
    """

    def __init__(self, cfg: Config, preprocessor: nn.Module):
        check_dataset(cfg, splits=('train', ))
        leaves, (tested, *_) = (
            [deepcopy(part)
             for part in iter_dicts(cfg.get(f'{split}_dataloader', {}).get('dataset'))
             if 'pipeline' in part and not {'dataset', 'datasets'} & {*part}] or [None]
            for split in ('train', 'test'))
        if not all([*leaves, tested]):
            raise ValueError('int8: expected train_dataloader.dataset and test_dataloader.dataset '
                             'with a pipeline in the config, as files are calibrated on images '
                             'of the one, read as by the other')
        for leaf in leaves:
            leaf.pipeline = [step for step in tested.pipeline if 'Annotations' not in step.type]
        self.source = ', '.join(' '.join(str(leaf[key]) for key in ('type', 'data_root',
                                                                    'ann_file')
                                         if leaf.get(key)) for leaf in leaves)
        self.images = ConcatDataset([DATASETS.build(leaf) for leaf in leaves])
        self.preprocessor = preprocessor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.preprocessor(pseudo_collate([self.images[index]]), False)['inputs']

    def split(self, count: int) -> Tuple[Subset, Subset]:
        """Return ``count`` images to calibrate on, drawn at random but always the same ones,
        and some others to compare on.

        Raises:
            ValueError: There are fewer.
        """
        if not 1 <= count <= len(self) - COMPARED:
            raise ValueError(f'int8: {count} images to calibrate on, of a training set of '
                             f'{len(self)}: expected 1 to {len(self) - COMPARED}, as {COMPARED} '
                             'more are compared on')
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0)).tolist()
        return Subset(self, order[:count]), Subset(self, order[count:count + COMPARED])


def quantise(source: Path, target: Path, images: Sequence[Tensor],
             shape: Optional[Tuple[int, int]] = None):
    """Write the int8 file of an fp32 one for OpenVINO.

    Args:
        source: The .xml file of :func:`mmeffformer.deploy.export.export`.
        target: The .xml file to write, another.
        images: Normalised float images (1, 3, H, W) to calibrate on.
        shape: Resize them to this H, W; None keeps their sizes.

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
    # Talking heads, a weight times scores, stay as they are. NNCF takes the last axis for that
    # of channels, where here are pairs of tokens, and fails when it corrects the bias.
    mixing = [op.get_friendly_name() for op in model.get_ops() if op.get_type_name() == 'MatMul'
              and op.input_value(0).get_node().get_type_name() == 'Constant']
    # Symmetric ranges, as int8 products need no correction for an offset then.
    model_int8 = nncf.quantize(
        model, nncf.Dataset(images, values), subset_size=len(images),
        preset=nncf.QuantizationPreset.PERFORMANCE, target_device=nncf.TargetDevice.CPU,
        ignored_scope=nncf.IgnoredScope(names=mixing, types=sorted(others)))
    said = dict(json.loads(model.get_rt_info(META).astype(str)), precision='int8')
    for key, value in describe(**said).items():
        model_int8.set_rt_info(value, key)
    openvino.save_model(model_int8, str(target), compress_to_fp16=False)
