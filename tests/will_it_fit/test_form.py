"""The form: it begins with a row that is kept, predicts what is chosen, and says what is wrong."""

import ipywidgets
import pytest

from memlab.meters.gpus import find_gpu
from memlab.prediction import Prediction
from memlab.units import GiB
from memlab.will_it_fit.form import form
from memlab.workloads.fine_tuning import fine_tune
from tests.will_it_fit.made_up import TABLE


def made_up(reserved, gpu):
    return Prediction(
        peak_bytes=reserved,
        columns={"parameters": reserved},
        phase="backward",
        ledger=None,
        environment={},
        reserved_bytes=reserved,
        gpu=find_gpu(gpu),
        notes=("a <guess>",),
    )


def parts(box):
    """The form's fields by their descriptions, its button, its text and its picture."""
    first, second, button, text, image = box.children
    fields = {field.description: field for field in (*first.children, *second.children)}
    return fields, button, text, image


def test_it_begins_with_a_prediction_that_is_kept():
    fields, _, text, image = parts(form(TABLE))
    assert "fits NVIDIA GeForce RTX 4090: 21.00 GiB" in text.value
    assert bytes(image.value).startswith(b"\x89PNG")
    assert fields["LoRA"].value and fields["checkpoints"].value and not fields["fused loss"].value


def test_a_click_predicts_what_is_chosen():
    asked = []

    def predict(run, *, gpu, progress, **options):
        asked.append((run, gpu, options))
        return made_up(40 * GiB, gpu)

    fields, button, text, image = parts(form(TABLE, predict))
    fields["model"].value, fields["GPU"].value = "GPT-2 124M", "A100 40GB"
    fields["LoRA"].value, fields["sequences a step"].value = False, 3
    before = bytes(image.value)
    button.click()
    options = {"model": "GPT-2 124M", "batch": 3, "sequence": 1024, "lora": False}
    options |= {"checkpoints": True, "fused_loss": False}
    assert asked == [(fine_tune, "A100 40GB", options)]
    assert "GPT-2 124M, checkpoints, 3 × 1,024 tokens does not fit NVIDIA A100" in text.value
    assert "assumed: a &lt;guess&gt;" in text.value
    assert bytes(image.value) != before and not button.disabled


def test_every_choice_is_one_that_memlab_knows():
    fields, *_ = parts(form(TABLE))
    assert all(find_gpu(name) for name in fields["GPU"].options)
    assert isinstance(fields["model"], ipywidgets.Dropdown) and len(fields["model"].options) >= 5


@pytest.mark.parametrize("error", [ValueError("too <long>"), ImportError("no transformers")])
def test_what_goes_wrong_is_said_in_the_form(error):
    def predict(*_, **__):
        raise error

    _, button, text, _ = parts(form(TABLE, predict))
    button.click()
    assert text.value == str(error).replace("<", "&lt;").replace(">", "&gt;")
    assert not button.disabled
