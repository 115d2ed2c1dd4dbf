"""Specs of candidates, and the candidates that are built."""
import sys
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import coremltools
import onnx
import pytest
import torch
from support.helpers import assert_close
from torch import nn

from mmeffformer.deploy import coreml
from mmeffformer.latency import tensorrt
from mmeffformer.latency.building import build, count_macs, make, step
from mmeffformer.latency.candidates import Candidate, Setting, candidates
from mmeffformer.latency.exported import require_packages
from mmeffformer.models.attention import AttentionBias

TINY = Setting(shape=(64, 96))
DETECTOR = 'configs/detection/maskrcnn_effformer_l1.py'
TRAIN = Setting(shape=(64, 64), batch=2, train=True)


def names(*args):
    return list(map(str, candidates(*args)))


def test_a_size_of_its_own(tmp_path):
    candidate, = candidates('l1:nchw,64x96', setting=Setting((32, 32)))
    assert candidate.shape == (64, 96) and candidates(str(candidate)) == [candidate]
    found = build(candidate, Setting((32, 32)).for_candidate(candidate), tmp_path).call()
    assert found[0].shape[2:] == (16, 24)
    with pytest.raises(ValueError, match='both must be at least 32'):
        candidates('l1:16x96')


def test_a_spec_names_its_runtime_or_uses_all():
    assert names('l1', ['pytorch', 'onnx']) == ['l1', 'l1:onnx']
    assert names('l1:compile', ['pytorch', 'onnx']) == ['l1:compile']
    assert names('l3:nchw,legacy', ['pytorch', 'compile', 'onnx']) == [
        'l3:legacy,nchw', 'l3:legacy,nchw,compile']
    assert names('l3:legacy', ['onnx']) == ['l3:legacy,onnx']
    assert names('timm:resnet50:nchw', ['pytorch'], 'bf16') == ['timm:resnet50:nchw,bf16']
    assert names('s0:fp32', ['pytorch'], 'bf16') == ['s0']
    assert names('s0:int8', ['pytorch']) == ['s0:openvino,int8']
    mmdet = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
    assert names(f'{mmdet}:nchw,bf16') == [f'{mmdet}:nchw,bf16']
    assert names(DETECTOR, ['pytorch', 'onnx']) == [DETECTOR, f'{DETECTOR}:onnx']
    assert names(f'{DETECTOR}:plain', ['pytorch', 'onnx']) == [f'{DETECTOR}:plain']
    for name in ('l3:legacy,nchw,compile', 's0:openvino,int8', 'timm:resnet50:bf16'):
        assert names(name) == [name]


@pytest.mark.parametrize('spec, setting, message', [
    ('l9', TINY, "model 'l9' is unknown; choose from l1, l3, l7, s0, s1, s2, l, or write timm:"),
    ('resnet50', TINY, "model 'resnet50' is unknown"),
    ('timm:resnet5o', TINY, "no model 'resnet5o'; it has resnet50"),
    ('mmdet::none.py', TINY, 'config .*none.py. does not exist'),
    ('nonesuch::mask_rcnn/x.py:onnx', TINY, "the library 'nonesuch' is not installed"),
    ('configs/backbones/effformer_l1.py', TINY, 'expected one for mmdet or mmseg'),
    (f'{DETECTOR}:legacy', TINY, 'legacy: set it in the config'),
    (f'{DETECTOR}:fp16', TINY, 'fp16: for backbones, exported files and --device cuda only'),
    ('l1:tf32', TINY, 'tf32: for --device cuda only'),
    (f'{DETECTOR}:plain,onnx', TINY, 'plain: not with onnx'),
    (f'{DETECTOR}:cuda-graphs', TINY, 'cuda-graphs: for backbones only'),
    (f'{DETECTOR}:onnx', Setting(batch=2), 'not a batch of 2'),
    ('l1:plain', TINY, 'plain: for whole models only'),
    ('l1:', TINY, "option '' is unknown"),
    ('l1:fast', TINY, "option 'fast' is unknown; choose from legacy, unfused"),
    ('timm:resnet18:unfused', TINY, 'unfused: for models of this project only'),
    ('l1:nchw,onnx', TINY, 'nchw: not with onnx'),
    ('l1:with_cp', TINY, 'with_cp: for training only'),
    ('l1:unfused', TRAIN, 'in training always is unfused'),
    ('l1:onnx', TRAIN, 'for inference only'),
    ('l1:onnx', Setting(batch=2), 'not a batch of 2'),
    ('l1:onnx,bf16', TINY, 'onnx: in fp32, fp16, int8 only, not bf16'),
    ('timm:resnet18:openvino,int8', TINY, 'openvino in int8: for models of this project only'),
    ('l1:compile,int8', TINY, 'int8: with onnx, openvino or executorch'),
    ('l1:coreml,bf16', TINY, 'coreml: in fp16, fp32 only, not bf16'),
    ('l1:tensorrt', TINY, 'tensorrt: for --device cuda only'),
    ('l1:cuda-graphs', TINY, 'for --device cuda only'),
])
def test_invalid_specs(spec, setting, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        candidates(spec, setting=setting)


def test_what_a_candidate_needs(monkeypatch):
    with pytest.raises(ValueError, match='nchw concerns PyTorch, not onnx and openvino'):
        candidates('l1:nchw', ['onnx', 'openvino'])
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ValueError, match='timm:resnet50 needs the package timm'):
        candidates('timm:resnet50')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ValueError, match='finds no GPU'):
        Setting(device='cuda')


def test_runtimes_that_are_not_here(monkeypatch):
    monkeypatch.setattr(coreml, 'RUNS', False)
    with pytest.raises(ValueError, match='Core ML runs on macOS only. Export the file here'):
        candidates('l1:coreml,fp16')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ValueError, match='GPUs of NVIDIA only, and torch finds none'):
        require_packages('tensorrt')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setitem(sys.modules, 'tensorrt', None)
    with pytest.raises(ValueError, match='tensorrt needs the package tensorrt .*pip install'):
        candidates('l1:tensorrt,fp16', setting=Setting(batch=64, device='cuda'))
    monkeypatch.setitem(sys.modules, 'executorch', None)
    with pytest.raises(ValueError, match=r"needs the package executorch.*'\.\[executorch\]'"):
        candidates('l1:executorch')


class MLModel:
    """Stands in for coremltools' where Core ML does not run; the arguments are its own."""

    def __init__(self, path, compute_units):
        self.settings = Path(path).suffix, compute_units.name

    def predict(self, inputs):
        return dict(inputs, settings=self.settings)


@pytest.mark.parametrize('dtype, units', [('fp16', 'CPU_AND_NE'), ('fp32', 'CPU_ONLY')])
def test_core_ml_runs_on_the_unit_of_the_precision(dtype, units, monkeypatch, tmp_path):
    monkeypatch.setattr(coremltools.models, 'MLModel', MLModel)
    monkeypatch.setattr('mmeffformer.latency.building.export', exported := Mock())
    found = build(Candidate('l1', 'coreml', dtype), TINY, tmp_path).call()
    assert found['settings'] == ('.mlpackage', units) and found['image'].shape == (1, 3, 64, 96)
    assert exported.call_args.args[2] == 'coreml'
    assert exported.call_args.kwargs == dict(precision=dtype)


def test_tensorrt_reads_a_graph_of_the_batch_and_type(monkeypatch, tmp_path):
    monkeypatch.setattr('mmeffformer.latency.tensorrt.engine', lambda path, image: (
        lambda: (onnx.load(str(path)).graph, image)))
    graph, image = build(Candidate('l1', 'tensorrt', 'fp16'),
                         Setting(shape=(64, 64), batch=3), tmp_path).call()
    found = graph.input[0].type.tensor_type
    assert [each.dim_value for each in found.shape.dim] == [*image.shape] == [3, 3, 64, 64]
    types = {found.elem_type, *(each.type.tensor_type.elem_type for each in graph.output)}
    assert types == {onnx.TensorProto.FLOAT16}
    assert image.dtype == torch.float16 and graph.input[0].name == 'image'


class TensorRT(ModuleType):
    """Stands in for the package: an engine that doubles the image and records the calls."""

    class NetworkDefinitionCreationFlag(IntEnum):
        STRONGLY_TYPED = 1

    def __init__(self):
        super().__init__('tensorrt')
        self.addresses, self.network, made = {}, None, self

        class Context:
            def set_tensor_address(self, name, address):
                made.addresses[name] = address

            def execute_async_v3(self, stream):
                made.stream = stream

        class Engine:
            num_io_tensors = 2
            get_tensor_name = staticmethod(('image', 'output').__getitem__)
            get_tensor_shape = staticmethod(lambda name: (1, 6, 7, 8))
            create_execution_context = Context

        self.Logger = Mock(ERROR=1)
        self.Builder = Mock(return_value=Mock(create_network=self.create_network))
        self.OnnxParser = Mock()
        self.Runtime = Mock(return_value=Mock(deserialize_cuda_engine=lambda plan: Engine()))

    def create_network(self, flags):
        self.network = flags


def test_tensorrt_is_called_as_documented(monkeypatch):
    stub, stream = TensorRT(), Mock(cuda_stream=7)
    monkeypatch.setitem(sys.modules, 'tensorrt', stub)
    monkeypatch.setattr(torch.cuda, 'Stream', lambda: stream)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)
    monkeypatch.setattr(torch.Tensor, 'cuda', lambda tensor: tensor)
    empty = torch.empty
    monkeypatch.setattr(torch, 'empty', lambda size, dtype, device: empty(size, dtype=dtype))
    image = torch.ones(1, 3, 14, 16, dtype=torch.float16)
    outputs = tensorrt.engine(Path('model.onnx'), image)()
    assert [each.shape for each in outputs] == [(1, 6, 7, 8)] and outputs[0].dtype == image.dtype
    assert stub.addresses == dict(image=image.data_ptr(), output=outputs[0].data_ptr())
    assert stub.network == 2 and stub.stream == 7 and stream.synchronize.call_count == 1
    stub.OnnxParser.return_value.parse_from_file.return_value = False
    stub.OnnxParser.return_value.get_error.return_value.desc.return_value = 'no such operator'
    with pytest.raises(ValueError, match='TensorRT cannot read model.onnx: no such operator'):
        tensorrt.engine(Path('model.onnx'), image)


@pytest.mark.parametrize('values, message', [
    (dict(shape=(31, 64)), '31 x 64 px: both must be at least 32'),
    (dict(batch=0), 'batch 0: expected 1 or more'),
    (dict(threads=0), 'threads 0: expected 1 or more'),
])
def test_settings_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        Setting(**values)


@pytest.mark.parametrize('model', ['l1', 's0'])
def test_variants_give_the_same_features(model, tmp_path):
    expected = build(Candidate(model, variants=('unfused', 'nchw')), TINY, tmp_path)
    fused = build(Candidate(model), TINY, tmp_path)
    features = fused.call()
    assert_close(features, expected.call(), 1e-4)
    assert [tuple(f.shape[2:]) for f in features] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features)
    assert expected.call()[0].is_contiguous()
    assert not features[0].requires_grad
    assert fused.params == expected.params  # those of before fusing
    assert fused.macs == expected.macs == count_macs(model, (64, 96))
    # All four outputs live at the end.
    assert fused.peak_bytes > 4 * sum(f.numel() for f in features)


def test_legacy_and_bf16_change_the_computation(tmp_path):
    network, _ = make(Candidate('l1', variants=('legacy', )), (64, 96))
    assert {m.mode for m in network.modules() if isinstance(m, AttentionBias)} == {'legacy'}
    coarse = build(Candidate('l1', dtype='bf16'), TINY, tmp_path).call()
    fine = build(Candidate('l1'), TINY, tmp_path).call()
    for a, b in zip(coarse, fine):  # bf16 has 8 bits: steps of 1/256
        assert 1 / 2000 < (a - b).abs().max() / b.abs().max() < 1 / 10


@pytest.mark.parametrize('model, runtime', [('s0', 'onnx'), ('timm:resnet18', 'openvino')])
def test_exported_files_give_the_features_of_pytorch(model, runtime, tmp_path):
    expected = build(Candidate(model), TINY, tmp_path).call()
    built = build(Candidate(model, runtime), TINY, tmp_path)
    outputs = [torch.as_tensor(built.call()[i]) for i in range(len(expected))]
    assert_close(outputs, expected, 1e-4)
    assert built.peak_bytes is None


@pytest.mark.parametrize('model, channels', [
    ('timm:resnet18', [64, 64, 128, 256, 512]),
    ('timm:efficientformerv2_s0', [32, 48, 96, 176]),  # has one input size
    ('timm:vit_tiny_patch16_224', [192, 192, 192])])
def test_timm_networks_are_backbones(model, channels, tmp_path):
    built = build(Candidate(model), TINY, tmp_path)
    assert [f.shape[1] for f in built.call()] == channels and built.remark == ''


def test_a_network_of_another_size_fails(tmp_path):
    with pytest.raises(RuntimeError, match='size'):
        build(Candidate('timm:efficientformer_l1'), TINY, tmp_path)


def test_training_keeps_less_with_checkpoints(tmp_path):
    plain = build(Candidate('l1'), TRAIN, tmp_path)
    saving = build(Candidate('l1', variants=('with_cp', )), TRAIN, tmp_path)
    assert saving.kept_bytes < plain.kept_bytes / 2
    # The gradients, of all parameters, live at the end of a step.
    assert plain.peak_bytes > plain.kept_bytes + 4 * plain.params / 2
    assert plain.macs == saving.macs


def test_a_step_starts_from_gradients_in_the_memory_format_of_the_outputs():
    """The gradient of a mean has none: most of the backward in channels_last would copy maps."""
    network = nn.Conv2d(3, 4, 1).to(memory_format=torch.channels_last)
    image, gradients = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), []

    def forward():
        output = network(image)
        output.register_hook(gradients.append)
        return output

    step(network, forward)()
    assert gradients[0].is_contiguous(memory_format=torch.channels_last)
    assert_close([network.bias.grad], [forward().sum((0, 2, 3))])
