"""Steps that graphs share."""
import pytest
import torch
from support.helpers import image
from torch import nn

from mmeffformer.deploy.tracing import AdaptivePooling


@pytest.mark.parametrize('size', [1, 2, (3, 5), (None, 6), 9])
def test_adaptive_pooling(size):
    x, pool = image(7, 10, dtype=torch.float64), nn.AdaptiveAvgPool2d(size)
    with AdaptivePooling():
        pooled = pool(x)
    torch.testing.assert_close(pooled, pool(x), rtol=0, atol=1e-12)
