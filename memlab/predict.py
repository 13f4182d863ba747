"""`predict(run)`: the memory that a run would need on a GPU, without the GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import os
from collections.abc import Callable, Iterator, Mapping

import torch
from torch._subclasses import fake_tensor
from tqdm.auto import tqdm

from memlab.join import add_steps, measurement_of
from memlab.ledger import Ledger, build_ledger
from memlab.measurement import Measurement
from memlab.meters import fake_meter, refusals
from memlab.meters.allocator import Allocator, Settings, Ties
from memlab.meters.fake_ranks import fake_ranks
from memlab.meters.gpus import GPU, find_gpu
from memlab.meters.live import objects_set_aside
from memlab.meters.observer import Observer
from memlab.meters.recording import Recording
from memlab.meters.steps import StepCounter
from memlab.prediction import Prediction
from memlab.run import check_run, start_run

_HOST = torch.device("cpu")


def predict(
    run: Callable,
    *,
    steps: int = 2,
    gpu: str | GPU = "H100 80GB",
    device: str | None = None,
    ranks: int | None = None,
    allocator: str | None = None,
    progress: bool = True,
    **options: object,
) -> Prediction:
    """Predict the memory that a training run would need on a GPU, without the GPU.

    The code is the same that would run there, with `.to("cuda")` in it: it runs on fake tensors,
    which have shapes and no bytes. Nothing is computed; so no model is too large.

    Example:
        def train():
            model = Model().cuda()
            ...
            yield loss

        prediction = predict(train, gpu="RTX 4090")
        print(prediction.fits())

    Args:
        run: as for `memlab.measure`.
        steps: how many steps are taken. From the second on the optimizer's state is there.
        gpu: the GPU's name, as people write it, or a size ("24 GiB").
        device: "cpu" to predict what the same code needs on the CPU; then `gpu` has no meaning.
        ranks: how many processes train together. Then rank 0 is predicted, the run is to shard the
            model as it does there (`fully_shard(model)`), and what the communication itself takes
            beside the run's tensors is not counted. None: one process, and no process group.
        allocator: the allocator's settings, as PyTorch takes them
            ("expandable_segments:True"); None: those of the environment variable
            PYTORCH_ALLOC_CONF (or PYTORCH_CUDA_ALLOC_CONF) here.
        progress: whether a bar shows how far it is, where it takes longer than a second.
        **options: keywords for the run.

    Returns:
        A `Prediction`.

    Raises:
        ValueError: something given cannot be predicted; the message says what and what to do.
        RuntimeError: another measurement, or PyTorch's profiler, is running.
    """
    check_run(run, options)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps has to be a whole number of at least 1, not {steps!r}")
    if ranks is not None and (isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 2):
        raise ValueError(f"ranks has to be a whole number of at least 2, not {ranks!r}")
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f'device has to be "cuda" or "cpu", not {device!r}')
    card = None
    if device != "cpu":
        card = gpu if isinstance(gpu, GPU) else find_gpu(gpu)
    new_allocator = _new_allocator(allocator)
    with objects_set_aside(), fake_ranks(ranks):
        return _predict(run, options, steps, card, new_allocator, progress)


def _predict(
    run: Callable,
    options: Mapping[str, object],
    steps: int,
    gpu: GPU | None,
    new_allocator: Callable[..., Allocator],
    progress: bool,
) -> Prediction:
    assumed: dict[str, None] = {}
    device = torch.device("cuda", 0) if gpu is not None else _HOST
    meter = fake_meter.Meter(device, gpu, assumed.setdefault, new_allocator())
    recording = Recording(device, meter=meter)
    counter = StepCounter(by_hand=True)
    host = Observer(_HOST)
    bar = tqdm(desc="predicting", unit=" operators", disable=not progress, delay=1, leave=False)
    meter.shapes.on_progress = bar.update
    try:
        with refusals.backward_of_nothing_refused(), recording, counter, host:
            _take_steps(recording, host, counter, run, options, steps)
    finally:
        bar.close()
    recorded = recording.recorded
    found = measurement_of(recorded, _described(gpu))
    refusals.refuse_nothing_to_train(recorded)
    prediction = _prediction(found, gpu, tuple(assumed))
    counter.leave_out_trials(recorded.spans)
    prediction.requests, prediction.new_allocator = tuple(meter.requests), new_allocator
    add_steps(prediction, recorded, counter.counted)
    if gpu is not None:
        prediction.host_columns = _host_ledger(meter, host, recorded).peak_columns()
    return prediction


def _take_steps(
    recording: Recording,
    host: Observer,
    counter: StepCounter,
    run: Callable,
    options: Mapping[str, object],
    steps: int,
) -> None:
    started = start_run(run, options)
    try:
        if started.builds_in_first_step:
            recording.begin_steps_at_first_call()
        else:
            recording.begin_steps()
        for _ in range(steps):
            with unknown_operators_named():
                recording.run_step(started.step)
            host.seen.see_gradients()
            counter.end_step()
        recording.observer.seen.look_around(after=True)
        host.seen.look_around(after=True)
    finally:
        started.close()
    gc.collect()


@contextlib.contextmanager
def unknown_operators_named() -> Iterator[None]:
    """Inside, an operator that cannot run on shapes alone is named, with what to do."""
    unknown = (
        fake_tensor.UnsupportedFakeTensorException,
        fake_tensor.UnsupportedOperatorException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.DataDependentOutputException,
        NotImplementedError,
    )
    try:
        yield
    except (*unknown, RuntimeError) as error:
        if not isinstance(error, unknown) and "no fake impl" not in str(error):
            raise
        what = getattr(error, "func", None) or str(error).partition("\n")[0]
        raise ValueError(
            f"this run cannot be predicted: an operator cannot run on shapes alone ({what}). If it"
            " is yours, register its shapes: torch.library.register_fake. Else measure the run."
        ) from error


def _new_allocator(settings: str | None) -> Callable[..., Allocator]:
    if settings is None:
        new, old = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
        settings = os.environ.get(new) or os.environ.get(old) or ""
    parsed = Settings.parse(settings) if settings else Settings()
    return functools.partial(Allocator, parsed, ties=Ties.of(torch.__version__))


def _prediction(found: Measurement, gpu: GPU | None, notes: tuple[str, ...]) -> Prediction:
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return Prediction(**fields, gpu=gpu, notes=notes)


def _host_ledger(meter: fake_meter.Meter, host: Observer, recorded: object) -> Ledger:
    spans = [*recorded.spans, *(span for span in host.spans if span.kind != "step")]
    ledger, _ = build_ledger(
        meter.host_events,
        host.seen.observations,
        spans,
        (),
        start=recorded.start,
        end=recorded.end,
        one_clock=True,
    )
    return ledger


def _described(gpu: GPU | None) -> dict[str, object] | None:
    if gpu is None:
        return None
    return {
        "device": "cuda",
        "gpu": gpu.name,
        "gpu_bytes": gpu.memory_bytes,
        "torch": torch.__version__,
        "driver": None,
        "python": None,
        "threads": None,
    }
