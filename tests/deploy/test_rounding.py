"""16-bit files against PyTorch, on small models."""
import numpy as np
import pytest
from support.helpers import image

from mmeffformer import EfficientFormerV2
from mmeffformer.deploy.export import export
from mmeffformer.deploy.runtimes import SUFFIXES, ExportedFile, cpu_computes_in
from mmeffformer.latency.exported import open_file, openvino_model

HINTS = {'fp32': 'f32', 'fp16': 'f16', 'bf16': 'bf16'}


@pytest.mark.parametrize('to, precision', [
    ('onnx', 'fp16'), ('openvino', 'fp16'), ('openvino', 'bf16')])
def test_backbone_in_16_bits(to, precision, arch, randomize, tmp_path):
    model = randomize(EfficientFormerV2({**arch, 'widths': (8, 16, 64, 96)}, bias_grid=3)).eval()
    path, x = tmp_path / f'model{SUFFIXES[to]}', image(64, 96)
    compared = export(model, path, to, 'backbone', (64, 96), precision=precision, images=[x])
    assert [each.output for each in compared] == [f'feature{i}' for i in range(4)]
    exact = precision == 'bf16' and not cpu_computes_in('bf16')  # computed in fp32
    for each in compared:
        assert each.inputs == 1 and each.tolerance == dict(fp16=0.01, bf16=0.05)[precision]
        assert (each.error < 1e-4) is exact and each.matches, each
    file = tmp_path / 'model.bin' if to == 'openvino' else path
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert file.stat().st_size / weights == pytest.approx(4 if precision == 'bf16' else 2, rel=.2)
    opened = ExportedFile(path, to)
    assert opened.meta['precision'] == precision
    outputs = open_file(to, path, x, threads=1)()
    for actual, expected in zip(outputs if to == 'onnx' else outputs.values(), opened(x).values()):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
    if to == 'openvino':
        used = openvino_model(path, 1).get_property('INFERENCE_PRECISION_HINT').get_type_name()
        assert used == (HINTS[precision] if cpu_computes_in(precision) else 'f32')


def test_mask_rcnn_in_fp16(build, tmp_path):
    path = tmp_path / 'model.onnx'
    compared = export(build('maskrcnn'), path, 'onnx', 'model', (64, 96), precision='fp16')
    assert [each.output for each in compared] == ['detections', 'boxes', 'masks']
    assert all(0 < each.error < each.tolerance == 0.02 for each in compared), compared
