"""16-bit files against PyTorch, on small models."""
import pytest
import torch
from support.helpers import image

from mmeffformer import EfficientFormerV2
from mmeffformer.deploy.export import export
from mmeffformer.deploy.runtimes import SUFFIXES, ExportedFile, cpu_computes_in
from mmeffformer.latency.exported import open_file, openvino_model


def weights_bytes(model):
    return sum(value.numel() for value in model.parameters()) * 4


@pytest.mark.parametrize('to, precision, size', [
    ('onnx', 'fp16', 0.5), ('openvino', 'fp16', 0.5), ('openvino', 'bf16', 1)])
def test_backbone_in_16_bits(to, precision, size, arch, randomize, tmp_path):
    model = randomize(EfficientFormerV2({**arch, 'widths': (8, 16, 64, 96)}, bias_grid=3)).eval()
    path, x = tmp_path / f'model{SUFFIXES[to]}', image(64, 96)
    compared = export(model, path, to, 'backbone', (64, 96), dynamic=True, precision=precision)
    assert [each.output for each in compared] == [f'feature{i}' for i in range(4)]
    exact = to == 'openvino' and precision == 'bf16' and not cpu_computes_in('bf16')
    for each in compared:
        assert each.inputs == 5 and each.tolerance == dict(fp16=0.01, bf16=0.05)[precision]
        assert (each.error < 1e-5) is exact and each.matches, each
    file = tmp_path / 'model.bin' if to == 'openvino' else path
    assert file.stat().st_size == pytest.approx(size * weights_bytes(model), rel=0.25)
    assert ExportedFile(path, to).meta['precision'] == precision
    outputs = open_file(to, path, x, threads=1)()
    with torch.no_grad():
        expected = model(x)
    for actual, value in zip([*getattr(outputs, 'values', lambda: outputs)()], expected):
        actual = torch.from_numpy(actual)
        assert (actual - value).norm() < 0.05 * value.norm()
    if to == 'openvino':
        assert computes(path, precision)


def test_mask_rcnn_in_fp16(build, tmp_path):
    """Boxes, their nms, and the sampling of regions stay in fp32."""
    path = tmp_path / 'model.onnx'
    compared = export(build('maskrcnn'), path, 'onnx', 'model', (64, 96), precision='fp16')
    assert [each.output for each in compared] == ['detections', 'boxes', 'masks']
    print(*compared)
