"""The early end of a run by `train.stop`, the best evaluation, and the best weights at the end of the run."""

from collections.abc import Mapping

from fastpref.atomic import damage
from fastpref.config import Config
from fastpref.config.stopping import StopConfig, metrics_to_stop_by, stop_metric
from fastpref.data.cache import Tokenized
from fastpref.errors import UserError
from fastpref.health.optimised import departed
from fastpref.model.load import Loaded
from fastpref.processes import Processes
from fastpref.run.checkpoint import Checkpoints
from fastpref.run.history import HELDOUT
from fastpref.run.state import Progress
from fastpref.run.weights import load_weights


def require_metric(stop: StopConfig | None, checkpoints: Checkpoints, evaluated: Mapping[str, float]) -> None:
    """Raise UserError if an evaluation lacks the metric of `train.stop`, as with held-out rows of one kind only."""
    loss = checkpoints.config.loss
    if stop is not None and (metric := stop_metric(stop, loss)) not in evaluated:
        known = ", ".join(name for name in metrics_to_stop_by(loss) if name in evaluated)
        raise UserError(f"train.stop.metric: the evaluation of these held-out rows has no {metric}; it has {known}")


def left_language(config: Config, data: Tokenized, progress: Progress, evaluated: Mapping[str, float]) -> bool:
    """Return whether an evaluation shows a model that has left its language, so that it is not the best.

    It is compared with the evaluation before the training. A metric that `train.stop` names decides alone.
    """
    stop, first = config.train.stop, progress.first
    if first is None or (stop is not None and stop.metric != "auto"):
        return False
    now, before = ({name.removeprefix(HELDOUT): value for name, value in of.items()} for of in (evaluated, first))
    return departed(config.loss, now, before, extras=data.extras)


def best_elsewhere(
    stop: StopConfig | None, checkpoints: Checkpoints, progress: Progress, processes: Processes
) -> str | None:
    """Return a note on the checkpoint of the best evaluation if final/ has other weights."""
    best = progress.best
    if stop is not None or best is None or best["step"] == progress.step:
        return None
    place = checkpoints.folder.checkpoint_of(int(best["step"]))
    if not processes.on_first(place.is_dir):
        return None
    return f"the best evaluation was after step {int(best['step'])}; {place} has its weights, final/ the last ones"


def ends(stop: StopConfig | None, progress: Progress) -> bool:
    """Return whether as many evaluations in a row as `train.stop.after` were not better than the best."""
    return stop is not None and progress.not_better >= stop.after


def forget_lost_best(
    stop: StopConfig | None, checkpoints: Checkpoints, progress: Progress, processes: Processes
) -> str | None:
    """Forget the best evaluation of a resumed run if `train.stop` has no checkpoint of it; return a note on that."""
    best = progress.best
    if stop is None or best is None:
        return None
    place = checkpoints.folder.checkpoint_of(int(best["step"]))
    if processes.on_first(place.is_dir):
        return None
    progress.best, progress.not_better = None, 0
    return f"the best evaluation so far, after step {best['step']}, has no checkpoint; train.stop takes a later one"


def take_best(
    stop: StopConfig | None, checkpoints: Checkpoints, loaded: Loaded, progress: Progress, processes: Processes
) -> tuple[int, str | None]:
    """Load the weights of the best evaluation if `train.stop` wants them. Return their step, and a note.

    Call it after the state of the last step is saved: a checkpoint of it can no longer be made.
    """
    best = progress.best
    if stop is None or best is None:
        return progress.step, None
    step, metric = int(best["step"]), stop_metric(stop, checkpoints.config.loss)
    words = f"the weights of step {step}{'' if step else ', from before the training'}"
    words += f", whose evaluation is the best: {metric} {best[metric]:.4g}"
    if ends(stop, progress):
        margin = f" by more than {stop.by:g}" if stop.by else ""
        words += f"; the {progress.not_better} after it are not better{margin}"
    if step == progress.step:
        return step, f"final/ gets {words}"
    place = checkpoints.folder.checkpoint_of(step)
    if wrong := processes.on_first(lambda: damage(place)):
        return progress.step, f"warning: {place} is not whole ({wrong}), so final/ gets the weights of the last step"
    processes.together(lambda: load_weights(place, loaded))
    return step, f"final/ gets {words}"
