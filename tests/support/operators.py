"""Comparison of operators with references: loops in float64 that autograd can follow.

One reference so checks both the result of an operator and its gradients.
"""
import pytest
import torch

from mmeffformer import ops

COMPILED = ops.diagnose()[0] == 'compiled'
# mmcv's compiled operators differ, for example they have no half precision on the CPU.
stand_ins_only = pytest.mark.skipif(COMPILED, reason='mmcv has compiled operators')


def rand(*shape, seed=0, low=-1., high=1.):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low


def leaf(tensor, device='cpu'):
    return tensor.detach().clone().to(device).requires_grad_()


def assert_same(actual, expected, tol=1e-9):
    torch.testing.assert_close(actual.detach().double().cpu(), expected.detach().double().cpu(),
                               rtol=tol, atol=tol)


def assert_same_with_grads(op, reference, inputs, device, tol=1e-9):
    """Compare results, and gradients for a random cotangent, by all ``inputs``."""
    leaves, reference_leaves = [leaf(t, device) for t in inputs], [leaf(t) for t in inputs]
    actual, expected = op(*leaves), reference(*reference_leaves)
    assert_same(actual, expected, tol)
    cotangent = rand(*expected.shape, seed=99)
    grads = torch.autograd.grad(actual, leaves, cotangent.to(device))
    for grad, want in zip(grads, torch.autograd.grad(expected, reference_leaves, cotangent)):
        assert_same(grad, want, tol)
        assert want.abs().sum() > 0


def assert_half_precision(op, inputs, dtype, device):
    """Compare with float64: the operator returns the dtype of its inputs and is close."""
    half = [leaf(t.to(dtype), device) for t in inputs]
    full = [leaf(t.detach().double(), device) for t in half]  # the same, rounded numbers
    out, want = op(*half), op(*full)
    assert out.dtype == dtype
    assert_same(out, want, 3e-2)
    out.sum().backward()
    want.sum().backward()
    for a, b in zip(half, full):
        assert a.grad.dtype == dtype
        assert_same(a.grad, b.grad, 6e-2)
