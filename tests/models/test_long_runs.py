"""A thousand images of changing sizes, in eval and in training: memory does not grow."""
import os
import subprocess
import sys

import pytest
import torch
from support.helpers import ROOT, image

from mmeffformer import EfficientFormer, EfficientFormerV2
from mmeffformer.models.attention import CACHED_GRIDS, AttentionBias

# Attention in V1's first stage too, where the bias of one grid takes up to 2 MB.
V1 = dict(widths=(4, 4, 4, 8), depths=(1, 1, 1, 1), attention_blocks=(1, 0, 0, 1))
V2 = dict(widths=(4, 4, 4, 8), depths=(1, 1, 1, 1), attention_blocks=(0, 0, 1, 0))
CASES = [(EfficientFormer, V1), (EfficientFormerV2, V2)]
CODE = '''
import runpy, mmeffformer
watch = runpy.run_path('tools/dev/long_run.py')['watch']
model = mmeffformer.{}({}, out_norm_cfg=None)
for mode in ('eval', 'training'):
    watched = watch(model, mode, 1000, (33, 64))
    print('watched', watched.iterations[-1], watched.growth_mb, watched.cached_grids)
'''


@pytest.mark.slow
@pytest.mark.parametrize('kind, arch', CASES)
def test_memory_does_not_grow(kind, arch):
    # In a process of its own, where oneDNN keeps what it compiled for few sizes, not for 1024.
    done = subprocess.run(
        [sys.executable, '-c', CODE.format(kind.__name__, arch)], cwd=ROOT, text=True, timeout=600,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, 'ONEDNN_PRIMITIVE_CACHE_CAPACITY': '64', 'MALLOC_ARENA_MAX': '1'})
    assert done.returncode == 0, done.stdout[-3000:]
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith('watched')]
    assert [int(iterations) for iterations, *_ in found] == [1000, 1000]
    for _, growth_mb, _ in found:
        assert abs(float(growth_mb)) < 4, done.stdout  # of the last 800; noise is the bias of V1
    assert [int(cached) for *_, cached in found] == [CACHED_GRIDS, 0]


def kept(model) -> dict:
    """Return the sizes of all containers that the modules of a model hold."""
    return {f'{name}.{key}': len(value) for name, module in model.named_modules()
            for key, value in vars(module).items() if isinstance(value, (dict, list, set))}


@pytest.mark.parametrize('kind, arch', CASES)
def test_a_model_keeps_no_more_after_many_sizes(kind, arch):
    model = kind(arch)
    before, buffers = kept(model), {name: b.shape for name, b in model.named_buffers()}
    biases = [module for module in model.modules() if isinstance(module, AttentionBias)]
    assert len(biases) == 2
    seen = set()
    for train in (False, True, False):
        model.train(train)
        for side in range(33, 200, 32):
            with torch.set_grad_enabled(train):
                outs = model(image(side, 33))
                if train:
                    sum(out.mean() for out in outs).backward()
            seen |= {grid for bias in biases for grid, *_ in bias._expanded}
            assert all(len(bias._expanded) <= CACHED_GRIDS for bias in biases)
        assert [len(bias._expanded) for bias in biases] == [0 if train else CACHED_GRIDS] * 2
    assert len(seen) > 2 * CACHED_GRIDS  # more than the cache holds
    # The biases' own are all that changed, and no buffer has taken another size.
    after = kept(model)
    assert {key for key in after if after[key] != before[key]} == {
        f'{name}._expanded' for name, module in model.named_modules() if module in biases}
    assert {name: b.shape for name, b in model.named_buffers()} == buffers
