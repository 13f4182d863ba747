"""One meaning of "apply" and "undo": every `apply_*` keeps the same contract.

A technique that is applied returns a `Handle`. Its `remove()` brings back what was there, to the
bit, in any order, and takes away nothing of anybody else's. A technique without a case here fails.
"""

import copy
import functools
import gc
import importlib
import inspect
import itertools
import pickle
import pkgutil
import weakref
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

import memlab.techniques
from memlab.techniques import _patch, offloading, sparse_attention
from memlab.techniques.chunked_input import apply_chunked_feed_forward
from memlab.techniques.compilation_and_fusion import apply_fused_loss
from memlab.techniques.gated_activations import apply_gated_mlp, apply_gated_recomputation
from memlab.techniques.gradient_accumulation import apply_layer_major_micro_batches
from memlab.techniques.gradient_checkpointing import apply_gradient_checkpointing
from memlab.techniques.in_place import apply_in_place_activations
from memlab.techniques.large_vocabulary import apply_tied_embedding
from memlab.techniques.mixed_precision import apply_mixed_precision
from memlab.techniques.offloading import stream_parameters
from memlab.workloads import gpt
from tests.helpers import equal

# --- The techniques, each with a model ------------------------------------------------------------


def a_gpt():
    torch.manual_seed(0)
    return gpt.GPT(gpt.tiny(layers=2))


def gpt_loss(model):
    tokens = torch.arange(32).view(2, 16) % 7
    return model(tokens, tokens)


def activations():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 8), nn.LeakyReLU(), nn.Linear(8, 8), nn.ELU(), nn.Linear(8, 1)
    )


EXAMPLE = torch.linspace(-1, 1, 32).view(4, 8)


class Case(NamedTuple):
    """A technique and a model that it can be applied to.

    apply: applies it to the model. wrong: a call that is refused, for a model that it could change.
    new_modules: it puts new modules in the place of the model's, which nothing else was applied to.
    """

    apply: Callable
    wrong: Callable
    build: Callable = a_gpt
    loss: Callable = gpt_loss
    can_be_copied: bool = True
    new_modules: bool = False


WINDOW = functools.partial(sparse_attention.sliding_window_attention, window=4)

CASES = {
    "apply_attention": Case(
        lambda model: sparse_attention.apply_attention(model.blocks[0].attention, WINDOW),
        lambda model: sparse_attention.apply_attention(model.blocks[0].attention, 128),
    ),
    "apply_chunked_feed_forward": Case(
        lambda model: apply_chunked_feed_forward(model, "mlp", 5),
        lambda model: apply_chunked_feed_forward(model, "mlp", 0),
    ),
    "apply_fused_loss": Case(
        apply_fused_loss,
        lambda model: apply_fused_loss(model, loss="tiled"),
    ),
    "apply_gated_mlp": Case(
        apply_gated_mlp,
        lambda model: apply_gated_mlp(model, "swish"),
        new_modules=True,
    ),
    "apply_gated_recomputation": Case(
        apply_gated_recomputation,
        lambda model: apply_gated_recomputation([model]),
    ),
    "apply_gradient_checkpointing": Case(
        apply_gradient_checkpointing,
        lambda model: apply_gradient_checkpointing(model, every=3),
    ),
    "apply_in_place_activations": Case(
        lambda model: apply_in_place_activations(model, EXAMPLE),
        lambda model: apply_in_place_activations(model.requires_grad_(False), EXAMPLE),
        build=activations,
        loss=lambda model: model(EXAMPLE).square().mean(),
    ),
    "apply_layer_major_micro_batches": Case(
        lambda model: apply_layer_major_micro_batches(model, 1),
        lambda model: apply_layer_major_micro_batches(model, 1, [*model.blocks, nn.Linear(1, 1)]),
    ),
    "apply_mixed_precision": Case(
        apply_mixed_precision,
        lambda model: apply_mixed_precision(model, torch.float32),
    ),
    "apply_tied_embedding": Case(
        apply_tied_embedding,
        lambda model: apply_tied_embedding(model, head=nn.Linear(1, 1)),
    ),
    "stream_parameters": Case(
        lambda model: stream_parameters(model.blocks, min_bytes=1024),
        lambda model: stream_parameters([*model.blocks, nn.Linear(1, 1)], min_bytes=1024),
        can_be_copied=False,
    ),
}

# It is applied to an optimizer, and has its tests in test_offloading.py.
NOT_TO_A_MODEL = {"offload_optimizer_state"}

# What the techniques need beside a model.
ARGUMENTS = {
    "apply_attention": (WINDOW,),
    "apply_chunked_feed_forward": ("mlp", 5),
    "apply_layer_major_micro_batches": (1,),
    "materialize": ({}, lambda name, like: like),
    "optimizer_in_backward": (torch.optim.SGD,),
    "prune_heads": (0.5,),
    "prune_mlp": (0.5,),
    "score_units": ("heads",),
}

# Most of these tests look at what is there, and run nothing.
pytestmark = pytest.mark.filterwarnings("ignore:Never used")

every_technique = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def public_functions():
    for module_info in pkgutil.iter_modules(memlab.techniques.__path__, "memlab.techniques."):
        module = importlib.import_module(module_info.name)
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                yield name, function


def test_every_technique_that_is_applied_has_a_case():
    applied = {
        name
        for name, function in public_functions()
        if name.startswith("apply_") or inspect.signature(function).return_annotation == "Handle"
    }
    assert applied == CASES.keys() | NOT_TO_A_MODEL


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("apply_")])
def test_the_model_comes_first(name):
    [function] = [function for other, function in public_functions() if other == name]
    assert next(iter(inspect.signature(function).parameters)) in ("model", "module")


# --- What is compared -----------------------------------------------------------------------------


def run(case, model):
    """The loss and all gradients; it leaves none behind."""
    torch.manual_seed(0)
    loss = case.loss(model)
    loss.backward()
    found = [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return found


def structure(model):
    """All that a technique could have changed: modules, their attributes and hooks, parameters."""
    modules = [
        (name, id(module), type(module), getattr(module, "inplace", None))
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    attributes = [
        {name: len(value) if isinstance(value, dict) else None for name, value in vars(m).items()}
        for m in model.modules()
    ]
    parameters = [
        (id(p), p.dtype, p.device, p.untyped_storage().filename, p.requires_grad)
        for p in model.parameters()
    ]
    return modules, attributes, parameters


def count_call(module, forward, calls, /, *args, **kwargs):
    calls.append(type(module))
    return forward(*args, **kwargs)


def apply_counting(model):
    """Another technique, from another file with its own paste, that wraps every module."""
    handle = _patch.Handle()
    calls = []
    for name, module in model.named_modules():
        handle.wrap_forward(name, module, count_call, calls)
    return handle, calls


def wrap_as_others_do(module, calls):
    """As a library would that knows nothing of us."""
    before = module.forward

    @functools.wraps(before)
    def forward(*args, **kwargs):
        calls.append(type(module))
        return before(*args, **kwargs)

    module.forward = forward
    return forward


# --- The contract ---------------------------------------------------------------------------------


@every_technique
def test_removed_the_model_is_what_it_was_to_the_bit(case):
    model = case.build()
    before = structure(model)
    expected = run(case, model)
    handle = case.apply(model)
    assert handle.names and all(isinstance(name, str) for name in handle.names)
    assert structure(model) != before
    run(case, model)
    handle.remove()
    assert structure(model) == before and equal(run(case, model), expected)
    handle.remove()  # a second time does nothing
    assert structure(model) == before
    case.apply(model)  # and it can be applied again


@every_technique
def test_as_a_context_manager_it_ends_with_the_block_also_by_an_error(case):
    model = case.build()
    before = structure(model)
    with case.apply(model) as handle:
        assert handle.names and structure(model) != before
        run(case, model)
    assert structure(model) == before
    with pytest.raises(KeyboardInterrupt), case.apply(model):
        raise KeyboardInterrupt
    assert structure(model) == before


@every_technique
def test_a_call_that_fails_has_changed_nothing(case):
    model = case.build()
    expected = run(case, model)
    before = structure(model)
    with pytest.raises((TypeError, ValueError)):
        case.wrong(model)
    model.requires_grad_(True)
    assert structure(model) == before and equal(run(case, model), expected)


def let_fail(monkeypatch, technique, number):
    """Let the change of this number fail: a forward, an attribute, a hook, a file."""
    changes = itertools.count()

    def perhaps_failing(change):
        def changed(*args, **kwargs):
            if next(changes) == number:
                raise MemoryError("no room")
            return change(*args, **kwargs)

        return changed

    for owner, name in (
        (technique.Handle, "wrap_forward"),
        (technique.Handle, "replace"),
        (nn.Module, "register_forward_pre_hook"),
        (nn.Module, "register_forward_hook"),
        (torch.Tensor, "register_hook"),
        (offloading, "far_like"),
    ):
        monkeypatch.setattr(owner, name, perhaps_failing(getattr(owner, name)))


@pytest.mark.parametrize("name", CASES)
def test_one_that_fails_half_way_has_changed_nothing(name, monkeypatch):
    case = CASES[name]
    [function] = [function for other, function in public_functions() if other == name]
    model = case.build()
    expected = run(case, model)
    before = structure(model)
    for number in itertools.count():
        with monkeypatch.context() as context:
            let_fail(context, inspect.getmodule(function), number)
            try:
                case.apply(model)
                break  # there was no such change
            except MemoryError:
                assert structure(model) == before and equal(run(case, model), expected)
    assert number > 0 and structure(model) != before


@pytest.mark.parametrize(
    "name", [*CASES, *sorted(ARGUMENTS.keys() - CASES.keys()), "cast_to_low_precision"]
)
def test_a_name_is_no_model(name):
    [function] = [function for other, function in public_functions() if other == name]
    with pytest.raises(TypeError, match=r"must be a (list of )?torch\.nn\.Module"):
        function("gpt2", *ARGUMENTS.get(name, ()))


@pytest.mark.parametrize(
    "name", sorted(CASES.keys() - {"apply_gated_mlp", "apply_in_place_activations"})
)
# The other two change attributes, and no forward.
def test_what_never_ran_is_named(name):
    case = CASES[name]
    model = case.build()
    handle = case.apply(model)
    assert set(handle.never_used) <= set(handle.names) and handle.never_used
    run(case, model)
    assert handle.never_used == []


@every_technique
@pytest.mark.parametrize("first_in_first_out", [True, False])
def test_applied_twice_it_is_refused_or_both_end_in_either_order(case, first_in_first_out):
    model = case.build()
    before = structure(model)
    expected = run(case, model)
    handles = [case.apply(model)]
    applied = structure(model)
    with_it = run(case, model)
    try:
        handles.append(case.apply(model))
    except ValueError:
        assert structure(model) == applied and equal(run(case, model), with_it)
    for handle in handles if first_in_first_out else reversed(handles):
        handle.remove()
    assert structure(model) == before and equal(run(case, model), expected)


@every_technique
@pytest.mark.parametrize("ours_ends_first", [True, False])
def test_another_technique_after_it(case, ours_ends_first):
    model = case.build()
    before = structure(model)
    expected = run(case, model)
    other, calls = apply_counting(model)
    run(case, model)
    calls_alone = len(calls)
    other.remove()
    handle = case.apply(model)
    with_it = run(case, model)
    other, calls = apply_counting(model)
    assert equal(run(case, model), with_it) and calls
    calls.clear()
    if ours_ends_first:
        handle.remove()
        assert equal(run(case, model), expected)
        assert len(calls) == calls_alone or case.new_modules
        other.remove()
    else:
        other.remove()
        assert equal(run(case, model), with_it) and not calls
        handle.remove()
    assert structure(model) == before and equal(run(case, model), expected)


@every_technique
@pytest.mark.parametrize("ours_ends_first", [True, False])
def test_another_technique_before_it(case, ours_ends_first):
    model = case.build()
    before = structure(model)
    expected = run(case, model)
    other, calls = apply_counting(model)
    with_other = structure(model)
    run(case, model)
    calls_alone = len(calls)
    try:
        handle = case.apply(model)
    except ValueError:  # it has to come first
        assert structure(model) == with_other and equal(run(case, model), expected)
        return
    with_it = run(case, model)
    calls.clear()
    if ours_ends_first:
        handle.remove()
        assert equal(run(case, model), expected) and len(calls) == calls_alone
        other.remove()
    else:
        other.remove()
        assert equal(run(case, model), with_it) and not calls
        handle.remove()
    assert structure(model) == before and equal(run(case, model), expected)


@every_technique
def test_a_forward_that_somebody_has_put_over_it_stays(case):
    model = case.build()
    expected = run(case, model)
    handle = case.apply(model)
    calls = []
    forwards = {module: wrap_as_others_do(module, calls) for module in list(model.modules())}
    try:
        handle.remove()
    finally:
        left = [module for module in model.modules() if module in forwards]
        assert left and all(vars(module)["forward"] is forwards[module] for module in left)
    assert equal(run(case, model), expected) and calls


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@every_technique
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_has_it_too_and_is_its_own(case, duplicate):
    model = case.build()
    case.apply(model)
    if not case.can_be_copied:
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            duplicate(model)
        return
    expected = run(case, model)
    twin = duplicate(model)
    assert equal(run(case, twin), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert equal(run(case, twin), expected)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and equal(run(case, twin), expected)


@every_technique
def test_a_model_is_freed_without_the_garbage_collector(case):
    model = case.build()
    handle = case.apply(model)
    run(case, model)
    modules = [weakref.ref(module) for module in model.modules()]
    gc.collect()
    gc.disable()
    try:
        del model
        assert not any(module() is not None for module in modules)
    finally:
        gc.enable()
    handle.remove()  # there is nothing to undo any more


# --- The two faults that this began with ----------------------------------------------------------


def test_chunks_leave_autocast_that_came_after_them():
    model = nn.Sequential(nn.Linear(8, 8))
    handle = apply_chunked_feed_forward(model, "0", 2)
    apply_mixed_precision(model[0])
    handle.remove()
    assert model(EXAMPLE).dtype == torch.bfloat16


def test_another_attention_ends_also_below_something_else():
    model = a_gpt()
    attention = model.blocks[0].attention
    x = torch.randn(1, 16, model.config.hidden)
    expected = attention(x)
    handle = sparse_attention.apply_attention(attention, WINDOW)
    wrap_as_others_do(attention, [])
    assert not torch.equal(attention(x), expected)
    handle.remove()
    assert torch.equal(attention(x), expected)
