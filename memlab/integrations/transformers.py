"""`MemlabCallback` for the Trainer of Hugging Face, and for those of TRL."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from pathlib import Path

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from memlab.integrations._parts import Parts
from memlab.measurement import Measurement


class MemlabCallback(TrainerCallback):
    """Measure some steps of a training and its first evaluation, and print their receipts.

    Example:
        trainer = Trainer(..., callbacks=[MemlabCallback(report="report.html")])
        trainer.train()

    The steps' metrics (`memlab/steps/peak`, `memlab/steps/activations`, in bytes) and those of the
    evaluation (`memlab/evaluation/peak`) are added to the trainer's log history. To have them in
    all that the trainer reports to: `trainer.add_callback(MemlabCallback(log=trainer.log))`.

    An error in the middle of a step ends the training without a word to its callbacks. The receipt
    is printed then when the process ends, or by `finish()`.

    Args:
        first_step: the first step that is watched, counted from 1.
        last_step: the last one.
        evaluation: whether the first evaluation is watched, too.
        report: where to write the receipt of the steps as an HTML page; that of the evaluation
            stands beside it, as `report.evaluation.html`.
        save: where to keep the receipts, in the same way (`memlab.receipt`).
        log: called with the metrics, as `trainer.log` is.

    Attributes:
        measurements: the `Measurement` of "steps" and of "evaluation", once they have ended.

    Raises:
        ValueError: there is no such step.
    """

    def __init__(
        self,
        first_step: int = 1,
        last_step: int = 5,
        *,
        evaluation: bool = True,
        report: str | Path | None = None,
        save: str | Path | None = None,
        log: Callable[[dict[str, float]], None] | None = None,
    ):
        self._parts = Parts(first_step, last_step, report, save)
        self._evaluation = evaluation
        self._log = log

    @property
    def measurements(self) -> dict[str, Measurement]:
        """The measurement of each stretch that has ended, by its name."""
        return self._parts.measurements

    def finish(self) -> None:
        """End what is being watched, if something is, and print its receipt."""
        self._parts.end()

    # What the trainer calls -----------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: object
    ) -> None:
        """End what an earlier training that failed has left, and see to this one's end."""
        self.finish()
        atexit.register(self.finish)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **more: object,
    ) -> None:
        """Begin to watch, if this is the first step that is asked for."""
        if self._parts.first_step <= state.global_step + 1 <= self._parts.last_step:
            self._parts.begin("steps", model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **more: object,
    ) -> None:
        """End the steps, and begin to watch an evaluation that is about to come."""
        if state.global_step >= self._parts.last_step:
            self._end("steps", state, control)
        self._await_evaluation(control, model)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **more: object,
    ) -> None:
        """Begin to watch an evaluation that is about to come."""
        self._await_evaluation(control, model)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **more: object,
    ) -> None:
        """Begin to watch an evaluation that nobody announced, from its second batch on."""
        if self._evaluation:
            self._parts.begin("evaluation", model)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: object
    ) -> None:
        """End the evaluation."""
        self._end("evaluation", state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: object
    ) -> None:
        """End what is still being watched: the training had fewer steps."""
        self._end("", state, control)
        atexit.unregister(self.finish)

    def _await_evaluation(self, control: TrainerControl, model: nn.Module | None) -> None:
        if self._evaluation and control.should_evaluate:
            self._parts.begin("evaluation", model)

    def _end(self, name: str, state: TrainerState, control: TrainerControl) -> None:
        metrics = self._parts.end(name)
        if not metrics:
            return
        if self._log is None:
            state.log_history.append({**metrics, "step": state.global_step})
            return
        # To log is to say that nothing is left to be logged; the step's loss still is.
        should_log = control.should_log
        self._log(metrics)
        control.should_log = should_log
