"""Sigmoid focal loss (Lin et al., "Focal Loss for Dense Object Detection", section 3).

Differences from mmcv's compiled operator: it also runs on the CPU, and a target outside the
classes has weight 1, where the compiled operator reads outside the weights.
"""
from typing import Tuple

import torch
from torch import Tensor

from .common import widen

_TINY = torch.finfo(torch.float32).tiny


def _terms(input: Tensor, target: Tensor, weight: Tensor,
           alpha: float) -> Tuple[Tensor, Tensor, Tensor]:
    """Return p_t, the mask of the positives and the factor of each loss, all (N, C)."""
    p = widen(input)[0].sigmoid()
    classes = input.size(1)
    positive = target[:, None] == torch.arange(classes, device=target.device)
    factor = torch.where(positive, p.new_tensor(alpha), p.new_tensor(1 - alpha))
    if weight.numel():
        known = (target >= 0) & (target < classes)
        of_target = weight.to(p.dtype)[target.clamp(0, classes - 1)]
        factor = factor * of_target.where(known, torch.ones_like(of_target))[:, None]
    return torch.where(positive, p, 1 - p), positive, factor


def sigmoid_focal_loss_forward(input: Tensor, target: Tensor, weight: Tensor, output: Tensor,
                               gamma: float, alpha: float) -> None:
    """Write the focal loss of every logit into ``output`` (N, C).

    Args:
        input: Logits (N, C).
        target: Classes (N,), int64; C is the background.
        weight: Factor of each sample by its target class, (C,), or empty for 1.
        output: (N, C) for the result.
        gamma: Focusing exponent.
        alpha: Factor of positives; negatives have 1 - alpha.
    """
    p_t, _, factor = _terms(input, target, weight, alpha)
    output.copy_(-factor * (1 - p_t)**gamma * p_t.clamp(min=_TINY).log())


def sigmoid_focal_loss_backward(input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor,
                                gamma: float, alpha: float) -> None:
    """Write the derivative of every loss by its logit into ``grad_input`` (N, C)."""
    p_t, positive, factor = _terms(input, target, weight, alpha)
    slope = (1 - p_t)**gamma * (gamma * p_t * p_t.clamp(min=_TINY).log() - (1 - p_t))
    grad_input.copy_(factor * torch.where(positive, slope, -slope))
