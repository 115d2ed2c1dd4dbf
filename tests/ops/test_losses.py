"""The sigmoid focal loss of ``mmcv.ops`` against its formula."""
import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import sigmoid_focal_loss
from support.operators import (
    assert_half_precision,
    assert_same,
    assert_same_with_grads,
    leaf,
    rand,
    stand_ins_only,
)


@pytest.mark.parametrize('gamma, alpha, weighted, reduction', [
    (2., .25, False, 'mean'), (1.5, .6, False, 'sum'), (0., .5, False, 'none'),
    (2., .25, True, 'none'), (1.5, .6, True, 'mean'), (0., .5, True, 'sum')])
def test_sigmoid_focal_loss(cuda_op_device, gamma, alpha, weighted, reduction):
    # Class 4 is the background, for which the weights of classes have no entry.
    target = torch.tensor([0, 3, 1, 2, 2] if weighted else [0, 3, 4, 2, 2])
    weight = rand(4, seed=5, low=.5, high=2) if weighted else None

    def loss(x):
        return sigmoid_focal_loss(x, target.to(x.device), gamma, alpha,
                                  weight.to(x.device) if weighted else None, reduction).view(-1)

    def reference(x):
        hot = F.one_hot(target, 5)[:, :4].double()
        bce = F.binary_cross_entropy_with_logits(x, hot, reduction='none')
        miss = (x.sigmoid() - hot).abs()
        result = bce * miss**gamma * (alpha * hot + (1 - alpha) * (1 - hot))
        if weighted:
            result = result * weight[target][:, None]
        return {'none': result, 'sum': result.sum(), 'mean': result.sum() / 5}[reduction].view(-1)

    assert_same_with_grads(loss, reference, [rand(5, 4, low=-6, high=6)], cuda_op_device, 1e-6)


def test_sigmoid_focal_loss_of_extreme_logits(cuda_op_device):
    logits = leaf(torch.tensor([[300., -300], [-300, 300]]), cuda_op_device)
    target = torch.tensor([0, 0], device=cuda_op_device)
    loss = sigmoid_focal_loss(logits, target, 2., .25, None, 'sum')
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    # -log of the smallest normal float32, the largest loss there is
    assert_same(loss, torch.tensor(87.3365), 1e-4)


@stand_ins_only
def test_sigmoid_focal_loss_weighs_the_background_with_one(device):
    logits, weight = rand(2, 3).to(device), torch.full((3, ), 5., device=device)
    target = torch.tensor([3, 1], device=device)
    plain = sigmoid_focal_loss(logits, target, 2., .25, None, 'none')
    weighted = sigmoid_focal_loss(logits, target, 2., .25, weight, 'none')
    assert_same(weighted, plain * plain.new_tensor([[1], [5]]))


@stand_ins_only
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_sigmoid_focal_loss_of_half_precision(device, dtype):
    target = torch.tensor([0, 3, 1, 2, 2], device=device)
    assert_half_precision(lambda x: sigmoid_focal_loss(x, target, 2., .25, None, 'none'),
                          [rand(5, 4)], dtype, device)
