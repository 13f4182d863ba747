"""What all techniques paste: every paste is the source's, and changes are undone in any order."""

import functools
import importlib.util
import inspect
import itertools
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memlab.techniques import _patch, chunked_input
from memlab.techniques._patch import Handle

# Most of these tests look at what is there, and run nothing.
pytestmark = pytest.mark.filterwarnings("ignore:Never used")

ROOT = Path(__file__).resolve().parents[2]
TECHNIQUES = ROOT / "memlab" / "techniques"

specification = importlib.util.spec_from_file_location("paste", ROOT / "tools" / "paste.py")
paste = importlib.util.module_from_spec(specification)
specification.loader.exec_module(paste)


def plus(module, forward, number, /, *args, **kwargs):
    return forward(*args, **kwargs) + number


def times(module, forward, number, /, *args, **kwargs):
    return forward(*args, **kwargs) * number


def constant(module, forward, number, /, x):
    return torch.full_like(x, number)


def applied(module, function, *options, handle=Handle, **position):
    handle = handle()
    handle.wrap_forward("here", module, function, *options, **position)
    return handle


X = torch.tensor([[1.0, 2.0]])


# --- The pastes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("source_name", paste.SOURCES)
def test_every_paste_is_the_sources(source_name):
    source = paste.pasted((TECHNIQUES / source_name).read_text(), source_name)
    texts = {path.name: path.read_text() for path in TECHNIQUES.glob("*.py")}
    pastes = {name: paste.pasted(text, source_name) for name, text in texts.items()}
    assert len([text for text in pastes.values() if text]) > 2
    other = [name for name, text in pastes.items() if text and text != source]
    assert not other, f"run `python tools/paste.py`: {other} have another paste"


def test_the_command_renews_a_paste_and_nothing_else(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "memlab" / "techniques"
    shutil.copytree(TECHNIQUES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    stale = folder / "gradient_checkpointing.py"
    expected = stale.read_text()
    stale.write_text(
        expected.replace("class Handle:", "class Handel:").replace("as its experts", "as its heads")
    )
    monkeypatch.setattr(paste, "TECHNIQUES", folder)
    paste.main()
    assert stale.read_text() == expected
    assert capsys.readouterr().out == "renewed memlab/techniques/gradient_checkpointing.py\n"


# --- A forward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_three_end_in_any_order_also_from_two_pastes(order):
    module = nn.Identity()
    handles = [
        applied(module, plus, 1),
        applied(module, times, 10, handle=chunked_input.Handle),
        applied(module, plus, 100),
    ]
    steps = [lambda x: x + 1, lambda x: x * 10, lambda x: x + 100]
    left = [0, 1, 2]
    for number in order:
        handles[number].remove()
        left.remove(number)
        expected = X
        for step in left:
            expected = steps[step](expected)
        assert torch.equal(module(X), expected)
    assert "forward" not in vars(module)


def test_the_innermost_is_below_what_came_before():
    module = nn.Identity()
    applied(module, plus, 1)
    handle = applied(module, constant, 5, innermost=True)
    assert (module(X) == 6).all()
    handle.remove()
    assert torch.equal(module(X), X + 1)


def test_a_forward_from_before_comes_back_and_one_from_since_stays():
    module = nn.Identity()
    module.forward = first = lambda x: x * 2
    below = applied(module, plus, 1)
    patched = module.forward
    # It copies the attributes of what it wraps: its own must not look like a patched forward.
    module.forward = since = functools.wraps(patched)(lambda x: patched(x) * 10)
    above = applied(module, plus, 5)
    assert torch.equal(module(X), (X * 2 + 1) * 10 + 5)
    below.remove()
    assert torch.equal(module(X), X * 2 * 10 + 5)
    above.remove()
    assert module.forward is since and torch.equal(module(X), X * 2 * 10)
    module.forward = patched  # whoever put it there undoes it
    last = applied(module, plus, 1)
    last.remove()
    assert module.forward is first


def test_a_keyword_of_the_model_may_be_called_as_an_option_is():
    class Model(nn.Module):
        def forward(self, x, *, number=0, module=0, forward=0):
            return x + number + module + forward

    module = Model()
    applied(module, plus, 1)
    assert torch.equal(module(X, number=10, module=20, forward=30), X + 61)
    parameters = inspect.signature(module.forward).parameters
    assert list(parameters) == ["x", "number", "module", "forward"]


def test_a_removed_patch_is_still_there_for_a_backward_that_runs_forward_again():
    module = nn.Linear(2, 2)
    handle = applied(module, times, 3)
    x = X.clone().requires_grad_()
    [expected] = torch.autograd.grad(module(x).sum(), x)

    def recomputing(module, forward, /, x):
        return checkpoint(forward, x, use_reentrant=False)

    checkpointing = applied(module, recomputing)
    loss = module(x).sum()
    checkpointing.remove()
    handle.remove()
    loss.backward()
    assert torch.equal(x.grad, expected)


def test_it_compiles_as_one_graph_applied_and_removed():
    model = nn.Sequential(nn.Linear(2, 2))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = model(X)
    handle = applied(model[0], plus, 1)
    assert torch.equal(compiled(X), expected + 1)
    handle.remove()
    assert torch.equal(compiled(X), expected)


def test_a_forward_whose_model_is_gone_says_so():
    module = nn.Identity()
    applied(module, plus, 1)
    forward = module.forward
    del module
    with pytest.raises(ReferenceError, match="keep the model"):
        forward(X)


# --- Attributes, hooks, the handle ----------------------------------------------------------------


def test_an_attribute_and_a_submodule_come_back():
    model = nn.Sequential(nn.ReLU())
    relu = model[0]
    handle = Handle()
    handle.replace("0", relu, "inplace", True)
    handle.replace("0", model, "0", nn.GELU())
    handle.on_remove(relu.register_forward_hook(print).remove)
    assert relu.inplace and isinstance(model[0], nn.GELU) and handle.names == ["0", "0"]
    handle.remove()
    handle.remove()
    assert model[0] is relu and not relu.inplace and not relu._forward_hooks


def test_what_somebody_has_replaced_since_is_left_and_nothing_is_undone():
    model = nn.Sequential(nn.ReLU(), nn.ReLU())
    handle = Handle()
    handle.replace("0", model[0], "inplace", True)
    handle.replace("1", model, "1", nn.GELU())
    handle.wrap_forward("0", model[0], plus, 1)
    ours, model[1] = model[1], nn.SiLU()
    with pytest.raises(RuntimeError, match="has replaced '1' of 1 since this was applied"):
        handle.remove()
    assert model[0].inplace and isinstance(model[1], nn.SiLU) and "forward" in vars(model[0])
    model[1] = ours
    handle.remove()
    assert not model[0].inplace and isinstance(model[1], nn.ReLU)
    assert "forward" not in vars(model[0])


def test_a_handle_says_what_it_changed():
    module = nn.Identity()
    handle = applied(module, plus, 1)
    assert repr(handle) == "Handle(names=['here'], never_used=['here'])"
    module(X)
    assert repr(handle) == "Handle(names=['here'])" and handle.never_used == []


@pytest.mark.parametrize("for_backward", [False, True])
def test_what_was_never_used_is_said(for_backward, recwarn):
    module = nn.Sequential(nn.Identity(), nn.Identity())
    handle = Handle()
    for name, inner in module.named_children():
        handle.wrap_forward(name, inner, plus, 1, for_backward=for_backward)
    with torch.no_grad():
        module[0](X)
    unused = ["0", "1"] if for_backward else ["1"]
    assert handle.never_used == unused
    with pytest.warns(UserWarning, match=f"Never used: {', '.join(unused)}. It was applied"):
        handle.remove()
    handle.remove()  # says it once
    with applied(module, plus, 1) as handle:
        module(X)
    with pytest.raises(KeyboardInterrupt), applied(module, plus, 1):
        raise KeyboardInterrupt  # an error is news enough
    assert handle.never_used == [] and not recwarn


def test_whether_a_function_is_applied():
    module = nn.Identity()
    assert not _patch._is_applied(module, plus)
    handle = applied(module, plus, 1)
    assert _patch._is_applied(module, plus) and not _patch._is_applied(module, times)
    handle.remove()
    assert not _patch._is_applied(module, plus)
