"""Comparisons of the paper's observations."""
from collections import defaultdict

import torch
from torch import nn

from mmeffformer.latency import observations


def test_compared_modules_give_outputs_of_one_shape():
    shapes, numbers = defaultdict(set), defaultdict(set)
    for trial in observations.trials((64, 64)):
        with torch.no_grad():
            output = trial.module(torch.randn(1, *trial.shape))
        shapes[trial.group].add(tuple(tuple(each.shape) for each in output)
                                if isinstance(output, tuple) else tuple(output.shape))
        numbers[trial.observation].add(trial.name)
        assert not trial.module.training
        folded = not any(isinstance(module, nn.BatchNorm2d) for module in trial.module.modules())
        assert folded != trial.torch_only
    assert all(len(each) == 1 for each in shapes.values()), shapes
    assert {key: len(each) for key, each in numbers.items()} == {1: 4, 2: 3, 3: 4, 4: 5}


def test_observations_compare_with_the_first_of_a_group():
    entries = [dict(observation=4, group='g', name=name, runtime=runtime, macs=None,
                    samples_ms=samples) for name, runtime, samples in
               (('none', 'onnx', [1., 2., 4.]), ('ReLU', 'onnx', [2., 4., 8.]),
                ('none', 'pytorch', [4., 4., 4.]))]
    columns, rows = observations.table(dict(observations=entries))
    assert [row[columns.index('×')] for row in rows] == ['1.00', '2.00']
    assert rows[1][columns.index('onnx, ms')] == '4.00'
    assert rows[1][columns.index('pytorch, ms')] == '–'
    assert rows[0][columns.index('pytorch, ms')] == '4.00'
