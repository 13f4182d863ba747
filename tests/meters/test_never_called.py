"""What a technique was applied to and the run never called."""

import torch
from torch import nn

from memlab.measure import measure
from memlab.meters.never_called import never_called


def test_what_did_not_run_although_others_beside_it_did():
    assert never_called(["head", "h.0.mlp"], {"GPT", "h.0", "h.0.mlp", "head"}) == ()
    ran = {"GPT", "h.0", "h.0.mlp"}
    assert never_called(["head", "h.0.mlp", "h.0.attention"], ran) == ("h.0.attention", "head")


def test_of_a_compiled_model_only_the_whole_is_seen():
    assert never_called(["head", "h.0.mlp"], {"GPT"}) == ()


def test_a_run_that_goes_round_its_head():
    def train(**options):
        model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
        model.forward = lambda inputs: model["body"](inputs) @ model["head"].weight
        if options:
            model[options["applied_to"]].forward = lambda inputs: inputs
        for _ in range(2):
            yield model(torch.ones(2, 4)).sum()

    assert measure(train).never_called == ()
    assert measure(train, applied_to="body").never_called == ()
    assert measure(train, applied_to="head").never_called == ("head",)
