"""Which model a module belongs to."""

import torch
from torch import nn

from memlab.meters.models import Models, outermost


def test_the_outermost_module_is_the_model():
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(4, 4))
    first, second = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    modules = [*averaged.modules(), *first.modules(), *second.modules()]
    assert outermost(modules) == [averaged, first, second]

    models = Models()
    models.find(modules)
    assert models.of(averaged.module) == "AveragedModel#1"
    assert [models.of(first[0]), models.of(second[0])] == ["Sequential#1", "Sequential#2"]
    assert models.names[averaged.module] == "module" and models.names[first] == "Sequential"


def test_what_is_found_later_counts():
    """A model that was called, and then wrapped: the wrapper is the model."""
    model = nn.Sequential(nn.Linear(4, 4))
    models = Models()
    models.note_called(model)
    assert models.of(model[0]) == "Sequential#1"
    wrapper = nn.Sequential(model)
    models.find(wrapper.modules())
    assert models.of(model[0]) == "Sequential#2"
    assert models.names[model[0]] == "0"  # the name that its calls had


def test_what_two_models_share_belongs_to_both():
    backbone = nn.Linear(4, 4)
    actor, critic = nn.Sequential(backbone), nn.ModuleList([backbone])
    models = Models()
    models.find([backbone, actor, critic])
    assert models.of(backbone) == "Sequential#1 + ModuleList#1"


def test_what_the_compiler_made_is_no_model_beside_it():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    layer = traced.get_submodule("0")
    models = Models()
    models.find(traced.modules())
    alone = models.of(layer)
    assert alone.endswith("#1")
    model = nn.ModuleList([layer])
    models.find([*traced.modules(), model])
    assert models.of(layer) == "ModuleList#1" and models.of(traced) == alone


def test_a_forward_that_was_replaced_counts_where_its_model_was_called():
    model, never_called = (nn.ModuleDict({"body": nn.ReLU(), "head": nn.ReLU()}) for _ in range(2))
    for each in (model, never_called):
        each["head"].forward = lambda inputs: inputs
    models = Models()
    models.note_called(model["body"])
    assert models.replaced() == frozenset()
    models.find([*model.modules(), *never_called.modules()])
    assert models.replaced() == {"head"}
    del model["head"].forward
    assert models.replaced() == frozenset()


def test_a_model_in_eval_mode():
    model = nn.Sequential(nn.Dropout())
    models = Models()
    assert not models.evaluating()  # nothing was called
    models.note_called(model)
    assert not models.evaluating()
    model.eval()
    assert models.evaluating()
