"""BatchNorm over the batches of several processes on CPUs; torch's is for GPUs only.

As there, the statistics are those of all processes' batches joined, however different their
sizes, and so are the gradients through them.

Shapes: B batch, C channels, H rows, W columns.
"""
from typing import Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(_BatchNorm):
    """torch's nn.SyncBatchNorm, on CPUs. It is made of one by :func:`synchronised`.

    No subclass of that: DistributedDataParallel refuses all of them on CPUs.
    """

    process_group: Optional[dist.ProcessGroup] = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, ...) to the same shape. In training all processes have to call it."""
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        self._check_input_dim(x)
        mean, var, count = _statistics(x.detach(), self.process_group)
        if count == 1:
            raise ValueError('one value per channel in all processes together has no variance '
                             f'to train with: input of shape {tuple(x.shape)}')
        if self.track_running_stats and count:
            self._track(mean, var * (count / (count - 1)))
        weight = x.new_ones(x.shape[1]) if self.weight is None else self.weight
        bias = torch.zeros_like(weight) if self.bias is None else self.bias
        return _Normalise.apply(x, weight, bias, mean.to(weight.dtype), var.to(weight.dtype),
                                self.eps, count, self.process_group)

    def _check_input_dim(self, x: Tensor):
        if x.dim() < 2 or not x.shape[1]:
            raise ValueError(f'input of shape {tuple(x.shape)}: expected (batch, channels, ...)')

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor):
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:  # the average over all batches
            momentum = 1 / self.num_batches_tracked.item()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), momentum)


def _statistics(x: Tensor, group: Optional[dist.ProcessGroup]) -> Tuple[Tensor, Tensor, int]:
    """Return mean and biased variance (C,) in float64, and count, of all processes' values."""
    channels = x.shape[1]
    dims = [0, *range(2, x.dim())]
    count = x.numel() // channels
    mine = x.new_zeros(2, channels, dtype=torch.float64)
    if count:
        # Half precision would not do for sums.
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        var, mean = torch.var_mean(wide, dims, correction=0)
        mine[0], mine[1] = mean, var
    mine = torch.cat([mine.flatten(), mine.new_tensor([count])])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group)
    every = torch.stack(every)
    counts = every[:, -1:]
    total = int(counts.sum())
    means, variances = every[:, :-1].view(len(every), 2, channels).unbind(1)
    # A process without a value has no say; where none has one, anything does.
    share = counts / max(total, 1)
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean) ** 2)).sum(0)
    return mean, var, total


class _Normalise(torch.autograd.Function):
    """BatchNorm with given statistics, and the gradient as through the statistics.

    With n = (x - mean) / std of all processes' values: d/dx is what it would be were the
    statistics constants, less weight / std * (average of dy + n * average of dy * n).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, eps, count, group):
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.count, ctx.group = eps, count, group
        if not x.numel():  # which torch's kernels do not take
            return torch.empty_like(x)
        return F.batch_norm(x, mean, var, weight, bias, False, 0., eps)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, mean, var = ctx.saved_tensors
        # The sums over this process's values of dy * n and of dy are the weight's and the
        # bias's gradients, which DistributedDataParallel averages as any other.
        if x.numel():
            grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, mean, var, mean, var, False, ctx.eps, [True, True, True])
        else:
            grad_x, (grad_weight, grad_bias) = grad, torch.zeros_like(weight).repeat(2, 1)
        if ctx.needs_input_grad[0]:
            sums = torch.stack([grad_weight, grad_bias])
            dist.all_reduce(sums, group=ctx.group)
            inverse = (var + ctx.eps).rsqrt()
            slope, shift = sums / max(ctx.count, 1) * (weight * inverse)
            shape = (1, -1) + (1,) * (x.dim() - 2)
            slope, shift, centre = (v.view(shape) for v in (slope * inverse, shift, mean))
            grad_x = (grad_x - shift - (x - centre) * slope).to(x.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def synchronised(module: nn.Module) -> nn.Module:
    """Turn every nn.SyncBatchNorm in ``module``, whatever built it, into one for CPUs.

    In place: it stays the same object, with its weights, hooks and mode.
    """
    for norm in module.modules():
        if isinstance(norm, nn.SyncBatchNorm):
            norm.__class__ = SyncBatchNorm
    return module
