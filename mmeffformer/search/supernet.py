"""The supernet of EfficientFormer's latency-driven slimming (paper, section 4.2).

Every block is a MetaPath, a choice among MB4D, the identity I and, in the last stages, MB3D.
In training all are mixed, with weights drawn for each batch around learnt importances
(Gumbel-softmax), so that every sub-network is trained:

    X[i+1] = sum over n of softmax((a + e) / tau)[n] * MP[n](X[i]),  e ~ U(0, 1)

Shapes: B batch, C channels, H rows, W columns.
"""
from contextlib import contextmanager
from itertools import islice
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
)

import torch
from mmengine.dist import broadcast
from mmengine.logging import print_log
from torch import Tensor, nn

from ..models import EfficientFormer
from ..models.arch import STAGES, Arch
from ..models.attention import MB3D
from ..models.backbone import Stage
from ..utils.registry import MODELS
from .subnetwork import IDENTITY, Subnetwork

# Branches with a smaller weight in the mixture are not computed for that batch, which saves their
# time and memory. An importance that has fallen far enough never gets a larger weight.
NEGLIGIBLE = 1e-3


def _values(tensor: Tensor) -> list:
    """Return the values of a tensor as lists; ones on the meta device."""
    return (torch.ones(tensor.shape) if tensor.is_meta else tensor.detach()).tolist()


class MetaPath(nn.Module):
    """One block of the supernet: the blocks to choose among, the identity, and their importances.

    Args:
        branches: The blocks by kind, 'MB4D' and, in the last stages, 'MB3D'.
    """

    local = False  # see ScaledBlock

    def __init__(self, branches: Mapping[str, nn.Module]):
        super().__init__()
        self.branches = nn.ModuleDict(branches)
        self.importance = nn.Parameter(torch.zeros(len(branches) + 1))

    @property
    def kinds(self) -> Tuple[str, ...]:
        """The kinds of block, in the order of ``importance``."""
        return (*self.branches, IDENTITY)

    def forward(self, x: Tensor, weights: Tensor, used: Sequence[bool]) -> Tensor:
        """Return the mixture of all kinds for x (B, C, H, W), in the same shape.

        Args:
            weights: The weight of each of ``kinds``.
            used: Whether each weight is above 0.
        """
        mixed = weights[-1] * x
        for kind, weight, is_used in zip(self.branches, weights, used):
            if is_used:
                mixed = torch.addcmul(mixed, self._branch(kind, x), weight)
        return mixed

    def _branch(self, kind: str, x: Tensor) -> Tensor:
        block = self.branches[kind]
        if not isinstance(block, MB3D):
            return block(x)
        tokens = block(x.permute(0, 2, 3, 1).flatten(1, 2).contiguous(), x.shape[2:])
        return tokens.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)


class SuperStage(Stage):
    """A stage of MetaPaths.

    Attributes:
        choices: The kind of each path; None mixes all kinds.
        temperature: Temperature of the mixture.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.choices: Optional[Sequence[str]] = None
        self.temperature = 1.

    def through(self, x: Tensor, blocks: Sequence[MetaPath]) -> Tensor:
        if self.choices is not None:
            return super().through(x, [path.branches[kind] for path, kind
                                       in zip(blocks, self.choices) if kind != IDENTITY])
        scores = torch.stack([path.importance for path in blocks])
        if self.training:
            scores = scores + self._noise(scores)
        weights = (scores / self.temperature).softmax(1)
        if self.training:
            weights = weights * (weights.detach() > NEGLIGIBLE)
            weights = weights / weights.sum(1, keepdim=True)
        used = [[value > 0 for value in path] for path in _values(weights)]  # one copy from a GPU
        for path, weight, is_used in zip(blocks, weights, used):
            x = self._run(path, x, weight, is_used)
        return x

    @staticmethod
    def _noise(scores: Tensor) -> Tensor:
        """Return U(0, 1), the same in all processes of a job.

        Else processes would compute different branches, and SyncBN would wait for ever.
        """
        noise = torch.rand_like(scores)
        broadcast(noise)
        return noise


@MODELS.register_module()
class SuperEfficientFormer(EfficientFormer):
    """All sub-networks of an EfficientFormer with shared weights, to be trained and searched.

    In training it mixes the branches of each path, unless ``choose`` has set a sub-network. In
    eval it runs that sub-network, or :meth:`best`, and computes no other branch.

    Args:
        arch: As for :class:`EfficientFormer`. Its widths and depths are the largest of the
            search; its attention blocks are ignored.
        attention_stages: Stages (from 0) whose paths offer MB3D: the last ones, (2, 3) in the
            paper. Attention over the tokens of stage 2 takes much memory at the image sizes of
            detectors: ``with_cp`` then keeps the activations of one path at a time.
        options: See :class:`EfficientFormer`. ``init_cfg=dict(type='Pretrained', ...)`` loads
            the weights of a plain EfficientFormer of ``arch``: each of its blocks goes to the
            branch of its kind, other branches stay random.

    Raises:
        ValueError: An error of :class:`EfficientFormer`, or the attention stages are not the
            last ones.
    """

    def __init__(self, arch='l1', attention_stages: Sequence[int] = (2, 3), **options):
        self.attention_stages = tuple(attention_stages)
        if self.attention_stages not in [tuple(range(i, STAGES)) for i in range(1, STAGES + 1)]:
            raise ValueError(f'attention_stages={attention_stages!r}: expected the last stages, '
                             'as (2, 3) or (3,), or none, ()')
        self.options = dict(options)  # what a sub-network is built with
        super().__init__(arch, **options)
        if self.arch.expansion != 4:
            raise ValueError(f'arch expansion={self.arch.expansion!r}: expected 4 for a supernet')
        self._mixes = False

    def _stage(self, stage: int, arch: Arch, downsample: Optional[nn.Module],
               kinds: Mapping[str, Callable[..., nn.Module]], cfgs: Sequence[dict],
               with_cp: bool) -> SuperStage:
        offered = [kind for kind in kinds if kind != 'MB3D' or stage in self.attention_stages]
        return SuperStage(downsample, [MetaPath({kind: kinds[kind](**cfg) for kind in offered})
                                       for cfg in cfgs], with_cp)

    def set_temperature(self, temperature: float) -> None:
        """Set tau of the mixture: a high one mixes evenly, a low one nearly chooses."""
        if not temperature > 0:
            raise ValueError(f'temperature {temperature!r}: expected a number above 0')
        for stage in self.stages:
            stage.temperature = float(temperature)

    def choose(self, choices: Optional[Sequence[Sequence[str]]]) -> None:
        """Run and train one sub-network only; None mixes again.

        Args:
            choices: For each stage and path 'MB4D', 'MB3D' or 'I'.

        Raises:
            ValueError: The choices do not fit this supernet, or have an MB4D after an MB3D.
        """
        if choices is not None:
            choices = self.subnetwork(choices).choices
        for stage, chosen in zip(self.stages, choices or [None] * STAGES):
            stage.choices = chosen

    @contextmanager
    def mixing(self) -> Iterator[None]:
        """Context manager: mix all branches in eval mode, without noise and at temperature 1."""
        before = [(stage.temperature, stage.choices) for stage in self.stages]
        self.set_temperature(1)
        self.choose(None)
        self._mixes = True
        try:
            yield
        finally:
            self._mixes = False
            for stage, (temperature, choices) in zip(self.stages, before):
                stage.temperature, stage.choices = temperature, choices

    def subnetwork(self, choices: Optional[Sequence[Sequence[str]]] = None,
                   widths: Optional[Sequence[int]] = None) -> Subnetwork:
        """Return a sub-network of this supernet, by default :meth:`best` at full width.

        Raises:
            ValueError: The supernet has no such sub-network.
        """
        network = Subnetwork(choices or self.best(), widths or self.arch.widths)
        network.check_within(self.arch.widths, [[path.kinds for path in stage.blocks]
                                                for stage in self.stages])
        return network

    def importances(self) -> List[List[Dict[str, float]]]:
        """Return the softmax of each path's importances by stage, path and kind."""
        found = []
        for stage in self.stages:
            shares = _values(torch.stack([path.importance for path in stage.blocks]).softmax(1))
            found.append([dict(zip(path.kinds, values))
                          for path, values in zip(stage.blocks, shares)])
        return found

    def best(self) -> Tuple[Tuple[str, ...], ...]:
        """Return the choices without I and with one change from 4D to 3D whose product of
        softmax importances is largest."""
        paths = [path for stage in self.importances() for path in stage]
        first = sum(self.arch.depths[:STAGES - len(self.attention_stages)])
        candidates = [['MB4D'] * change + ['MB3D'] * (len(paths) - change)
                      for change in range(first, len(paths) + 1)]
        best = iter(max(candidates, key=lambda kinds: torch.tensor(
            [path[kind] for path, kind in zip(paths, kinds)]).log().sum()))
        return tuple(tuple(islice(best, depth)) for depth in self.arch.depths)

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        if self.training or self._mixes or self.stages[0].choices is not None:
            return super().forward(x)
        self.choose(self.best())
        try:
            return super().forward(x)
        finally:
            self.choose(None)

    @staticmethod
    def pretrained_loader(supernet: 'SuperEfficientFormer', source: Any, **options: Any) -> Any:
        """Load the weights of a plain EfficientFormer into the branches of its blocks' kinds."""
        plain = EfficientFormer(supernet.arch, **{**supernet.options, 'init_cfg': None})
        report = plain.pretrained_loader(plain, source, **options)
        state = supernet.state_dict()
        for key, value in plain.state_dict().items():
            parts = key.split('.')
            if parts[0] == 'stages' and parts[2] == 'blocks':
                attends = supernet.arch.attends(int(parts[1]), int(parts[3]))
                parts[4:4] = ['branches', 'MB3D' if attends else 'MB4D']
            key = '.'.join(parts)
            if key in state:
                state[key].copy_(value)
            else:
                print_log(f'supernet: {key} is not loaded, because its stage offers no MB3D',
                          logger='current')
        return report

    def switch_to_deploy(self) -> None:
        """Raise a RuntimeError: only a sub-network can be deployed."""
        raise RuntimeError('a supernet cannot be deployed: slim it (tools/slim.py), train the '
                           'network found, and deploy that')
