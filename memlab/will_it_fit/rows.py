"""The predictions that are kept: which there are, how they are made, read and written."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, ValidationError

from memlab.forms import Bytes, Count, Model, Text, in_words, replace
from memlab.meters.gpus import find_gpu
from memlab.predict import predict
from memlab.prediction import Fit
from memlab.workloads.fine_tuning import fine_tune
from memlab.workloads.geometries import parameters

FILE = Path(__file__).with_name("predictions.json")

#: The lines: cards whose boxes say 16, 24, 80 and 141 GB. All can compute in BF16.
GPUS = {"16 GB": "RTX 4080", "24 GB": "RTX 4090", "80 GB": "H100 80GB", "141 GB": "H200"}

#: Model, and whether it is a LoRA: the rows of the figure.
LINES = (
    ("GPT-2 124M", False),
    ("GPT-2 124M", True),
    ("Llama-3.2 1B", False),
    ("Llama-3.2 1B", True),
    ("Llama-3.2 3B", False),
    ("Llama-3.1 8B", False),
    ("Llama-3.1 8B", True),
    ("Llama-3 70B", False),
)

#: What the form offers.
MODELS = (
    "GPT-2 124M",
    "Llama-3.2 1B",
    "Llama-3.2 3B",
    "Llama-3.1 8B",
    "Qwen3 14B",
    "Qwen3 32B",
    "Llama-3 70B",
)

#: The tokens of the one sequence of a step, as many as GPT-2 can read.
LINES_SEQUENCE = 1024

#: The switches of `fine_tune`, by their keywords.
SWITCHES = ("lora", "checkpoints", "fused_loss", "adamw_8bit")

#: The exercise's model, and its tokens.
EXERCISE_MODEL = "Llama-3.1 8B"
EXERCISE_SEQUENCE = 4096
EXERCISE_SWITCHES = (
    (),
    ("lora", "checkpoints", "adamw_8bit"),
    ("lora", "checkpoints", "fused_loss"),
)


class Options(Model):
    """What was predicted: the keywords of `memlab.workloads.fine_tuning.fine_tune`."""

    model: Text
    batch: Count = 1
    sequence: Count = LINES_SEQUENCE
    lora: bool = False
    checkpoints: bool = False
    fused_loss: bool = False
    adamw_8bit: bool = False

    @property
    def switches(self) -> tuple[str, ...]:
        """The switches that are on."""
        return tuple(name for name in SWITCHES if getattr(self, name))


class Row(Model):
    """One prediction that is kept.

    Attributes:
        options: what was predicted.
        parameters: how many the model has, without adapters.
        columns: bytes by column at the peak, those that are not 0.
        phase: the phase that holds the peak.
        reserved_bytes: what CUDA's allocator would hold from an H100's driver.
        needed_bytes: what the process needs on each of `GPUS`, by the GPU's name.
    """

    options: Options
    parameters: Count
    columns: dict[Text, Bytes]
    phase: Text
    reserved_bytes: Count
    needed_bytes: dict[Text, Count]

    @property
    def allocated_bytes(self) -> int:
        """The most bytes that tensors hold at once."""
        return sum(self.columns.values())

    @property
    def name(self) -> str:
        """The model and the switches that are on, for a figure."""
        switches = " + ".join(self.options.switches) or "no switch"
        return f"{self.options.model}, {switches}"

    def fits(self, gpu: str) -> Fit:
        """Say whether it fits one of `GPUS`, with the margin."""
        card = find_gpu(gpu)
        needed = self.needed_bytes[gpu]
        return Fit(card.name, needed, card.memory_bytes, needed - card.context_bytes)


class Rows(Model):
    """The file: the predictions, the libraries that they were made with, and the day."""

    date: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    torch: Text
    transformers: Text
    peft: Text
    rows: list[Row] = Field(min_length=1)

    def find(self, **options: object) -> Row | None:
        """Return the row with these options; None where there is none."""
        asked = Options(**options)
        return next((row for row in self.rows if row.options == asked), None)

    def with_model(self, model: str, **options: object) -> list[Row]:
        """Return the model's rows in which these options are as given."""
        return [
            row
            for row in self.rows
            if row.options.model == model
            and all(getattr(row.options, name) == value for name, value in options.items())
        ]


def kept_options() -> list[Options]:
    """Return what the file has: every model in full and with adapters, and the exercise's sets.

    Of the exercise's sets these are enough to see which is the smallest that fits. A switch more
    never needs more bytes, so a set within one that does not fit does not fit either. And a set
    without adapters holds weights, gradients and AdamW's state of 8 billion parameters.
    """
    lines = [Options(model=model, lora=lora, checkpoints=True) for model, lora in LINES]
    exercise = [
        Options(model=EXERCISE_MODEL, sequence=EXERCISE_SEQUENCE, **dict.fromkeys(switches, True))
        for switches in EXERCISE_SWITCHES
    ]
    return lines + exercise


def predict_row(options: Options, progress: bool = False) -> Row:
    """Predict what the file keeps of a run.

    Raises:
        ImportError: transformers or PEFT is not installed.
        ValueError: the model is not known.
    """
    prediction = predict(fine_tune, gpu="H100 80GB", progress=progress, **dict(options))
    return Row(
        options=options,
        parameters=parameters(options.model),
        columns={name: count for name, count in prediction.columns.items() if count},
        phase=prediction.phase,
        reserved_bytes=prediction.reserved_bytes,
        needed_bytes={gpu: prediction.fits(gpu).needed_bytes for gpu in GPUS.values()},
    )


def table_of(rows: Iterable[Row], date: str) -> Rows:
    """Return the file's content, stamped with the libraries that are installed."""
    return Rows(
        date=date,
        rows=list(rows),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    )


def load(path: Path = FILE) -> Rows:
    """Read the predictions that are kept.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file; the message says what is wrong, and where.
    """
    try:
        return Rows.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except ValidationError as error:
        raise ValueError(f"{path} is not a file of predictions: {in_words(error)}") from error


def write(rows: Rows, path: Path = FILE) -> None:
    """Write the predictions, a row a line, whole or not at all."""
    head = rows.model_dump_json(exclude={"rows"}).removesuffix("}")
    lines = ",\n".join(f"  {row.model_dump_json()}" for row in rows.rows)
    replace(path, f'{head},"rows":[\n{lines}\n]}}\n')
