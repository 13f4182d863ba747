"""Columns say what memory is for, whatever a training step does. Bytes are exact; only the columns
are asked here.
"""

import shutil
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memlab import measure
from memlab.meters.live import live_objects, live_storages, storages, tensors_in
from memlab.meters.observer import Observer

FLOAT = 4
CPU = torch.device("cpu")


def mlp(width: int = 64, layers: int = 3) -> nn.Sequential:
    return nn.Sequential(
        *[part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())]
    )


LOSS = 2 * FLOAT  # the loss, and the gradient of 1.0 with which its backward begins
MLP_BYTES = 3 * (64 * 64 + 64) * FLOAT


def stepping(optimizer, loss_of):
    def step():
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def measured(build, **options):
    result = measure(build, **options)
    assert sum(result.columns.values()) == result.peak_bytes
    assert result.columns["unattributed"] < 0.02 * result.peak_bytes
    return result


def columns_in(result, phase: str, largest: str = "total") -> dict[str, int]:
    """The columns at the highest moment of a phase in the last step."""
    timeline = result.timeline
    inside = timeline.phase == phase
    inside[: len(inside) // 2] = False
    curve = timeline.total if largest == "total" else timeline.bytes[largest]
    moment = max(range(len(inside)), key=lambda i: curve[i] if inside[i] else -1)
    return {name: int(values[moment]) for name, values in timeline.bytes.items()}


# What is saved for the backward -------------------------------------------------------------------


def test_activations_are_what_the_forward_leaves_for_the_backward():
    def build():
        model, inputs = mlp(), torch.randn(256, 64)
        return stepping(torch.optim.SGD(model.parameters()), lambda: model(inputs).mean())

    found = columns_in(measured(build), "forward", "activations")
    # Each Tanh saves its output, which the next Linear saves too. What a Linear makes is gone once
    # Tanh has read it.
    assert found["activations"] == 3 * 256 * 64 * FLOAT + LOSS
    assert found["parameters"] == MLP_BYTES
    assert found["batch"] == 256 * 64 * FLOAT
    assert found["gradients"] == 0


class Checkpointed(nn.Module):
    def __init__(self, run, layers: int = 4, width: int = 64):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers)
        )
        self.run = run

    def forward(self, x):
        for block in self.blocks:
            x = self.run(block, x)
        return x


TOKENS, WIDTH = 256, 64
HIDDEN = TOKENS * WIDTH * FLOAT  # one block's input


def checkpointed(run, of=lambda x: x):
    def build():
        torch.manual_seed(0)
        model, inputs = Checkpointed(run), of(torch.randn(TOKENS, WIDTH))
        return stepping(torch.optim.SGD(model.parameters()), lambda: model(inputs).sum())

    return build


CHECKPOINTS = {
    "non_reentrant": (lambda block, x: checkpoint(block, x, use_reentrant=False), lambda x: x),
    "reentrant": (
        lambda block, x: checkpoint(block, x, use_reentrant=True),
        lambda x: x.requires_grad_(),
    ),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_under_checkpointing_the_inputs_are_activations_and_so_is_what_is_computed_again(kind):
    """Checkpointing installs saved-tensor hooks of its own; the columns must not depend on seeing
    what it saves.
    """
    plain = measured(checkpointed(lambda block, x: block(x)))
    saved = measured(checkpointed(*CHECKPOINTS[kind]))
    # Plain: each block keeps what its two linear layers and GELU read, in units of its input 1, 4
    # and 4; the first reads the batch.
    assert columns_in(plain, "forward", "activations")["activations"] == (4 * 9 - 1) * HIDDEN + LOSS
    # Checkpointed: its input and the state of the random number generator, 5,056 bytes.
    kept = 3 * HIDDEN + 4 * 5056
    assert columns_in(saved, "forward", "activations")["activations"] == kept + LOSS
    # In backward one block is whole again: 8 units more than its input. The reentrant kind makes
    # its output again, too.
    again = {"non_reentrant": 8 * HIDDEN, "reentrant": 9 * HIDDEN}[kind]
    assert columns_in(saved, "backward", "activations")["activations"] == kept + again + LOSS
    assert saved.peak_bytes < plain.peak_bytes
    # The reentrant kind works only with an input that needs a gradient, and it gets one.
    model_bytes = 4 * (2 * 4 * WIDTH * WIDTH + 5 * WIDTH) * FLOAT
    of_input = HIDDEN if kind == "reentrant" else 0
    assert columns_in(saved, "backward", "gradients")["gradients"] == model_bytes + of_input


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_function_without_a_module(use_reentrant):
    """Nothing but its operators tells a recomputation from the backward around it."""

    def build(run):
        def inner():
            torch.manual_seed(0)
            inputs = torch.randn(TOKENS, WIDTH, requires_grad=use_reentrant)
            weights = [nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(4)]
            optimizer = torch.optim.SGD(weights)

            def loss():
                x = inputs
                for weight in weights:
                    x = run(lambda x, weight: torch.tanh(torch.tanh(x @ weight)), x, weight)
                return x.sum()

            return stepping(optimizer, loss)

        return inner

    plain = measured(build(lambda function, *args: function(*args)))
    saved = measured(
        build(lambda function, *args: checkpoint(function, *args, use_reentrant=use_reentrant))
    )
    assert columns_in(plain, "forward", "activations")["activations"] == 4 * 2 * HIDDEN + LOSS
    assert columns_in(saved, "forward", "activations")["activations"] < 4 * HIDDEN + 64 * 1024
    # The last block: its input and three others', and both its tanh again.
    assert columns_in(saved, "backward", "activations")["activations"] >= 4 * HIDDEN + HIDDEN


def test_a_backward_that_makes_a_graph_is_no_recomputation():
    """A gradient penalty: its first backward runs with gradients enabled, as a
    recomputation does.
    """

    def build():
        critic, inputs = mlp(), torch.randn(64, 64, requires_grad=True)

        def loss():
            (gradient,) = torch.autograd.grad(critic(inputs).sum(), inputs, create_graph=True)
            return gradient.square().sum()

        return stepping(torch.optim.SGD(critic.parameters()), loss)

    result = measured(build)
    assert result.columns["parameters"] == MLP_BYTES
    # The last bias shifts the output and no gradient of it: it gets none. The penalty's own
    # gradients are gradients too.
    assert result.timeline.bytes["gradients"].max() >= MLP_BYTES - 64 * FLOAT


# Gradients and optimizers -------------------------------------------------------------------------


def test_the_optimizer_in_the_backward():
    """Each parameter's optimizer steps as soon as its gradient is there, inside the backward."""

    def build():
        model, inputs = mlp(), torch.randn(8, 64)
        kept = [torch.optim.AdamW([parameter], foreach=False) for parameter in model.parameters()]
        optimizers = {
            id(parameter): weakref.ref(one)
            for parameter, one in zip(model.parameters(), kept, strict=True)
        }

        # A hook that referred to its parameter would be a cycle that Python's garbage collector
        # does not see.
        def hook(parameter):
            one = optimizers[id(parameter)]()
            one.step()
            one.zero_grad()

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(hook)

        def step(kept=kept):
            model(inputs).mean().backward()

        return step

    result = measured(build)
    assert result.columns["optimizer_state"] == 2 * MLP_BYTES + 6 * FLOAT
    assert result.columns["parameters"] == MLP_BYTES
    assert {"forward", "backward", "optimizer"} <= set(result.timeline.phase)
    # Never more than one layer's gradient at once.
    assert result.timeline.bytes["gradients"].max() <= (64 * 64 + 64) * FLOAT


def test_gradient_accumulation():
    def build():
        model, inputs = mlp(), torch.randn(64, 64)
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, foreach=False)

        def step():
            optimizer.zero_grad()
            for part in inputs.chunk(4):
                (model(part).mean() / 4).backward()
            optimizer.step()

        return step

    result = measured(build)
    found = columns_in(result, "backward", "gradients")
    assert found["gradients"] == MLP_BYTES
    assert found["optimizer_state"] == MLP_BYTES
    assert result.timeline.bytes["gradients"].max() == MLP_BYTES
    assert (
        result.timeline.bytes["activations"].max() <= 3 * 16 * 64 * FLOAT + 2 * FLOAT + 64
    )  # of one micro-batch
    assert found["batch"] == 64 * 64 * FLOAT


def test_a_batch_that_is_made_inside_the_step_is_the_batch():
    def build():
        model, optimizer = mlp(), None
        optimizer = torch.optim.SGD(model.parameters())

        def step():
            optimizer.zero_grad()
            inputs, targets = torch.randn(128, 64), torch.randn(128, 64)
            F.mse_loss(model(inputs), targets).backward()
            optimizer.step()

        return step

    assert columns_in(measured(build), "backward")["batch"] == 2 * 128 * 64 * FLOAT


def test_two_models_and_two_optimizers():
    """A step of a GAN: both are found without a name."""

    def build():
        generator, critic = mlp(layers=2), mlp(layers=1)
        optimizers = [torch.optim.Adam(m.parameters(), foreach=False) for m in (generator, critic)]
        real = torch.randn(32, 64)

        def step():
            fake = generator(torch.randn(32, 64))
            optimizers[1].zero_grad()
            (critic(fake.detach()) - critic(real)).mean().backward()
            optimizers[1].step()
            optimizers[0].zero_grad()
            critic(fake).mean().backward()
            optimizers[0].step()

        return step

    result = measured(build, steps=3)
    found = columns_in(result, "optimizer")
    assert found["parameters"] == MLP_BYTES
    assert found["gradients"] == MLP_BYTES
    assert found["optimizer_state"] == 2 * MLP_BYTES + 6 * FLOAT


def test_tied_weights_count_once():
    def build():
        embedding, head = nn.Embedding(1000, 32), nn.Linear(32, 1000, bias=False)
        head.weight = embedding.weight
        tokens = torch.randint(1000, (64,))
        optimizer = torch.optim.AdamW([embedding.weight], foreach=False)
        return stepping(optimizer, lambda: F.cross_entropy(head(embedding(tokens)), tokens))

    result = measured(build)
    found = columns_in(result, "optimizer")
    assert found["parameters"] == 1000 * 32 * FLOAT
    assert found["gradients"] == 1000 * 32 * FLOAT
    assert found["optimizer_state"] == 2 * 1000 * 32 * FLOAT + FLOAT


def test_views_and_slices_count_by_storage():
    """Parameters cut from one flat tensor, and gradients that are views of one bucket."""

    def build():
        flat, bucket = torch.zeros(64 * 64 + 64 + 1000), torch.zeros(64 * 64 + 64 + 500)
        layer = nn.Linear(64, 64)
        layer.weight = nn.Parameter(flat[: 64 * 64].view(64, 64))
        layer.bias = nn.Parameter(flat[64 * 64 : 64 * 64 + 64])
        layer.weight.grad = bucket[: 64 * 64].view(64, 64)
        layer.bias.grad = bucket[64 * 64 : 64 * 64 + 64]
        inputs = torch.randn(4, 64)

        def step():
            bucket.zero_()
            layer(inputs).mean().backward()

        return step

    result = measured(build)
    assert result.columns["parameters"] == (64 * 64 + 64 + 1000) * FLOAT
    assert result.columns["gradients"] == (64 * 64 + 64 + 500) * FLOAT


def test_an_optimizer_with_a_closure():
    """LBFGS evaluates its closure several times inside one step, and works in between."""

    def build():
        model, inputs = mlp(), torch.randn(16, 64)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3, history_size=2)

        def closure():
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            return loss

        return lambda: optimizer.step(closure).item()

    result = measured(build)
    assert result.columns["parameters"] == result.columns["gradients"] == MLP_BYTES
    # Two pairs of history, direction, previous gradient, and the flat gradient it works on.
    assert result.columns["optimizer_state"] >= 6 * MLP_BYTES
    kinds = [span.kind for span in result.ledger.phases]
    assert kinds.count("backward") == kinds.count("forward") >= 4
    assert result.phase == "optimizer"


def test_gradients_that_never_become_an_attribute():
    """`torch.autograd.grad` and an update by hand: no `.grad`, no optimizer."""

    def build():
        model, inputs = mlp(), torch.randn(16, 64)
        parameters = list(model.parameters())

        def step():
            gradients = torch.autograd.grad(model(inputs).mean(), parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= 0.1 * gradient

        return step

    result = measured(build)
    assert result.columns["gradients"] == MLP_BYTES
    assert result.columns["parameters"] == MLP_BYTES
    assert result.columns["optimizer_state"] == 0


def test_weights_that_are_plain_tensors():
    """A model written by hand, with neither `nn.Parameter` nor an optimizer."""

    def build():
        weights = [torch.randn(64, 64, requires_grad=True) for _ in range(2)]
        inputs = torch.randn(32, 64)

        def step():
            for weight in weights:
                weight.grad = None
            (torch.tanh(inputs @ weights[0]) @ weights[1]).sum().backward()
            with torch.no_grad():
                for weight in weights:
                    weight -= 0.1 * weight.grad

        return step

    result = measured(build)
    assert result.columns["parameters"] == 2 * 64 * 64 * FLOAT
    assert result.timeline.bytes["gradients"].max() == 2 * 64 * 64 * FLOAT
    assert result.columns["batch"] == 32 * 64 * FLOAT


def test_an_input_that_needs_a_gradient_is_the_batch():
    def build():
        model, inputs = mlp().requires_grad_(False), torch.randn(32, 64, requires_grad=True)

        def step():
            inputs.grad = None
            model(inputs).sum().backward()

        return step

    result = measured(build)
    assert result.columns["batch"] == 32 * 64 * FLOAT
    assert result.columns["parameters"] == MLP_BYTES


def test_a_sparse_gradient_counts_by_its_indices_and_values():
    def build():
        embedding, tokens = nn.Embedding(5000, 16, sparse=True), torch.randint(5000, (512,))
        return stepping(
            torch.optim.SparseAdam(embedding.parameters()), lambda: embedding(tokens).sum()
        )

    result = measured(build)
    assert result.columns["parameters"] == 5000 * 16 * FLOAT
    assert result.columns["optimizer_state"] == 2 * 5000 * 16 * FLOAT
    assert (
        result.columns["gradients"] == 512 * 16 * FLOAT + 512 * 8
    )  # values, and an index of 8 bytes for each
    assert result.columns["batch"] == 512 * 8


def test_a_frozen_backbone_has_neither_gradients_nor_state_nor_activations():
    def build():
        backbone, head = mlp().requires_grad_(False), nn.Linear(64, 10)
        inputs, labels = torch.randn(128, 64), torch.randint(10, (128,))
        optimizer = torch.optim.AdamW(head.parameters(), foreach=False)
        return stepping(optimizer, lambda: F.cross_entropy(head(backbone(inputs)), labels))

    result = measured(build)
    head = (64 * 10 + 10) * FLOAT
    found = columns_in(result, "optimizer")
    assert found["parameters"] == MLP_BYTES + head
    assert found["gradients"] == head
    assert found["optimizer_state"] == 2 * head + 2 * FLOAT
    saved = 128 * 64 + 2 * 128 * 10  # the head's input, and log_softmax with its input
    assert result.timeline.bytes["activations"].max() <= (saved + 128) * FLOAT


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_saves_nothing(mode):
    def build():
        model, inputs = mlp(), torch.randn(256, 64)

        @mode()
        def step():
            return model(inputs)

        return step

    result = measured(build)
    assert result.phase == "forward"
    assert result.columns == {
        "parameters": MLP_BYTES,
        "gradients": 0,
        "optimizer_state": 0,
        "activations": 0,
        "batch": 256 * 64 * FLOAT,
        "kept": 0,
        "temporaries": 2 * 256 * 64 * FLOAT,
        "unattributed": 0,
    }


def test_autocast_saves_activations_in_half_the_bytes_and_weights_once_more():
    def build(enabled):
        def inner():
            torch.manual_seed(0)
            model, inputs = mlp(), torch.randn(256, 64)
            optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

            def loss():
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    return model(inputs).float().mean()

            return stepping(optimizer, loss)

        return inner

    full, half = measured(build(False)), measured(build(True))
    for result in (full, half):
        found = columns_in(result, "optimizer")
        assert found["parameters"] == found["gradients"] == MLP_BYTES
        assert found["optimizer_state"] == 2 * MLP_BYTES + 6 * FLOAT
    activations = 256 * 64 * FLOAT
    assert columns_in(full, "forward", "activations")["activations"] == 3 * activations + LOSS
    # In 16 bits: the input, three outputs of Tanh, the weights that a backward needs; in 32: the
    # last output, the loss.
    found = columns_in(half, "forward", "activations")["activations"]
    assert 4 * activations // 2 < found < 4 * activations // 2 + activations + MLP_BYTES // 2 + 64


class TwoBytes(torch.Tensor):
    """Numbers of 4 bytes as far as anyone can see, kept in 2 bytes each and one scale."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=torch.float32, device=codes.device
        )

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


def test_a_tensor_subclass_counts_by_what_it_stores():
    class Optimizer(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        @torch.no_grad()
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                if parameter not in self.state:
                    codes = torch.zeros_like(parameter, dtype=torch.float16)
                    self.state[parameter] = {"average": TwoBytes(codes, torch.zeros(1))}

    def build():
        model, inputs = mlp(), torch.randn(8, 64)
        return stepping(Optimizer(model.parameters()), lambda: model(inputs).mean())

    result = measured(build)
    assert result.timeline.bytes["optimizer_state"].max() == MLP_BYTES // 2 + 6 * FLOAT


@pytest.mark.slow
def test_the_8_bit_state_of_torchao():
    """8-bit AdamW: codes of one byte, a scale for every 256 of them, and a table of 256 values a
    tensor.
    """
    if shutil.which("g++") is None:
        pytest.skip("torchao compiles its optimizer's step, and no g++ is there")
    optim = pytest.importorskip("torchao.optim")

    def build():
        model, inputs = (
            nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)),
            torch.randn(8, 64),
        )
        return stepping(optim.AdamW8bit(model.parameters()), lambda: model(inputs).mean())

    elements, blocks = 64 * 128, 64 * 128 // 256
    matrix = elements + FLOAT * blocks + FLOAT * 256
    vectors = FLOAT * (128 + 64)  # too small to be worth it: kept in FP32
    steps = 4 * FLOAT
    result = measured(build)
    assert columns_in(result, "optimizer")["optimizer_state"] == 2 * (2 * matrix + vectors) + steps


def test_parameters_that_are_gathered_and_freed_in_place():
    """FSDP resizes the storage of a parameter: to zero, and back when the module runs."""

    def build():
        model, inputs = mlp(), torch.randn(8, 64)
        parameters = list(model.parameters())
        full = [
            (parameter.untyped_storage(), parameter.untyped_storage().nbytes())
            for parameter in parameters
        ]

        def step():
            for storage, size in full:
                if storage.nbytes() == 0:
                    storage.resize_(size)
            for parameter in parameters:
                parameter.data.normal_()
                parameter.grad = None
            model(inputs).mean().backward()
            for storage, _ in full:
                storage.resize_(0)

        return step

    result = measured(build)
    assert result.columns["parameters"] == MLP_BYTES
    assert result.timeline.bytes["parameters"].max() == MLP_BYTES
    assert result.bytes_after_step[0] == result.bytes_after_step[1] == MLP_BYTES + 8 * 64 * FLOAT


@pytest.mark.slow
def test_a_compiled_model():
    """Compiling traces a backward inside the first call, and keeps fake tensors alive: neither is
    of the run.
    """
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++ on the CPU, and none is there")

    def build(compiled):
        def inner():
            torch.manual_seed(0)
            model, inputs = mlp(), torch.randn(256, 64)
            optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
            run = torch.compile(model) if compiled else model
            return stepping(optimizer, lambda: run(inputs).mean())

        return inner

    torch._dynamo.reset()
    first = measured(build(True))
    again = measured(build(True))
    eager = measured(build(False))
    torch._dynamo.reset()
    assert again.peak_bytes == first.peak_bytes
    assert again.columns == first.columns
    for name in ("parameters", "optimizer_state", "batch"):
        assert first.columns[name] == eager.columns[name]
    assert columns_in(first, "optimizer")["gradients"] == MLP_BYTES


# Asking strangers ---------------------------------------------------------------------------------


class HalfBuilt(nn.Module):
    def __init__(self):
        pass


class HalfBuiltOptimizer(torch.optim.Optimizer):
    def __init__(self):
        pass


class Cyclic(torch.utils.data.Dataset):
    def __init__(self):
        self.items = [torch.ones(10)]
        self.items.append(self.items)


class Hostile(torch.Tensor):
    def __tensor_flatten__(self):
        raise AttributeError("not yet")


class Unwilling(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise TypeError("not me")


def fake_tensor():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(1000)


STRANGERS = {
    "half-built module": HalfBuilt,
    "half-built optimizer": HalfBuiltOptimizer,
    "data set that holds itself": Cyclic,
    "tensor subclass that fails": lambda: torch.ones(3).as_subclass(Hostile),
    "tensor subclass that refuses": lambda: torch.ones(3).as_subclass(Unwilling),
    "lazy module": lambda: nn.LazyLinear(3),
    "model on the meta device": lambda: nn.Linear(3, 3, device="meta"),
    "fake tensor": fake_tensor,
    "sparse tensors": lambda: [
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        torch.eye(4).to_sparse_bsr((2, 2)),
    ],
    "nested tensor": lambda: torch.nested.nested_tensor(
        [torch.ones(2), torch.ones(3)], layout=torch.jagged
    ),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_whatever_else_lives_in_the_process_does_not_matter(kind):
    """The meter looks at every live object. Some are broken, and none of them is its business."""

    def build():
        model, inputs = mlp(), torch.randn(8, 64)
        return lambda: model(inputs).mean().backward()

    alone = measure(build)
    stranger = STRANGERS[kind]()
    assert live_storages(CPU) is not None
    beside = measure(build)
    assert stranger is not None
    assert (beside.peak_bytes, beside.columns) == (alone.peak_bytes, alone.columns)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_call_that_failed_is_closed(error):
    """Of what is no Exception PyTorch tells no hook: the outer module's end closes it
    all the same.
    """

    class Failing(nn.Module):
        def forward(self, x):
            raise error("no")

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Failing()

        def forward(self, x):
            try:
                self.inner(x)
            except error:
                return x + 1

    outer = Outer()
    with Observer(CPU) as observer:
        outer(torch.ones(1))
        assert observer.stack == []
    assert [span.name for span in observer.spans][-1] == "Outer"


def test_a_module_is_named_as_in_its_model():
    def build():
        model, inputs = nn.Sequential(mlp(), nn.Linear(64, 64)), torch.randn(512, 64)
        return lambda: model(inputs).mean().backward()

    names = {
        (block.name, block.bytes)
        for block in measured(build).largest(50)
        if block.column == "parameters"
    }
    assert ("0.4.weight", 64 * 64 * FLOAT) in names and ("1.bias", 64 * FLOAT) in names
    made = {
        (block.module, block.operator)
        for block in measured(build).largest(50)
        if block.column == "activations"
    }
    assert ("0.1", "aten::tanh") in made and ("1", "aten::linear") not in made
