"""Copies of parts, in all runtimes."""
import numpy as np
import pytest
import torch

from mmeffformer.latency.measuring import new_header
from mmeffformer.latency.parts import build_part, copies, open_part
from mmeffformer.latency.table import BLOCKS, Part


@pytest.mark.parametrize('runtime', ['pytorch', 'onnx', 'openvino'])
@pytest.mark.parametrize('part', [
    Part('MB4D', 1, (32, )), Part('MB3D', 3, (32, )), Part('embedding', 2, (16, 32)),
    Part('stem', 0, (16, ))], ids=str)
def test_copies_compute_what_a_network_computes(part, runtime, tmp_path):
    shape = (64, 96)
    count = copies(part, shape)
    torch.manual_seed(0)
    module, image = build_part(part, count, shape)
    weights = [p.data_ptr() for name, p in module.named_parameters() if name.endswith('weight')]
    assert len({*weights}) == len(weights) >= count == 12  # separate weights
    with torch.no_grad():
        expected = module(image)
    grid = dict(MB4D=(8, 12), MB3D=(2, 3), embedding=(4, 6), stem=(16, 24))[part.kind]
    assert expected.shape == (1, part.widths[-1], *grid)

    torch.manual_seed(0)
    call, found = open_part(part, new_header(runtime, shape), tmp_path)
    actual = call()
    assert found == count
    if runtime != 'pytorch':
        outputs = list(actual.values() if hasattr(actual, 'values') else actual)
        assert len(outputs) == (1 if part.kind in BLOCKS else count)
        assert len({array.tobytes() for array in map(np.array, outputs)}) == len(outputs)
        actual = torch.from_numpy(np.array(outputs[-1]))
        if part.kind not in BLOCKS:
            expected = expected.mean((2, 3), keepdim=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_copies_exceed_the_caches():
    assert copies(Part('MB4D', 3, (512, )), (224, 224)) == 8  # 8 MiB each
    assert copies(Part('MB4D', 0, (64, )), (224, 224)) == 12
    # 4,200 tokens: 565 MB of bias each.
    assert copies(Part('MB3D', 2, (64, )), (800, 1344)) == 2
