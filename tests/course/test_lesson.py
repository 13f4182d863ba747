"""What the lessons show: a helper's source, and a form for one's own model."""

import torch
from torch import nn

from memlab.course import lesson


def train(width=64, fails=False):
    """A run with one linear layer."""
    if fails:
        raise ValueError("no such <model>")
    model = nn.Linear(width, width, device="cuda")
    while True:
        loss = model(torch.zeros(4, width, device="cuda")).sum()
        loss.backward()
        yield loss


def test_the_source_is_shown_as_it_is():
    assert lesson.source(train).data.startswith("def train(width=64")


def test_the_form_predicts_what_is_chosen_when_it_is_asked():
    form = lesson.form(train, width=[64, 1024], fails=[False, True], gpu=["RTX 4090", "T4"])
    width, fails, gpu, button, answer = form.children
    assert answer.value == ""
    button.click()
    assert "fits NVIDIA GeForce RTX 4090" in answer.value and "4.02 MiB" not in answer.value

    width.value, gpu.value = 1024, "T4"
    button.click()
    assert "fits Tesla T4" in answer.value and "parameters" in answer.value
    fails.value = True
    button.click()
    assert "no such &lt;model&gt;" in answer.value and not button.disabled
