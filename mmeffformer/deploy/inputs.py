"""Inputs that exported files are compared on: pictures, read as in testing, and noise.

Shapes: C channels, H rows, W columns.
"""
from typing import List, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from ..datasets.shapes import draw
from ..models.backbone import STRIDES
from ..utils.config import iter_dicts, preprocessor_cfg, test_pipeline_cfg

Size = Tuple[int, int]

MIN_SIZE = STRIDES[-1]


def preprocess(preprocessor: nn.Module, sample: dict) -> Tensor:
    """Return the input (1, C, H, W) that the model's preprocessor makes of a sample."""
    return preprocessor(pseudo_collate([sample]), False)['inputs']


def read_pictures(cfg: Config, preprocessor: nn.Module, files: Sequence[str]) -> List[Tensor]:
    """Return image files as inputs (1, C, H, W), read by the config's test pipeline.

    Args:
        cfg: A config of mmdet or mmseg, whose scope is the default scope.
        preprocessor: The model's ``data_preprocessor``.
        files: Image files.

    Raises:
        ValueError: The config has no test pipeline, or the pipeline cannot read a file.
    """
    pipeline = Compose(test_pipeline_cfg(cfg)) if files else None
    pictures = []
    for file in files:
        try:
            sample = pipeline(dict(img_path=str(file), img_id=0, seg_fields=[]))
            pictures.append(preprocess(preprocessor, sample))
        except Exception as error:  # pipelines may have transforms of any library
            raise ValueError(f'{file} cannot be read by the test pipeline of the config: '
                             f'{type(error).__name__}: {error}') from error
    return pictures


def draw_pictures(preprocessor: nn.Module, channels: int, shape: Size) -> List[Tensor]:
    """Return two drawn images as inputs (1, C, H, W); channels beyond three repeat the first."""
    pictures = (draw(np.random.default_rng(seed), shape)[0] for seed in (1, 2))
    return [preprocess(preprocessor, dict(
        inputs=torch.from_numpy(picture.transpose(2, 0, 1)[np.arange(channels) % 3]),
        data_samples=BaseDataElement())) for picture in pictures]


def describe_input(cfg: Config, channels: int) -> dict:
    """Return metadata of a file's input: order of its channels, mean and std of each."""
    preprocessor = preprocessor_cfg(cfg) or {}
    steps = [step for key in ('test_dataloader', 'test_pipeline') for step in
             iter_dicts(cfg.get(key))]
    # tifffile keeps the order of the file; all other loaders return BGR.
    as_read = channels != 3 or any(step.get('imdecode_backend') == 'tifffile' for step in steps)
    turned = channels == 3 and any(preprocessor.get(key) for key in ('bgr_to_rgb', 'rgb_to_bgr'))
    order = ('as read', 'as read, reversed') if as_read else ('BGR', 'RGB')
    values = {}
    for key, default in (('mean', 0), ('std', 1)):
        given = [float(value) for value in preprocessor.get(key) or [default]]
        values[key] = given * channels if len(given) == 1 else given
    return dict(channels=order[turned], **values)


def resized_inputs(channels: int, shape: Size, dynamic: bool, pictures: Sequence[Tensor],
                   divisor: int = 1, noise: bool = False) -> List[Tensor]:
    """Return pictures, and noise, at ``shape``; for a dynamic file at five sizes, whose sides
    are multiples of ``divisor``."""
    height, width = shape
    sizes = [shape]
    if dynamic:  # turned, odd and smallest sizes
        sizes += [(width, height + 1),
                  (max(height * 2 // 3, MIN_SIZE) | 1, max(width * 3 // 4, MIN_SIZE) | 1),
                  (MIN_SIZE + 1, 3 * MIN_SIZE - 1), (MIN_SIZE, MIN_SIZE)]
        sizes = [tuple(-(-side // divisor) * divisor for side in size) for size in sizes]
    generator, inputs = torch.Generator().manual_seed(0), []
    for size in sizes:
        if noise:
            inputs.append(torch.randn(1, channels, *size, generator=generator))
        inputs += [F.interpolate(picture, size=size, mode='bilinear', antialias=True)
                   for picture in pictures]
    return inputs
