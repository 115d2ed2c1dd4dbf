"""Parameters and multiply-accumulates of a network, by part, at any input size."""
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Tuple

import torch
from mmengine.utils import digit_version
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Complexity:
    """Parameters and multiply-accumulates of one part of a network, for one image.

    Attributes:
        name: The part's module name, '' for the whole.
        params: Number of parameters.
        macs: Multiply-accumulates of convolutions and matrix products, the
            attention's products included; norms and activations are not counted.
    """

    name: str
    params: int
    macs: int


def complexity(model: nn.Module, shape: Tuple[int, int], depth: int = 1) -> List[Complexity]:
    """Return the parts of ``model`` in order, then the whole.

    Nothing is computed: the model is put into eval mode, moved to the meta
    device, which has shapes only, and left there. Pass a model built for this.

    Args:
        model: Takes an image (1, 3, H, W).
        shape: H and W in px.
        depth: How deep parts are nested: 1 for the direct children, 2 for
            grandchildren as well.

    Raises:
        ValueError: The model does not take images of this size.
    """
    if min(shape) < 1:
        raise ValueError(f'image of {shape[0]} x {shape[1]} px: expected a height and a width')
    model = model.to('meta')
    model.eval()  # returns nothing where a library's backbone overrides train()
    macs = count_macs(model, lambda: model(torch.empty(1, 3, *shape, device='meta')))
    root = type(model).__name__
    return [Complexity(name, sum(p.numel() for p in module.parameters()),
                       macs.get(f'{root}.{name}' if name else 'Global', 0))
            for name, module in [*_parts(model, depth), ('', model)]]


def count_macs(model: nn.Module, call: Callable[[], Any]) -> Dict[str, int]:
    """Return the multiply-accumulates of a call of ``model`` by module, 'Global' for all."""
    # torch before 2.4 counts for the modules of `mods` only.
    old = digit_version(torch.__version__) < digit_version('2.4')
    counter = FlopCounterMode(mods=model if old else None, display=False)
    with torch.no_grad(), counter:
        call()
    return {name: sum(by_operator.values()) // 2
            for name, by_operator in counter.get_flop_counts().items()}


def _parts(module: nn.Module, depth: int, prefix: str = '') -> Iterator[Tuple[str, nn.Module]]:
    """Yield the modules with parameters down to ``depth``; lists of modules do not count."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _parts(child, depth, f'{prefix}{name}.')
        elif next(child.parameters(), None) is not None:
            yield f'{prefix}{name}', child
            if depth > 1:
                yield from _parts(child, depth - 1, f'{prefix}{name}.')
