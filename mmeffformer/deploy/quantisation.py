"""Models in int8, by post-training quantisation of NNCF or of ONNX Runtime.

Weights are quantised per channel; the ranges of activations are measured on training images.
Convolutions and linear layers, which take most of the time, compute in int8. Norms, attention
between its linear layers, sampling, the decoding of boxes and nms stay in fp32.
"""
import logging
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import DATASETS
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset

from ..datasets import check_dataset
from ..utils.config import class_name, iter_dicts, test_pipeline_cfg
from .inputs import preprocess
from .runtimes import INPUT, require

# OpenVINO's operators that compute in int8.
QUANTISED = {'Convolution', 'GroupConvolution', 'ConvolutionBackpropData', 'MatMul'}
UNTYPED = {'Constant', 'Parameter', 'Result'}
COMPARED = 4  # training images that an int8 file is compared on, not calibrated on


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


def quantise_openvino(model: Any, images: Sequence[Tensor],
                      shape: Optional[Tuple[int, int]] = None) -> Any:
    """Return an fp32 model of OpenVINO in int8.

    Args:
        model: What OpenVINO reads of a file.
        images: Normalised float images (1, C, H, W) to calibrate on.
        shape: H, W in px to resize the images to; None keeps their sizes.

    Raises:
        ValueError: NNCF is not installed.
    """
    nncf = require('nncf', 'int8')
    nncf.set_log_level(logging.ERROR)
    others = {op.get_type_name() for op in model.get_ops()} - QUANTISED - UNTYPED
    # Products of two activations, those of attention, stay in fp32: after the softmax, most values
    # are below the steps of int8. NNCF cannot correct the bias of talking heads, whose weight is
    # the first factor.
    attention = [op.get_friendly_name() for op in model.get_ops() if op.get_type_name() == 'MatMul'
                 and op.input_value(1).get_node().get_type_name() != 'Constant']
    # Symmetric ranges, because int8 products need no correction for an offset then; weights in
    # 7 bits, because sums of two products of 8 bits overflow on CPUs without VNNI.
    return nncf.quantize(
        model, nncf.Dataset(images, lambda image: _resized(image, shape).numpy()),
        subset_size=len(images), preset=nncf.QuantizationPreset.PERFORMANCE,
        target_device=nncf.TargetDevice.CPU,
        ignored_scope=nncf.IgnoredScope(names=attention, types=sorted(others)),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            overflow_fix=nncf.OverflowFix.ENABLE))


def quantise_onnx(model: Any, images: Sequence[Tensor],
                  shape: Optional[Tuple[int, int]] = None) -> Any:
    """Return an fp32 model of ONNX in int8 for ONNX Runtime, see :func:`quantise_openvino`.

    Convolutions round their outputs as well, because ONNX Runtime has no kernel for them that
    takes int8 and returns fp32.
    """
    onnx = require('onnx', 'onnx')
    from onnxruntime import quantization
    from onnxruntime.transformers.fusion_gelu import FusionGelu
    from onnxruntime.transformers.onnx_model import OnnxModel

    class Reader(quantization.CalibrationDataReader):
        values = ({INPUT: _resized(image, shape).numpy()} for image in images)

        def get_next(self) -> Optional[dict]:
            return next(self.values, None)

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / 'model.onnx')
        whole = OnnxModel(onnx.shape_inference.infer_shapes(_simplified(model, path)))
        # Pairs of rounding and its inverse between the parts of GELU would keep ONNX Runtime from
        # computing it as one operator.
        FusionGelu(whole).apply()
        whole.topological_sort()
        weights = {each.name for each in whole.model.graph.initializer}
        attention = [node.name for node in whole.model.graph.node
                     if node.op_type == 'MatMul' and node.input[1] not in weights]
        whole.model.opset_import.append(onnx.helper.make_opsetid('com.microsoft', 1))
        quantization.quantize_static(
            whole.model, path, Reader(), op_types_to_quantize=['Conv', 'Gemm', 'MatMul'],
            nodes_to_exclude=attention, per_channel=True,
            # Weights in 7 bits: sums of two products of 8 bits overflow on CPUs without VNNI.
            reduce_range=True, activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options={'OpTypesToExcludeOutputQuantization': ['Gemm', 'MatMul']})
        return onnx.load(path)


def _simplified(model: Any, path: str) -> Any:
    """Return an ONNX model whose weights are constants, not results of operators."""
    onnxruntime = require('onnxruntime', 'onnx')
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath, options.log_severity_level = path, 3
    onnxruntime.InferenceSession(model.SerializeToString(), options,
                                 providers=['CPUExecutionProvider'])
    return require('onnx', 'onnx').load(path)


def _resized(image: Tensor, shape: Optional[Tuple[int, int]]) -> Tensor:
    if shape is None or tuple(image.shape[2:]) == tuple(shape):
        return image
    return F.interpolate(image, size=shape, mode='bilinear', antialias=True)
