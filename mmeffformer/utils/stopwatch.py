"""Time by part of a model, while it predicts."""
import time
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List

from torch import nn

POST_PROCESSING = 'post_processing'
REST = 'other'


class Stopwatch:
    """Sums of the ms spent in named sections, each without the sections inside it."""

    def __init__(self) -> None:
        self.ms: Dict[str, float] = {}
        self._inside: List[float] = [0.]  # ms of the sections that ended in each open one

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Context manager, or decorator: add the time spent to ``ms[name]``."""
        start = time.perf_counter()
        self._inside.append(0.)
        try:
            yield
        finally:
            elapsed = 1e3 * (time.perf_counter() - start)
            self.ms[name] = self.ms.get(name, 0.) + elapsed - self._inside.pop()
            self._inside[-1] += elapsed

    def take(self) -> Dict[str, float]:
        """Return the sums, and start from zero."""
        taken, self.ms = self.ms, {}
        return taken

    def _watch(self, owner: Any, method: str, name: str) -> None:
        setattr(owner, method, self.section(name)(getattr(owner, method)))


def watch(*models: nn.Module) -> Stopwatch:
    """Return a stopwatch of detectors' or segmentors' parts; the models keep calling it.

    Its sections are the model's children, for example backbone, neck, rpn_head and roi_head, and
    ``POST_PROCESSING``: pasting masks into the image or resizing logits, and of one-stage
    detectors also what leads from a head's outputs to boxes. It times CPUs only, as it does not
    wait for a GPU.
    """
    stopwatch = Stopwatch()
    for model in models:
        for name, child in model.named_children():
            stopwatch._watch(child, 'predict' if hasattr(child, 'predict') else 'forward', name)
        if hasattr(model, 'postprocess_result'):  # a segmentor
            stopwatch._watch(model, 'postprocess_result', POST_PROCESSING)
        heads = [getattr(model, 'bbox_head', None), getattr(model, 'mask_head', None),
                 getattr(getattr(model, 'roi_head', None), 'mask_head', None)]
        for head in heads:
            head = head[-1] if isinstance(head, nn.ModuleList) else head  # the last of a cascade
            if hasattr(head, 'predict_by_feat'):
                stopwatch._watch(head, 'predict_by_feat', POST_PROCESSING)
    return stopwatch
