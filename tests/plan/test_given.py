"""What plan() is given: names, files, configurations and runs, and what is wrong with them."""

import json

import pytest
import torch

from memlab import plan

transformers = pytest.importorskip("transformers")

NAME = "GPT-2 124M"


def switched(batch=1, checkpoints=False):
    yield torch.zeros(1, device="cuda", requires_grad=True).sum()


def without_switches(batch=1):
    yield torch.zeros(1, device="cuda", requires_grad=True).sum()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": "GPT-5 1T", "sequence": 8}, "no model is known as 'GPT-5 1T'"),
        ({"model": "none.json", "sequence": 8}, "there is no such file"),
        ({"model": "broken.json", "sequence": 8}, "is not JSON"),
        ({"model": "bare.json", "sequence": 8}, 'has no "model_type"'),
        ({"model": "t5.json", "sequence": 8}, "is a t5 model. A plan's script trains"),
        ({"model": 3, "sequence": 8}, "a model is a name"),
        ({"model": torch.nn.Linear(2, 2), "sequence": 8}, "plan\\(model.config"),
        ({"model": NAME}, "say how many a row has"),
        ({"model": NAME, "sequence": 1.5}, "sequence has to be a whole number"),
        ({"model": NAME, "sequence": 1025}, "at most 1,024 tokens"),
        ({"model": "ViT-B", "sequence": 8}, "takes images: leave sequence out"),
        ({"model": NAME, "sequence": 8, "batch": 0}, "batch has to be a whole number"),
        ({"model": NAME, "sequence": 8, "lora": 0}, "rank, has to be a whole number"),
        ({"model": NAME, "sequence": 8, "depth": 3}, "depth: only a run has options"),
        ({"model": NAME, "sequence": 8, "gpu": "RTX 5099"}, "RTX 5090"),
        ({"model": NAME, "sequence": 8, "in_use": "a bit"}, "'a bit' is not a size"),
        ({"model": without_switches}, "no option that is a switch"),
        ({"model": switched, "lora": 8}, "lora is for a model"),
        ({"model": switched, "depth": 3}, "unexpected keyword argument 'depth'"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "bare.json").write_text("{}")
    (tmp_path / "t5.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ValueError, match=said):
        plan(**{"gpu": "24 GiB", "progress": False, **arguments})


def test_peft_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        plan(NAME, sequence=8, gpu="24 GiB", lora=8)
