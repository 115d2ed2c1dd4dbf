"""Deformable convolution and attention of ``mmcv.ops`` against loops."""
import math

import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import (
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
    MultiScaleDeformableAttention,
    deform_conv2d,
    modulated_deform_conv2d,
)
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
from support.operators import (
    assert_half_precision,
    assert_same,
    assert_same_with_grads,
    rand,
    stand_ins_only,
)


def sample_zero_padded(image, y, x):
    """Bilinear sample of (C, H, W), 0 outside, differentiable by the tensors ``y`` and ``x``."""
    height, width = image.shape[1:]
    y0, x0 = math.floor(y.item()), math.floor(x.item())
    result = image.new_zeros(len(image))
    for yi, xi in ((y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1)):
        if 0 <= yi < height and 0 <= xi < width:
            result = result + (1 - (y - yi).abs()) * (1 - (x - xi).abs()) * image[:, yi, xi]
    return result


def reference_deform_conv(x, offset, mask, weight, bias, stride, padding, dilation, groups,
                          deform_groups):
    kernel = weight.shape[2:]
    points, part = kernel[0] * kernel[1], x.shape[1] // deform_groups
    result = []
    for image, shift, modulation in zip(x, offset, mask):
        for i in range(offset.shape[2]):
            for j in range(offset.shape[3]):
                columns = []
                for g in range(deform_groups):
                    for k in range(points):
                        dy, dx = shift[2 * (g * points + k):][:2, i, j]
                        y = i * stride[0] - padding[0] + k // kernel[1] * dilation[0] + dy
                        x_ = j * stride[1] - padding[1] + k % kernel[1] * dilation[1] + dx
                        value = sample_zero_padded(image[g * part:(g + 1) * part], y, x_)
                        columns.append(value * modulation[g * points + k, i, j])
                # Order (deform group, point, channel) to (channel, point).
                column = torch.stack(columns).view(deform_groups, points, part)
                column = column.transpose(1, 2).reshape(groups, -1)
                filters = weight.reshape(groups, weight.shape[0] // groups, -1)
                result.append(torch.einsum('gck,gk->gc', filters, column).flatten() + bias)
    return torch.stack(result).view(len(x), *offset.shape[2:], -1).permute(0, 3, 1, 2)


#       kernel, stride, padding, dilation, groups, deform_groups
DEFORMED = [
    ((3, 3), (1, 1), (1, 1), (1, 1), 1, 1),
    ((3, 2), (2, 1), (1, 2), (1, 2), 1, 2),
    ((2, 3), (1, 2), (0, 1), (2, 1), 2, 1),
    ((1, 1), (1, 1), (0, 0), (1, 1), 2, 2),
    ((3, 3), (2, 2), (1, 1), (1, 1), 2, 4),
]


def deformed(kernel, stride, padding, dilation, groups, deform_groups):
    """Input, offset, mask, weight and bias; offsets reach over the image's borders."""
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip((5, 4), kernel, stride, padding, dilation)]
    points = deform_groups * kernel[0] * kernel[1]
    return (rand(2, 4, 5, 4), rand(2, 2 * points, *size, seed=1, low=-2.5, high=2.5),
            rand(2, points, *size, seed=2, low=0), rand(6, 4 // groups, *kernel, seed=3),
            rand(6, seed=4))


def contiguous(*tensors):
    return tensors


def strided(*tensors):
    return [t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() == 4 else t
            for t in tensors]


@pytest.mark.parametrize('geometry, laid_out', [
    *((geometry, contiguous) for geometry in DEFORMED),
    pytest.param(DEFORMED[1], strided, marks=stand_ins_only)])  # compiled operators refuse it
def test_deform_conv(device, geometry, laid_out):
    x, offset, mask, weight, bias = deformed(*geometry)
    options = geometry[1:]
    for im2col_step in (32, 1):
        assert_same_with_grads(
            lambda *t, step=im2col_step: deform_conv2d(*laid_out(*t), *options, False, step),
            lambda x, offset, weight: reference_deform_conv(
                x, offset, torch.ones_like(mask), weight, 0, *options),
            [x, offset, weight], device)
    assert_same_with_grads(
        lambda *t: modulated_deform_conv2d(*laid_out(*t), *options),
        lambda *t: reference_deform_conv(*t, *options), [x, offset, mask, weight, bias], device)
    assert_same_with_grads(
        lambda *t: modulated_deform_conv2d(*laid_out(*t), None, *options),
        lambda *t: reference_deform_conv(*t, 0, *options), [x, offset, mask, weight], device)


def test_deform_conv_without_offsets_is_a_convolution(device):
    x = rand(2, 4, 6, 5).float().to(device)
    for kind in (DeformConv2dPack, ModulatedDeformConv2dPack):
        pack = kind(4, 6, 3, padding=1).to(device)
        want = F.conv2d(x, pack.weight, padding=1)
        if isinstance(pack, ModulatedDeformConv2d):
            want = want / 2 + pack.bias[:, None, None]
        assert_same(pack(x), want, 1e-5)
    # mmcv pads an input smaller than the kernel.
    small = DeformConv2d(4, 6, 3, padding=1).to(device)
    assert small(x[:, :, :2, :2], x.new_zeros(2, 18, 2, 2)).shape == (2, 6, 2, 2)


SHAPES = [(3, 4), (2, 5)]


def reference_ms_deform_attn(value, locations, weights):
    batch, _, heads, channels = value.shape
    starts = [0, 12]
    result = []
    for n in range(batch):
        for q in range(locations.shape[1]):
            for h in range(heads):
                total = 0
                for level, (height, width) in enumerate(SHAPES):
                    image = value[n, starts[level]:starts[level] + height * width, h]
                    image = image.t().reshape(channels, height, width)
                    for p in range(locations.shape[4]):
                        x, y = locations[n, q, h, level, p]
                        sample = sample_zero_padded(image, y * height - .5, x * width - .5)
                        total = total + weights[n, q, h, level, p] * sample
                result.append(total)
    return torch.stack(result).view(batch, locations.shape[1], heads * channels)


def test_ms_deform_attn(cuda_op_device):
    shapes = torch.tensor(SHAPES, device=cuda_op_device)
    starts = torch.tensor([0, 12], device=cuda_op_device)
    inputs = [rand(2, 22, 2, 4), rand(2, 3, 2, 2, 3, 2, seed=1, low=-.2, high=1.2),
              rand(2, 3, 2, 2, 3, seed=2, low=0)]
    assert_same_with_grads(
        lambda value, locations, weights: MultiScaleDeformableAttnFunction.apply(
            value, shapes, starts, locations, weights, 64), reference_ms_deform_attn, inputs,
        cuda_op_device, 1e-8)


def test_ms_deform_attn_module(device):
    module = MultiScaleDeformableAttention(16, 2, 2, 3, batch_first=True).to(device)
    out = module(rand(2, 3, 16).float().to(device), value=rand(2, 22, 16).float().to(device),
                 reference_points=rand(2, 3, 2, 2, low=0).float().to(device),
                 spatial_shapes=torch.tensor(SHAPES, device=device),
                 level_start_index=torch.tensor([0, 12], device=device))
    assert out.shape == (2, 3, 16)
    out.sum().backward()
    assert module.value_proj.weight.grad.any()


@stand_ins_only
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(device, dtype):
    x, offset, mask, weight, bias = deformed(*DEFORMED[4])
    options, shapes = DEFORMED[4][1:], torch.tensor(SHAPES, device=device)
    for op, inputs in [
            (lambda *t: deform_conv2d(*t, *options), [x, offset, weight]),
            (lambda *t: modulated_deform_conv2d(*t, *options), [x, offset, mask, weight, bias]),
            (lambda *t: MultiScaleDeformableAttnFunction.apply(t[0], shapes, shapes, *t[1:], 64),
             [rand(2, 22, 2, 4), rand(2, 3, 2, 2, 3, 2, low=0), rand(2, 3, 2, 2, 3, low=0)])]:
        assert_half_precision(op, inputs, dtype, device)
