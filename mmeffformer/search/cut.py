"""Weights of a network cut out of the supernet's: the kept channels keep theirs.

Shapes: C channels of a stage, H hidden channels of a block's MLP.
"""
from fnmatch import fnmatchcase
from typing import Callable, Dict, Iterable, List, Sequence, Tuple

import torch
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn

from ..models import EfficientFormer
from .subnetwork import Subnetwork
from .supernet import SuperEfficientFormer

# What the axes of a network's tensors count: C the stage's channels, P those of the stage before,
# S those between the stem's convolutions, H the hidden ones of a block's MLP. Axes named '-' or
# not at all are never cut. The first pattern that a name matches counts.
AXES = {
    'stem.0.*': 'S',
    'stem.1.conv.weight': 'CS',
    'stem.1.*': 'C',
    'stages.?.downsample.conv.weight': 'CP',
    'stages.?.downsample.*': 'C',
    '*.layer_scale?': 'C',
    '*.norm?.*': 'C',
    '*.token_mixer.qkv.weight': '-C',
    '*.token_mixer.qkv.bias': '-',
    '*.token_mixer.proj.*': 'C',
    '*.token_mixer.bias.table': '-',
    '*.mlp.expand.weight': 'HC',
    '*.mlp.expand.conv.weight': 'HC',
    '*.mlp.expand.*': 'H',
    '*.mlp.project.weight': 'CH',
    '*.mlp.project.conv.weight': 'CH',
    '*.mlp.project.*': 'C',
    'out_norms.?.*': 'C',
}

Ranking = Dict[str, Tensor]  # by place, its channels, the most important first


def places(supernet: SuperEfficientFormer) -> Dict[str, List[nn.Module]]:
    """Return the modules whose outputs' channels may be cut, by place, one of several a place.

    Places are 'stem' (between its convolutions), 'stage.I' (all blocks of it add to the same
    channels), and 'hidden.I.J.KIND'.
    """
    found = {'stem': [supernet.stem[0]]}
    for i, stage in enumerate(supernet.stages):
        found[f'stage.{i}'] = [supernet.stem if i == 0 else stage.downsample, *stage.blocks]
        for j, path in enumerate(stage.blocks):
            for kind, block in path.branches.items():
                act = block.mlp.act if kind == 'MB3D' else block.mlp.expand
                found[f'hidden.{i}.{j}.{kind}'] = [act]
    return found


def rank(supernet: SuperEfficientFormer, losses: Iterable[Callable[[], Tensor]]) -> Ranking:
    """Rank the channels of every place by how much the losses would change without them.

    To first order that is |sum over pixels of activation * gradient|, here summed over images and
    over the modules of a place (Molchanov et al., Importance Estimation for Neural Network
    Pruning, 2019). All branches are mixed, so that all are ranked.

    Args:
        losses: Each computes a loss of a batch through the supernet.
    """
    sums = {place: torch.zeros(_channels(supernet, place), dtype=torch.double)
            for place in places(supernet)}

    def watch(place: str, out: Tensor):
        values = out.detach()  # a hook that held ``out`` would keep it for ever

        def add(gradient: Tensor):
            product = (values * gradient).double()
            product = product.flatten(2).sum(2) if product.dim() == 4 else product.sum(1)
            sums[place] += product.abs().sum(0).cpu()

        out.register_hook(add)

    frozen = [p for p in supernet.parameters() if not p.requires_grad]
    supernet.requires_grad_(True)  # as what is frozen is cut as well
    hooks = [module.register_forward_hook(lambda module, args, out, place=place: watch(place, out))
             for place, modules in places(supernet).items() for module in modules]
    try:
        with supernet.mixing(), torch.enable_grad():
            for loss in losses:
                loss().backward()
                supernet.zero_grad(set_to_none=True)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in frozen:
            parameter.requires_grad_(False)
    return {place: values.argsort(descending=True, stable=True)
            for place, values in sums.items()}


def _channels(supernet: SuperEfficientFormer, place: str) -> int:
    kind, _, rest = place.partition('.')
    width = supernet.arch.widths[int(rest[0]) if rest else 0]
    return {'stem': width // 2, 'stage': width, 'hidden': 4 * width}[kind]


def kept_channels(network: Subnetwork, ranking: Ranking) -> List[Tensor]:
    """Return which channels of each of the supernet's stages a network keeps, in their order."""
    return [_kept(ranking[f'stage.{i}'], width) for i, width in enumerate(network.widths)]


def _kept(ranked: Tensor, number: int) -> Tensor:
    return ranked[:number].sort().values


@torch.no_grad()
def cut(supernet: SuperEfficientFormer, network: Subnetwork, ranking: Ranking
        ) -> EfficientFormer:
    """Return a network of the supernet with its weights, the least important channels cut away.

    The supernet stays as it is.

    Args:
        ranking: Of :func:`rank`.
    """
    kept, arch = kept_channels(network, ranking), network.arch
    made = EfficientFormer(arch, **{**supernet.options, 'init_cfg': None})
    paths = [[(j, kind) for k, j, kind in network.blocks() if k == i] for i in range(len(kept))]
    source, state = supernet.state_dict(), {}
    for key in made.state_dict():
        parts = key.split('.')
        stage = int(parts[1]) if parts[0] != 'stem' else 0
        channels = dict(C=kept[stage], P=kept[stage - 1],
                        S=_kept(ranking['stem'], network.widths[0] // 2))
        if 'blocks' in parts:
            path, kind = paths[stage][int(parts[3])]
            parts[3:4] = [str(path), 'branches', kind]
            channels['H'] = _kept(ranking[f'hidden.{stage}.{path}.{kind}'], arch.hidden(stage)[0])
        axes = next(axes for pattern, axes in AXES.items() if fnmatchcase(key, pattern))
        value = source['.'.join(parts)]
        for axis, name in enumerate(axes[:value.dim()]):
            if name in channels:
                value = value.index_select(axis, channels[name].to(value.device))
        state[key] = value
    made.load_state_dict(state)
    return revert_sync_batchnorm(made).to(value.device)  # a search is one process


class Widened(nn.Module):
    """A cut backbone in the place of the whole one: channels that were cut are zero.

    Layers behind it which are linear in these channels, as a neck's first convolutions, compute
    what they would without their weights for them.

    Args:
        backbone: The cut one.
        kept: Which channels of each stage of the whole one it has.
        widths: Channels of each stage of the whole one.
    """

    def __init__(self, backbone: EfficientFormer, kept: Sequence[Tensor], widths: Sequence[int]):
        super().__init__()
        self.backbone = backbone
        self.kept = [kept[i] for i in backbone.out_indices]
        self.widths = [widths[i] for i in backbone.out_indices]

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        outs = []
        for out, kept, width in zip(self.backbone(x), self.kept, self.widths):
            if len(kept) < width:
                whole = out.new_zeros(len(out), width, *out.shape[2:]).to(
                    memory_format=torch.channels_last)
                whole[:, kept.to(out.device)] = out
                out = whole
            outs.append(out)
        return tuple(outs)
