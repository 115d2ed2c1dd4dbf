"""Compiled blocks."""
from copy import deepcopy

import pytest
import torch
from mmengine.utils import digit_version
from support.helpers import image
from torch import nn

from mmeffformer import EfficientFormer
from mmeffformer.utils.modules import compile_blocks


@pytest.mark.skipif(digit_version(torch.__version__) < digit_version('2.5'),
                    reason='compiles every block')
def test_blocks_of_a_class_and_shape_are_compiled_once(randomize):
    arch = dict(widths=(8, 8, 8, 8), depths=(2, 1, 1, 3), attention_blocks=(0, 0, 0, 2))
    plain = randomize(EfficientFormer(arch, out_indices=(0, 3))).double()
    network = deepcopy(plain)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compile_blocks(network, backend='aot_eager', dynamic=False)
    for each in (plain.train(), network.train()):
        sum(out.square().mean() for out in each(image(64, 96, 2).double())).backward()
    # Of seven blocks: one of each stage, and one on tokens.
    assert counters['stats']['unique_graphs'] == 5 and not counters['graph_break']
    for (name, eager), compiled in zip(plain.named_parameters(), network.parameters()):
        torch.testing.assert_close(compiled.grad, eager.grad, rtol=1e-6, atol=1e-9, msg=name)
    for (name, eager), compiled in zip(plain.named_buffers(), network.buffers()):
        torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=0, msg=name)


def test_a_network_without_lists_is_compiled_as_a_whole():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    compile_blocks(network, backend='eager')
    assert [name for name, module in network.named_modules() if module._compiled_call_impl] == ['']
