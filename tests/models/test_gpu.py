"""The block of three kernels for GPUs, with its own kernel interpreted on a CPU."""
from support.helpers import run_code

CODE = """
import torch
import torch.nn.functional as F
from mmeffformer import EfficientFormer
from mmeffformer.models import gpu, gpu_kernels


def distance(found, expected):
    return ((found.float() - expected).norm() / expected.norm()).item()


for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)):
    for shape in ((2, 5, 7, 12), (1, 1, 3, 8), (3, 2, 1, 24), (1, 1, 1, 8)):
        x, (scale, shift) = torch.randn(shape).to(dtype), torch.randn(2, shape[3])
        image = x.permute(0, 3, 1, 2).float()
        average = F.avg_pool2d(image, 3, 1, 1, count_include_pad=False)
        expected = (image + scale[:, None, None] * (average - image)).permute(0, 2, 3, 1)
        y, shifted = gpu_kernels.pool_and_shift(x, scale, shift)
        assert max(distance(y, expected), distance(shifted, expected + shift)) < tolerance

arch = dict(widths=(8, 16, 16, 24), depths=(2, 1, 2, 3), attention_blocks=(0, 0, 1, 2))
applies, pool_block, taken = gpu.applies, gpu.pool_block, []
gpu.pool_block, gpu.POOL_BLOCK = lambda *args: taken.append(1) or pool_block(*args), True
for dtype, tolerance, count in ((torch.float32, 1e-6, 0), (torch.float16, 2e-3, 5),
                                (torch.bfloat16, 2e-2, 5)):
    gpu.applies = applies
    model = EfficientFormer(arch, layer_scale_init_value=.5).eval().switch_to_deploy()
    x = torch.randn(2, 3, 65, 96).to(dtype)
    with torch.no_grad():
        expected = model(x.float())
        model.to(dtype, memory_format=torch.channels_last)
        # As on a GPU.
        gpu.applies = lambda x: x.permute(0, 2, 3, 1).is_contiguous()
        found = model(x.to(memory_format=torch.channels_last))
    assert max(map(distance, found, expected)) < tolerance and len(taken) == count
    taken.clear()
print('compared')
"""


def test_pool_block(monkeypatch):
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    assert 'compared' in run_code(CODE)
