"""`MemlabCallback` for Lightning's Trainer."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from memlab.integrations._parts import Parts
from memlab.measurement import Measurement


class MemlabCallback(Callback):
    """Measure some steps of a training and its first evaluation, and print their receipts.

    Example:
        trainer = Trainer(..., callbacks=[MemlabCallback(report="report.html")])
        trainer.fit(module, data)

    The steps' metrics (`memlab/steps/peak`, `memlab/steps/activations`, in bytes) and those of the
    evaluation (`memlab/evaluation/peak`) go to the trainer's loggers. The sanity check before the
    training is no evaluation.

    Args:
        first_step: the first step that is watched, counted from 1: one of the optimizer.
        last_step: the last one.
        evaluation: whether the first evaluation is watched, too.
        report: where to write the receipt of the steps as an HTML page; that of the evaluation
            stands beside it, as `report.evaluation.html`.
        save: where to keep the receipts, in the same way (`memlab.receipt`).

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
    ):
        self._parts = Parts(first_step, last_step, report, save)
        self._evaluation = evaluation

    @property
    def measurements(self) -> dict[str, Measurement]:
        """The measurement of each stretch that has ended, by its name."""
        return self._parts.measurements

    # What the trainer calls -----------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Begin to watch, if this is the first step that is asked for."""
        if self._parts.first_step <= trainer.global_step + 1 <= self._parts.last_step:
            self._parts.begin("steps", pl_module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """End the steps after the last one."""
        if trainer.global_step >= self._parts.last_step:
            self._end("steps", trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch the first evaluation."""
        if self._evaluation and not trainer.sanity_checking:
            self._parts.begin("evaluation", pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the evaluation."""
        self._end("evaluation", trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End what is still being watched: the training had fewer steps."""
        self._end("", trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """End what is being watched: the training has failed."""
        self._end("", trainer)

    def _end(self, name: str, trainer: Trainer) -> None:
        metrics = self._parts.end(name)
        for logger in trainer.loggers if metrics else ():
            logger.log_metrics(metrics, step=trainer.global_step)
