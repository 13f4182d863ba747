"""What the lessons show beside their figures: a helper's source, and a form for one's own model."""

from __future__ import annotations

import html
import inspect
import textwrap
from collections.abc import Callable, Sequence

import ipywidgets
from IPython.display import Code

from memlab.predict import predict


def source(function: Callable) -> Code:
    """Show the source of a function or a class, with colours."""
    return Code(textwrap.dedent(inspect.getsource(function)), language="python")


def form(run: Callable, *, gpu: Sequence[str], **choices: Sequence[object]) -> ipywidgets.VBox:
    """A form that predicts a run with the reader's own choices, and says whether it fits.

    Nothing is predicted before the button is pressed. A notebook that is read on the web does not
    run widgets: set a prediction beside the form.

    Args:
        run: as for `memlab.predict`.
        gpu: the GPUs to choose from.
        **choices: an option of the run → the values to choose from, the first one chosen.
    """
    fields = {
        name: ipywidgets.Dropdown(
            options=[(str(value), value) for value in values],
            description=name.replace("_", " "),
            style={"description_width": "110px"},
            layout={"width": "330px"},
        )
        for name, values in {**choices, "gpu": gpu}.items()
    }
    button = ipywidgets.Button(description="Predict", button_style="primary")
    answer = ipywidgets.HTML()

    def predict_now(_: object) -> None:
        button.disabled = True
        answer.value = "Predicting. A large model takes about a minute."
        try:
            chosen = {name: field.value for name, field in fields.items()}
            found = predict(run, progress=False, **chosen)
            answer.value = (
                f"<pre>{html.escape(f'{found.fits()}')}\n\n{html.escape(str(found))}</pre>"
            )
        except (ValueError, ImportError) as error:  # both say what to do
            answer.value = f"<pre>{html.escape(str(error))}</pre>"
        finally:
            button.disabled = False

    button.on_click(predict_now)
    return ipywidgets.VBox([*fields.values(), button, answer])
