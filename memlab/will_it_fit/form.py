"""A form in a notebook: choose a model, switches and a GPU, and predict whether it fits."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping

import ipywidgets

from memlab import figures
from memlab.predict import predict
from memlab.prediction import Fit
from memlab.will_it_fit.rows import EXERCISE_MODEL, GPUS, LINES_SEQUENCE, MODELS, Row, Rows
from memlab.workloads.fine_tuning import fine_tune

_CARDS = ("T4", "RTX 4080", "L4", "RTX 4090", "A100 40GB", "A100 80GB", "H100 80GB", "H200")
_SEQUENCES = (512, 1024, 2048, 4096, 8192)
_SWITCHES = {"lora": "LoRA", "checkpoints": "checkpoints", "fused_loss": "fused loss"}


def form(rows: Rows, predict: Callable = predict) -> ipywidgets.VBox:
    """A form that predicts a fine-tuning run when its button is clicked.

    It begins with a prediction that is kept, so that something is there before the first click.

    Args:
        rows: the predictions that are kept.
        predict: what predicts.
    """
    fields = _fields()
    button = ipywidgets.Button(description="Predict", button_style="primary")
    text = ipywidgets.HTML()
    image = ipywidgets.Image(format="png", layout={"max_width": "860px"})

    def show(name: str, columns: Mapping[str, int], fit: Fit, notes: tuple[str, ...] = ()) -> None:
        image.value = _figure(name, columns, fit).png(dpi=110)
        text.value = "<br>".join(html.escape(line) for line in (f"{name} {fit}", *notes))

    def answer(_: object) -> None:
        options = {name: field.value for name, field in fields.items()}
        gpu = options.pop("gpu")
        button.disabled = True
        text.value = "Predicting. A model with many layers takes a minute or more."
        try:
            prediction = predict(fine_tune, gpu=gpu, progress=False, **options)
            notes = tuple(f"assumed: {note}" for note in prediction.notes)
            show(_name(options), prediction.columns, prediction.fits(), notes)
        except (ValueError, ImportError) as error:
            text.value = html.escape(str(error))
        finally:
            button.disabled = False

    button.on_click(answer)
    first = _first(rows)
    show(_name(dict(first.options)), first.columns, first.fits(GPUS["24 GB"]))
    lines = [
        ipywidgets.HBox([fields[name] for name in ("model", "batch", "sequence")]),
        ipywidgets.HBox([fields[name] for name in (*_SWITCHES, "gpu")]),
    ]
    return ipywidgets.VBox([*lines, button, text, image])


def _first(rows: Rows) -> Row:
    return rows.find(model=EXERCISE_MODEL, lora=True, checkpoints=True)


def _fields() -> dict[str, ipywidgets.Widget]:
    """The fields by the keyword that each sets, with the values of the row that is shown first."""
    wide = {"style": {"description_width": "initial"}}
    fields = {
        "model": ipywidgets.Dropdown(
            options=MODELS, value=EXERCISE_MODEL, description="model", **wide
        ),
        "batch": ipywidgets.BoundedIntText(
            value=1, min=1, max=1024, description="sequences a step", **wide
        ),
        "sequence": ipywidgets.Dropdown(
            options=_SEQUENCES, value=LINES_SEQUENCE, description="tokens a sequence", **wide
        ),
        "gpu": ipywidgets.Dropdown(options=_CARDS, value=GPUS["24 GB"], description="GPU", **wide),
    }
    for name, words in _SWITCHES.items():
        fields[name] = ipywidgets.Checkbox(
            value=name != "fused_loss", description=words, indent=False
        )
    return fields


def _name(options: Mapping[str, object]) -> str:
    switches = [words for name, words in _SWITCHES.items() if options[name]]
    size = f"{options['batch']} × {options['sequence']:,} tokens"
    return ", ".join([str(options["model"]), *(switches or ["full fine-tuning"]), size])


def _figure(name: str, columns: Mapping[str, int], fit: Fit) -> figures.Drawing:
    verdict = "fits" if fit else "does not fit"
    return figures.predicted(
        {"predicted": columns},
        {"predicted": fit.needed_bytes},
        {fit.gpu: fit.free_bytes},
        f"Predicted: {name}: {verdict}",
    )
