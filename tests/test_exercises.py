"""Exercises: what is refused and why, what is drawn, and that nothing stays switched on."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memlab import exercises, measure, proof
from memlab.budget import active_budget
from memlab.ledger import COLUMNS
from memlab.units import MiB, format_bytes
from tests.helpers import global_hooks

ROWS, WIDTH, LAYERS = 256, 128, 6


@pytest.fixture(autouse=True)
def history():
    """Each test reads its own."""
    exercises.history.clear()
    yield exercises.history
    exercises.history.clear()


def switched_on():
    gc.collect()
    return (
        global_hooks(),
        torch._C._len_torch_dispatch_stack(),
        active_budget(),
        torch.is_grad_enabled(),
        torch.autograd._profiler_enabled(),
        len([thing for thing in gc.get_objects() if type(thing) is nn.Linear]),
    )


@pytest.fixture(autouse=True)
def nothing_stays(history):
    before = switched_on()
    yield
    history.clear()
    assert switched_on() == before


def forward(model, inputs):
    return model(inputs)


def checkpointed(model, inputs):
    for layer in model:
        inputs = checkpoint(layer, inputs, use_reentrant=False)
    return inputs


def train(loss, optimizer):
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def builder(forward=forward, finish=train, rows=ROWS, seed=0, optimizer=torch.optim.SGD):
    def build():
        torch.manual_seed(seed)
        layers = [
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Tanh()) for _ in range(LAYERS)
        ]
        model = nn.Sequential(*layers)
        chosen = optimizer(model.parameters(), lr=0.1)
        inputs = torch.randn(ROWS, WIDTH)

        def step():
            loss = forward(model, inputs[:rows]).square().mean()
            finish(loss, chosen)
            return loss.detach()

        return step

    return build


REFERENCE = builder()
SOLUTION = builder(checkpointed)


@pytest.fixture(scope="module", autouse=True)
def peaks(objects_frozen):
    runs = {"reference": REFERENCE, "solution": SOLUTION}
    found = {name: measure(run, device="cpu").peak_bytes for name, run in runs.items()}
    proof.first_step(SOLUTION)
    return found


@pytest.fixture
def check(peaks):
    limit = (peaks["reference"] + 2 * peaks["solution"]) // 3

    def check_it(build, **more):
        return exercises.check(
            build, **{"reference": REFERENCE, "budget": limit, "device": "cpu"} | more
        )

    check_it.limit = limit
    return check_it


def test_a_solution_passes_and_is_drawn(check, peaks, history):
    result = check(SOLUTION)
    assert result.passed and history == [result]
    before, after, limit = (
        format_bytes(n) for n in (peaks["reference"], peaks["solution"], check.limit)
    )
    assert result.lines == [
        f"Solved: {before} → {after}, budget {limit}",
        (
            "Largest gradient difference 0.0e+00 (allowed 1e-04), 1.35× the floating-point"
            " operations (allowed 1.5×)."
        ),
    ]
    assert str(result) == repr(result) == "\n".join(result.lines)
    assert {name: sum(held.values()) for name, held in result.ledgers.items()} == {
        "as it is": peaks["reference"],
        "yours": peaks["solution"],
    }
    figure = result.plot()
    assert figure.get_suptitle() == result.lines[0]
    assert f"The budget is {limit}." in figure.alt and f"yours: {after}" in figure.alt


def test_exactly_the_budget_is_enough_and_a_byte_less_is_not(check, peaks):
    assert check(SOLUTION, budget=peaks["solution"]).passed
    result = check(SOLUTION, budget=peaks["solution"] - 1)
    assert not result.passed and result.lines[0].startswith("Over the budget of ")


def test_over_budget_is_refused_with_the_ledger_when_it_ran_out(check, peaks):
    result = check(REFERENCE)
    assert not result.passed
    first, where, advice = result.lines
    assert first == f"Over the budget of {format_bytes(check.limit)}"
    assert where.startswith("It ran out here: aten.") and " asked for 128.00 KiB." in where
    assert advice == "The largest column is activations. The hint below says where to look."
    held = result.ledgers["yours, when it ran out"]
    assert tuple(held) == COLUMNS
    # It stopped at the tensor that passed the budget.
    assert check.limit < sum(held.values()) <= check.limit + ROWS * WIDTH * 4
    assert held["parameters"] == LAYERS * (WIDTH + 1) * WIDTH * 4
    assert held["batch"] == ROWS * WIDTH * 4
    assert "yours, when it ran out: " in result.plot().alt


def test_leaving_a_part_of_the_task_out_is_refused():
    """Half the rows would fit, and so would a run without its validation."""

    def build(rows):
        def run():
            torch.manual_seed(0)
            model = nn.Linear(64, 64)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            inputs = torch.ones(512, 64)

            def step():
                loss = model(inputs[:rows]).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            return step

        return run

    limit = measure(build(512), device="cpu").peak_bytes - 1
    result = exercises.check(build(256), reference=build(512), budget=limit, device="cpu")
    assert not result.passed and result.lines == [
        "It fits, but it computes only 0.50× as much: a part of the task is missing"
    ]


def test_what_was_alive_before_does_not_count(check, peaks):
    """A notebook holds models of its own; the budget is for the answer alone."""
    alone = check(REFERENCE)
    mine = nn.Linear(1000, 1000)
    others = torch.zeros(3 * MiB)
    beside = check(REFERENCE)
    assert str(beside) == str(alone)
    assert beside.ledgers == alone.ledgers
    assert check(SOLUTION).passed
    del mine, others


def test_what_an_operator_takes_for_itself_counts_too(check):
    """It is found after the run, by the ledger: the columns are the measured ones."""

    def sorts(model, inputs):
        with torch.no_grad():
            for _ in range(2):
                inputs.repeat(3, 1).sort(dim=0)
        return checkpointed(model, inputs)

    needs = measure(builder(sorts), device="cpu")
    result = check(builder(sorts), budget=needs.peak_bytes - 1)
    assert not result.passed and result.lines[0].startswith("Over the budget")
    assert "at the measured peak" not in str(result)
    others = torch.zeros(3 * MiB)
    again = check(builder(sorts), budget=needs.peak_bytes - 1)
    assert again.ledgers == result.ledgers
    del others


def test_different_gradients_are_refused(check):
    result = check(builder(rows=32))
    assert not result.passed
    assert result.lines[0] == "It fits, but it does not train the same model"
    assert result.lines[1].startswith("The largest gradient difference is ")
    assert result.lines[1].endswith("; 1e-04 is allowed.")
    assert set(result.ledgers) == {"as it is", "yours"}
    assert result.plot().get_suptitle() == result.lines[0]


def test_the_tolerance_is_what_is_allowed(check):
    def halves(model, inputs):
        return (
            model(inputs.bfloat16().float())
            if inputs.requires_grad
            else checkpointed(model, inputs * (1 + 1e-6))
        )

    difference = proof.gradient_difference(
        proof.first_step(REFERENCE), proof.first_step(builder(halves))
    )
    assert 1e-7 < difference < 1e-4
    assert check(builder(halves)).passed
    assert not check(builder(halves), tolerance=difference / 2).passed


def test_gradients_that_are_no_numbers_are_refused(check):
    result = check(builder(lambda model, inputs: checkpointed(model, inputs) * float("nan")))
    assert not result.passed and "The largest gradient difference is inf" in str(result)


@pytest.mark.parametrize(
    "build",
    [
        lambda: lambda: None,
        builder(checkpointed, finish=lambda loss, optimizer: None),
        builder(
            lambda model, inputs: model(inputs).detach(),
            finish=lambda loss, optimizer: optimizer.step(),
        ),
    ],
    ids=["nothing at all", "forward only", "no backward"],
)
def test_a_step_that_does_nothing_is_refused(check, build):
    result = check(build)
    assert not result.passed
    assert result.lines[1].startswith("No parameter has a gradient: the step has to call backward")


@pytest.mark.parametrize(
    "finish, words",
    [
        (
            lambda loss, optimizer: loss.backward(),
            "The step leaves 12 of 12 parameters as they are (0.0.bias).",
        ),
        (
            lambda loss, optimizer: (loss.backward(), optimizer.zero_grad()),
            "No parameter has a gradient: ",
        ),
        (
            lambda loss, optimizer: (loss.backward(), optimizer.zero_grad(set_to_none=False)),
            "The largest gradient difference is 1.0e+00; ",
        ),
    ],
    ids=["backward only", "gradients thrown away", "gradients of zero"],
)
def test_a_step_whose_optimizer_never_steps_is_refused(check, peaks, finish, words):
    result = check(builder(checkpointed, finish), budget=peaks["reference"] - 1)
    assert not result.passed
    assert result.lines[0] == "It fits, but it does not train the same model"
    assert result.lines[1].startswith(words)


def test_a_step_that_trains_one_layer_less_is_refused(check):
    def leave_out_one(parameters, lr):
        return torch.optim.SGD(list(parameters)[2:], lr=lr)

    result = check(builder(checkpointed, optimizer=leave_out_one))
    assert not result.passed
    assert result.lines[1] == "The step leaves 2 of 12 parameters as they are (0.0.bias)."


def test_a_frozen_layer_is_refused(check):
    def freeze_one(model, inputs):
        model[0].requires_grad_(False)
        return checkpointed(model, inputs)

    result = check(builder(freeze_one))
    assert result.lines[1] == "no gradient reached 2 of 12 parameters (0.0.bias)."


def test_an_optimizer_inside_the_backward_passes(check):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(
            *[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Tanh()) for _ in range(LAYERS)]
        )
        inputs = torch.randn(ROWS, WIDTH)
        optimizers = {
            parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()
        }
        for parameter, own in zip(optimizers, map(weakref.ref, optimizers.values()), strict=True):

            def update(parameter, own=own):
                own().step()
                own().zero_grad()

            parameter.register_post_accumulate_grad_hook(update)

        def step():
            assert (
                optimizers  # held here, and weakly by the hooks: else the run would never be freed
            )
            loss = checkpointed(model, inputs).square().mean()
            loss.backward()
            return loss.detach()

        return step

    assert check(build).passed


def test_too_much_compute_is_refused(check):
    result = check(SOLUTION, max_compute=1.3)
    assert not result.passed
    assert result.lines == ["It fits, but it computes 1.35× as much; 1.3× is allowed"]


@pytest.mark.parametrize(
    "answer", [None, ..., lambda: None, lambda: ...], ids=["None", "...", "-> None", "-> ..."]
)
def test_unsolved_says_so_without_failing(check, peaks, history, answer):
    result = check(answer)
    assert not result.passed and history == [result]
    assert (
        str(result) == f"Not solved yet: {format_bytes(peaks['reference'])} has to become"
        f" {format_bytes(check.limit)}"
    )
    assert list(result.ledgers) == ["as it is"]
    assert result.plot().get_suptitle() == str(result)


def test_a_reference_that_fits_already_is_the_authors_error(check, peaks, history):
    for budget in (peaks["reference"], "1 GiB"):
        with pytest.raises(
            ValueError, match="meets the budget of .* already: there is nothing to do"
        ):
            check(SOLUTION, budget=budget)
    assert history == []


@pytest.mark.parametrize("where", ["in build", "in the step"])
def test_a_learners_exception_reaches_the_learner_as_it_is(check, history, where):
    def build():
        if where == "in build":
            optimiser.step()  # noqa: F821 - the typo

        def step():
            optimiser.step()  # noqa: F821

        return step

    with pytest.raises(NameError, match="name 'optimiser' is not defined"):
        check(build)
    assert history == []


def test_an_answer_that_returns_the_model_is_told(check):
    with pytest.raises(ValueError, match="build.. returned a model. It has to return the step"):
        check(lambda: nn.Linear(2, 2))


@pytest.mark.parametrize("budget", ["much", 0, -1, 1.5])
def test_a_budget_that_is_no_size_is_refused(check, budget):
    with pytest.raises(ValueError, match="size"):
        check(None, budget=budget)


def test_in_a_notebook_it_prints_and_draws(check, capsys, monkeypatch):
    display = pytest.importorskip("IPython.display")
    drawn = []
    monkeypatch.setattr(display, "display", drawn.append)
    result = check(None)
    result._ipython_display_()
    assert capsys.readouterr().out == f"{result}\n"
    (figure,) = drawn
    assert figure.alt.startswith("Not solved yet: ")


@pytest.mark.parametrize(
    "given, words",
    [
        (
            None,
            (
                "You have not predicted the peak yet: write a number of MiB above and run the cells"
                " again.\n"
            ),
        ),
        (100.5, "You predicted 100.5 MiB for the peak; measured 100.00 MiB: +0.5%, spot on.\n"),
        (95, "You predicted 95.0 MiB for the peak; measured 100.00 MiB: -5.0%, close.\n"),
        (
            250,
            (
                "You predicted 250.0 MiB for the peak; measured 100.00 MiB: +150.0%, worth a second"
                " look at the formula.\n"
            ),
        ),
    ],
)
def test_a_guess_is_set_beside_the_measurement(given, words, capsys):
    exercises.guess(given, 100 * MiB)
    assert capsys.readouterr().out == words
    exercises.guess(1, MiB, "the state")
    assert "for the state; measured 1.00 MiB: +0.0%" in capsys.readouterr().out


@pytest.mark.gpu
def test_on_a_gpu():
    reference = measure_on_gpu(forward)
    solution = measure_on_gpu(checkpointed)
    limit = (reference + solution) // 2
    kept = torch.zeros(64 * MiB // 4, device="cuda")
    more = {"reference": on_gpu(forward), "budget": limit, "device": "cuda"}
    over = exercises.check(on_gpu(forward), **more)
    assert over.lines[0].startswith("Over the budget of ")
    [yours] = [columns for name, columns in over.ledgers.items() if name.startswith("yours")]
    assert yours["activations"]
    assert exercises.check(on_gpu(checkpointed), **more).passed
    assert not exercises.check(None, **more).passed
    assert torch.cuda.get_per_process_memory_fraction() == 1.0
    del kept


def measure_on_gpu(forward):
    return measure(on_gpu(forward), device="cuda").peak_bytes


def on_gpu(forward):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(
            *[nn.Sequential(nn.Linear(1024, 1024), nn.Tanh(), nn.Tanh()) for _ in range(12)]
        ).cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        inputs = torch.randn(8192, 1024, device="cuda")

        def step():
            loss = forward(model, inputs).square().mean()
            train(loss, optimizer)
            return loss.detach()

        return step

    return build


def test_bytes_that_are_hidden_in_numpy_are_found(check):
    """The allocator knows nothing of NumPy's arrays: an answer that keeps its activations there
    saves nothing.
    """

    def hidden(model, inputs):
        def pack(tensor):
            return tensor.detach().numpy().copy()

        with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
            return model(inputs)

    result = check(builder(hidden))
    assert not result.passed
    assert "where the meter does not count" in result.lines[0]


def test_an_answer_may_compute_less_where_that_is_the_point(check):
    half = builder(forward, rows=ROWS // 2)
    refused = check(half, tolerance=10)
    assert not refused.passed and "a part of the task is missing" in refused.lines[0]
    assert check(half, tolerance=10, min_compute=0.4).passed
