"""A hook for what mmengine does not resume, and for schedules that differ from the config's."""
import inspect
from collections import Counter
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from mmengine.hooks import Hook

from ...utils.modules import unwrap_model
from ...utils.registry import HOOKS
from ..mmengine_internals import is_resuming, is_training
from ..module_state import Path, changed_values, set_values, snapshot
from .checkpoint import flatten_schedulers


@HOOKS.register_module()
class ResumeHook(Hook):
    """Save and resume plain values of the model that change during training.

    All processes resume the values of the first one. A schedule in the checkpoint that differs
    from the config's is resumed with a warning, since mmengine ignores the config's.
    """

    _initial: Optional[Dict[Path, bytes]] = None

    def after_load_checkpoint(self, runner, checkpoint) -> None:
        if is_resuming(runner) and is_training(runner):
            model = unwrap_model(runner.model)
            self._initial = snapshot(model)
            set_values(model, checkpoint.get('module_state', {}))
            _warn_of_another_schedule(runner, checkpoint)

    def before_train(self, runner) -> None:
        if self._initial is None:
            self._initial = snapshot(unwrap_model(runner.model))

    def before_save_checkpoint(self, runner, checkpoint) -> None:
        if self._initial is not None:
            checkpoint['module_state'] = changed_values(unwrap_model(runner.model), self._initial)


def _warn_of_another_schedule(runner, checkpoint: Mapping[str, Any]) -> None:
    schedulers = flatten_schedulers(runner.param_schedulers)
    states = [scheduler.state_dict() for scheduler in schedulers]
    # Other attributes change from step to step.
    arguments = [sorted({*state} & {
        name for kind in type(scheduler).__mro__ if '__init__' in vars(kind)
        for name in inspect.signature(kind.__init__).parameters if name != 'last_step'})
        for scheduler, state in zip(schedulers, states)]
    config = _settings({name: getattr(runner, name) for name in ('max_epochs', 'max_iters')},
                       runner.optim_wrapper.state_dict(), states, arguments)
    saved = _settings(checkpoint['message_hub'].get('runtime_info', {}),
                      checkpoint.get('optimizer', {}),
                      flatten_schedulers(checkpoint.get('param_schedulers')), arguments)
    different: Dict[str, str] = {}  # the first parameter group stands for all
    for (name, group), value in config.items():
        other = saved.get((name, group), value)
        if value != other:
            different.setdefault(name, f'{name} {value} (checkpoint: {other})')
    if different:
        runner.logger.warning(
            f'The config differs from the checkpoint: {", ".join(different.values())}. The '
            "resumed run has the config's length, but the checkpoint's schedule and optimizer "
            "settings. For the config's, start a new run from the weights: --cfg-options "
            'load_from=FILE')


def _settings(loop: Mapping[str, Any], optimizer: Mapping[str, Any], schedulers: List[dict],
              arguments: Sequence[Sequence[str]]) -> Dict[Tuple[str, int], Any]:
    """Return the settings of a schedule by name and parameter group."""
    found = {(name, 0): loop[name] for name in ('max_epochs', 'max_iters') if name in loop}
    for part, state in ({'': optimizer} if 'param_groups' in optimizer else optimizer).items():
        for i, group in enumerate(state['param_groups']):
            found.update({(f'{part} {key}'.strip(), i): group.get(f'initial_{key}', value)
                          for key, value in group.items()
                          if key != 'params' and not key.startswith('initial_')})
    found['schedulers', 0] = len(schedulers)
    for i, (names, state) in enumerate(zip(arguments, schedulers)):
        for name in names:
            value = state.get(name, 'absent')
            found[f'param_scheduler[{i}].{name}', 0] = (
                sorted(value.elements()) if isinstance(value, Counter) else value)
    return found
