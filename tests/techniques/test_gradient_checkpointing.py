"""Gradient checkpointing: the same gradients to the bit, the expected bytes, and clear refusals."""

import copy
import gc
import inspect
import json
import pickle
import weakref
from functools import partial

import pytest
import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from memlab.techniques.gradient_checkpointing import (
    MATRIX_PRODUCTS,
    apply_gradient_checkpointing,
    checkpoint,
)

HIDDEN, BATCH, SEQUENCE = 32, 2, 8
UNIT = BATCH * SEQUENCE * HIDDEN * 4  # bytes of one (batch, sequence, hidden) tensor in FP32
CPU_RNG_BYTES = torch.get_rng_state().nbytes
ADDMM = torch.ops.aten.addmm.default


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    # The tensors are so small that more threads only wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    """A transformer block that counts its calls."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.query_key_value = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.projection = nn.Linear(HIDDEN, HIDDEN)
        self.mlp = nn.Sequential(
            nn.LayerNorm(HIDDEN),
            nn.Linear(HIDDEN, 4 * HIDDEN),
            nn.GELU(),
            nn.Linear(4 * HIDDEN, HIDDEN),
        )
        self.dropout = nn.Dropout(dropout)
        self.calls = 0

    def forward(self, x, shift=None):
        self.calls += 1
        if shift is not None:
            x = x + shift
        batch, sequence, hidden = x.shape
        query, key, value = (
            part.view(batch, sequence, 2, -1).transpose(1, 2)
            for part in self.query_key_value(self.norm(x)).split(hidden, 2)
        )
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.projection(y.transpose(1, 2).reshape(batch, sequence, hidden)))
        return x + self.dropout(self.mlp(x))


class Tower(nn.Module):
    def __init__(self, layers=4, dropout=0.0, wrap=lambda output: output):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(layers))
        self.wrap = wrap

    def forward(self, x, **kwargs):
        for block in self.blocks:
            x = block(x, **kwargs)
        return x


def inputs(requires_grad=False):
    return torch.randn(BATCH, SEQUENCE, HIDDEN, requires_grad=requires_grad)


def gradients(run, tensors):
    """Loss and gradients of one seeded forward and backward, and the random number
    drawn after it.
    """
    for tensor in tensors:
        tensor.grad = None
    torch.manual_seed(7)
    loss = run().float().square().mean()
    loss.backward()
    # Without dropout, the next number shows that the recomputation left the random state alone.
    return [loss.detach(), torch.rand(3), *(tensor.grad for tensor in tensors)]


def equal(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def saved_bytes(run, exclude=()):
    """Bytes that hooks around `run` see saved, by unique storage, without those of `exclude`."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    for tensor in exclude:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del output
    return sum(size for size, _ in storages.values())


def allocated_bytes(run, tmp_path):
    """What `run` leaves allocated in the CPU allocator, and its peak, while the garbage collector
    is off.
    """
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = run()
    finally:
        gc.enable()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    del result
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    now = peak = 0
    for event in sorted(
        (e for e in events if e["name"] == "[memory]"), key=lambda event: event["ts"]
    ):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return now, peak


def count_operators(run, operator):
    count = 0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, called, types, args=(), kwargs=None):
            nonlocal count
            count += called is operator
            return called(*args, **(kwargs or {}))

    with Counter():
        run()
    return count


# --- checkpoint: gradients ------------------------------------------------------------------------

SAVE = {"nothing": None, "products": MATRIX_PRODUCTS, "one": [ADDMM], "all": lambda operator: True}


@pytest.mark.parametrize("save", SAVE.values(), ids=SAVE)
@pytest.mark.parametrize(
    "autocast", [None, {}, {"cache_enabled": False}], ids=["fp32", "bf16", "bf16-uncached"]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_a_plain_call_and_of_torch_to_the_bit(dropout, autocast, save):
    block, x = Block(dropout), inputs(requires_grad=True)
    tensors = [x, *block.parameters()]

    def under_autocast(function):
        # Only the forward pass is under autocast: the recomputation must restore it.
        with torch.autocast(
            "cpu", torch.bfloat16, enabled=autocast is not None, **(autocast or {})
        ):
            return function(block, x, shift=0.5)

    plain = gradients(
        lambda: under_autocast(lambda block, *args, **kwargs: block(*args, **kwargs)), tensors
    )
    theirs = gradients(
        lambda: under_autocast(partial(torch_checkpoint.checkpoint, use_reentrant=False)), tensors
    )
    ours = gradients(lambda: under_autocast(partial(checkpoint, save=save)), tensors)
    assert all(gradient.any() for gradient in ours)
    assert equal(ours, plain)
    assert equal(ours, theirs)


def test_dropout_without_the_random_state_gives_other_gradients():
    block, x = Block(0.3), inputs(requires_grad=True)
    tensors = [x, *block.parameters()]
    plain = gradients(lambda: block(x), tensors)
    ours = gradients(lambda: checkpoint(block, x, preserve_rng_state=False), tensors)
    assert torch.equal(ours[0], plain[0])  # the loss is right: nobody would notice
    assert not torch.equal(ours[2], plain[2])


def test_inputs_need_no_gradient():
    block, x = Block(), inputs()
    assert equal(
        gradients(lambda: checkpoint(block, x), list(block.parameters())),
        gradients(lambda: block(x), list(block.parameters())),
    )
    assert block.calls == 3


def test_nothing_to_differentiate_is_a_plain_call():
    output = checkpoint(torch.sin, torch.ones(3))
    assert not output.requires_grad and torch.equal(output, torch.ones(3).sin())


def test_under_no_grad_the_function_is_called_once_and_nothing_is_kept():
    block, x = Block(), inputs()
    with torch.no_grad():
        output = checkpoint(block, x, save=MATRIX_PRODUCTS)
    assert block.calls == 1 and not output.requires_grad
    assert torch.equal(output, block(x))


def test_nested_inputs_and_outputs_keep_their_form():
    x, y, marker = inputs(True), inputs(True), object()

    def function(pair, *, table, function, save_me):
        first, (second,) = pair
        product = first.sin() * second.exp() * table["z"][0].cos()
        return {"product": product, "rest": (None, marker, [product.tanh()], save_me)}

    def run(call):
        output = call(
            (x, [y]), table={"z": (x * y,)}, function="a name that checkpoint uses too", save_me=3
        )
        assert list(output) == ["product", "rest"]
        assert output["rest"][0] is None and output["rest"][1] is marker and output["rest"][3] == 3
        return output["product"] + output["rest"][2][0]

    assert equal(
        gradients(lambda: run(partial(checkpoint, function)), [x, y]),
        gradients(lambda: run(function), [x, y]),
    )


def test_autograd_grad_of_some_inputs_then_of_others():
    x, y = inputs(True), inputs(True)

    def function(x, y):
        return x.sin() * y.exp()

    plain = [torch.autograd.grad(function(x, y).sum(), tensor)[0] for tensor in (x, y)]
    loss = checkpoint(function, x, y).sum()
    (ours_x,) = torch.autograd.grad(loss, x, retain_graph=True)
    (ours_y,) = torch.autograd.grad(loss, y)
    assert equal([ours_x, ours_y], plain)


@pytest.mark.parametrize("save", SAVE.values(), ids=SAVE)
def test_several_backward_passes_each_recompute(save):
    block, x = Block(0.3), inputs(True)
    torch.manual_seed(7)
    loss = checkpoint(block, x, save=save).square().mean()
    loss.backward(retain_graph=True)
    first, x.grad = x.grad, None
    assert block.calls == 2
    loss.backward()
    assert block.calls == 3
    assert torch.equal(x.grad, first)


@pytest.mark.parametrize("save", SAVE.values(), ids=SAVE)
def test_second_derivatives(save):
    linear, x = nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)

    def second(call):
        (first,) = torch.autograd.grad(
            call(lambda x: linear(x).tanh() ** 3, x).sum(), x, create_graph=True
        )
        return torch.autograd.grad(first.square().sum(), [x, linear.weight])

    assert equal(second(partial(checkpoint, save=save)), second(lambda function, x: function(x)))


def test_gradients_taken_inside_the_function():
    x = inputs(True)

    def function(x):
        y = x.sin()
        z = y.cos()
        (slope,) = torch.autograd.grad(z.sum(), y, retain_graph=True)
        return x.exp() * slope.detach() + z

    assert equal(
        gradients(lambda: checkpoint(function, x), [x]), gradients(lambda: function(x), [x])
    )


def test_checkpoints_inside_a_checkpoint():
    tower, x = Tower(4, dropout=0.3), inputs(True)
    tensors = [x, *tower.parameters()]
    plain = gradients(lambda: tower(x), tensors)

    def half(blocks, x):
        for block in blocks:
            x = checkpoint(block, x)
        return x

    def nested(x):
        return checkpoint(half, tower.blocks[2:], checkpoint(half, tower.blocks[:2], x))

    assert equal(gradients(lambda: nested(x), tensors), plain)
    # Only the two outer inputs, the second of them an intermediate, are kept; none of the inner
    # ones.
    assert saved_bytes(lambda: nested(x)) == 2 * UNIT


def test_inside_an_offload_only_the_inputs_are_offloaded_and_the_gradients_are_the_same():
    block, x = Block(0.3), inputs(True)
    tensors = [x, *block.parameters()]
    plain = gradients(lambda: block(x), tensors)
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.detach().clone()

    def offloaded():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda copy: copy.clone()):
            return checkpoint(block, x)

    assert equal(gradients(offloaded, tensors), plain)
    assert packed == [x.shape]


# --- checkpoint: bytes, calls and lifetimes -------------------------------------------------------


def test_only_the_inputs_are_saved():
    tower, x = Tower(4), inputs()
    parameters = list(tower.parameters())

    def run(call):
        y = x
        for block in tower.blocks:
            y = call(block, y)
        return y

    plain = saved_bytes(lambda: run(lambda block, y: block(y)), parameters)
    theirs = saved_bytes(
        lambda: run(partial(torch_checkpoint.checkpoint, use_reentrant=False)), parameters
    )
    ours = saved_bytes(lambda: run(checkpoint), parameters)
    assert plain > 4 * 15 * UNIT
    assert ours == 4 * UNIT
    assert ours <= theirs


def test_allocated_bytes_equal_those_of_torch_and_all_are_freed(tmp_path):
    tower, x = Tower(8), inputs()
    for parameter in tower.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def forward(call):
        y = x
        for block in tower.blocks:
            y = call(block, y)
        return y

    theirs = partial(torch_checkpoint.checkpoint, use_reentrant=False)
    forward(checkpoint).sum().backward()  # whatever is allocated once and for all
    # Seven inputs (the first was there before), the output, and the random state at each call.
    retained = 8 * UNIT + 8 * CPU_RNG_BYTES
    assert allocated_bytes(lambda: forward(checkpoint), tmp_path)[0] == retained

    left, peak = allocated_bytes(lambda: forward(checkpoint).sum().backward(), tmp_path)
    assert left == 0  # nothing waits for the garbage collector
    assert peak <= allocated_bytes(lambda: forward(theirs).sum().backward(), tmp_path)[1]


def test_kept_outputs_cost_their_bytes_and_no_more(tmp_path):
    block, x = Block(), inputs()
    products = partial(checkpoint, block, x, save=MATRIX_PRODUCTS, preserve_rng_state=False)
    policy = partial(torch_checkpoint.create_selective_checkpoint_contexts, list(MATRIX_PRODUCTS))
    theirs = partial(torch_checkpoint.checkpoint, block, x, context_fn=policy)
    theirs = partial(theirs, use_reentrant=False, preserve_rng_state=False)
    products(), theirs()
    # query, key and value 3, attention 1 (and its log-sum-exp), projection 1, expansion 4, the
    # product after it 1, and the output of the block 1.
    log_sum_exp = BATCH * 2 * SEQUENCE * 4
    ours = allocated_bytes(products, tmp_path)[0]
    assert ours == 11 * UNIT + log_sum_exp
    assert ours <= allocated_bytes(theirs, tmp_path)[0]
    assert saved_bytes(products) == 11 * UNIT + log_sum_exp  # the input in place of the output
    for parameter in block.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert allocated_bytes(lambda: products().sum().backward(), tmp_path)[0] == 0


def test_kept_products_are_not_computed_again():
    block, x = Block(), inputs()
    loss = checkpoint(block, x, save=ADDMM).sum()  # a single operator will do
    again = count_operators(loss.backward, ADDMM)
    loss = checkpoint(block, x).sum()
    assert (again, count_operators(loss.backward, ADDMM)) == (
        0,
        3,
    )  # the fourth comes after all that is saved


def test_recomputation_stops_at_the_last_saved_tensor():
    reached = []

    def function(x):
        y = x.sin()
        reached.append("middle")
        y = y.cos() + 1  # saves its input; the addition saves nothing
        reached.append("end")
        return y

    checkpoint(function, inputs(True)).sum().backward()
    assert reached == ["middle", "end", "middle"]


def test_branches_that_nobody_used_are_not_asked_for():
    x, reached = inputs(True), []

    def function(x):
        x.exp()  # saves its result, which is freed at once: the slot is gone
        y = x.sin()
        reached.append("needed")
        y.exp().cos()
        reached.append("not needed")
        return y

    plain = gradients(lambda: function(x), [x])
    reached.clear()
    assert equal(gradients(lambda: checkpoint(function, x), [x]), plain)
    assert reached == ["needed", "not needed"]  # once: the recomputation stopped at the sine


def test_a_function_that_catches_exceptions_does_not_stop_the_stop():
    def function(x):
        try:
            return x.sin().cos()
        except Exception:
            return x

    x = inputs(True)
    assert equal(
        gradients(lambda: checkpoint(function, x), [x]), gradients(lambda: function(x), [x])
    )


def test_inputs_are_freed_with_the_graph_and_after_an_exception():
    def dies(run):
        array = inputs().numpy()
        ghost = weakref.ref(array)  # alive as long as a tensor that shares its memory
        x = torch.from_numpy(array).requires_grad_()
        del array
        kept = run(x)
        del x
        alive = ghost() is not None
        del kept
        return alive, ghost() is None

    def fails(x):
        with pytest.raises(ZeroDivisionError):
            checkpoint(lambda x: x.sin().cos() / (1 // 0), x, save=lambda operator: True)

    gc.collect()
    gc.disable()
    try:
        for save in SAVE.values():
            assert dies(lambda x, save=save: checkpoint(lambda x: x.sin().cos(), x, save=save)) == (
                True,
                True,
            )
        # The exception holds its traceback and that the function's frame; nothing else may hold the
        # input.
        assert dies(fails) == (False, True)
    finally:
        gc.enable()


# --- checkpoint: save= ----------------------------------------------------------------------------


def test_an_output_changed_in_place_is_computed_again():
    linear, x = nn.Linear(HIDDEN, HIDDEN), inputs(True)

    def function(x):
        return linear(x).add_(1).sin_().exp()

    tensors = [x, *linear.parameters()]
    plain = gradients(lambda: function(x), tensors)
    for save in (*SAVE.values(), torch.ops.aten.sin_.default):
        assert equal(
            gradients(lambda save=save: checkpoint(function, x, save=save), tensors), plain
        )


def test_detach_is_not_kept_because_the_hooks_call_it_too():
    x = inputs(True)

    def function(x):
        return x.sin() * x.exp().detach() * x.cos().detach()

    save = torch.ops.aten.detach.default
    assert equal(
        gradients(lambda: checkpoint(function, x, save=save), [x]),
        gradients(lambda: function(x), [x]),
    )


def test_random_numbers_are_drawn_again_though_they_are_to_be_kept():
    x = inputs(True)

    def function(x):
        noise = torch.rand_like(x)
        return F.dropout(
            (x * noise).sin(), 0.5
        ).exp()  # its mask depends on how far the noise moved the state

    operator = torch.ops.aten.rand_like.default
    assert torch.Tag.nondeterministic_seeded in operator.tags
    plain = gradients(lambda: function(x), [x])
    assert equal(gradients(lambda: checkpoint(function, x, save=[operator]), [x]), plain)
    loss = checkpoint(function, x, save=[operator]).sum()
    assert count_operators(loss.backward, operator) == 1


def test_attention_is_kept_when_it_draws_no_random_numbers():
    block, x = Block(), inputs()
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert torch.Tag.nondeterministic_seeded in operator.tags and operator in MATRIX_PRODUCTS
    loss = checkpoint(block, x, save=MATRIX_PRODUCTS).sum()
    again = count_operators(loss.backward, operator)
    loss = checkpoint(block, x).sum()
    assert (again, count_operators(loss.backward, operator)) == (0, 1)


def test_casts_that_autocast_remembers_are_not_mixed_up():
    """In the second of two calls the weights are cast already; when it is repeated, they are cast
    again.
    """
    block, x = Block(), inputs(True)
    tensors = [x, *block.parameters()]

    def run(call):
        with torch.autocast("cpu", torch.bfloat16):
            return call(block, call(block, x))

    plain = gradients(lambda: run(lambda block, x: block(x)), tensors)
    for save in SAVE.values():
        assert equal(
            gradients(lambda save=save: run(partial(checkpoint, save=save)), tensors), plain
        )


def test_what_a_custom_function_computes_can_be_kept():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            square = x * x
            ctx.save_for_backward(square)
            return square * x

        @staticmethod
        def backward(ctx, gradient):
            return 3 * ctx.saved_tensors[0] * gradient

    x = inputs(True)

    def function(x):
        return Cube.apply(x.sin()).exp()

    plain = gradients(lambda: function(x), [x])
    assert equal(gradients(lambda: checkpoint(function, x, save=SAVE["all"]), [x]), plain)


def test_gradients_taken_inside_the_function_do_not_go_with_save():
    def function(x):
        y = x.sin()
        (slope,) = torch.autograd.grad(y.cos().sum(), y)
        return x.exp() * slope.detach()

    with pytest.raises(RuntimeError, match="With save=, gradients cannot be taken inside"):
        checkpoint(function, inputs(True), save=SAVE["all"])


def test_a_policy_may_have_a_memory():
    """Every second product, as torchtitan does: asked once per operator, in forward."""
    block, x, asked = Block(), inputs(True), []

    def every_second(operator):
        if operator is ADDMM:
            asked.append(operator)
        return operator is ADDMM and len(asked) % 2 == 1

    tensors = [x, *block.parameters()]
    assert equal(
        gradients(lambda: checkpoint(block, x, save=every_second), tensors),
        gradients(lambda: block(x), tensors),
    )
    assert len(asked) == 4


@pytest.mark.parametrize(
    "save",
    [torch.ops.aten.mm, [torch.ops.aten.mm], ["mm"], 3, [torch.mm]],
    ids=["packet", "packets", "name", "3", "torch.mm"],
)
def test_save_refuses_what_is_no_operator(save):
    with pytest.raises(TypeError, match="torch.ops.aten.mm.default"):
        checkpoint(torch.sin, inputs(True), save=save)


# --- checkpoint: functions that cannot be repeated ------------------------------------------------


class Changing:
    """Does something else at its second call."""

    def __init__(self, first, second):
        self.functions = iter([first, second])

    def __call__(self, x):
        return next(self.functions)(x)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (lambda x: x.sin(), r"Saved tensor 1 was \(2, 8, 32\).*now missing"),
        (lambda x: x[:, :4].sin().cos(), r"Saved tensor 0 was \(2, 8, 32\).*now \(2, 4, 32\)"),
        (lambda x: x.double().sin().cos(), "torch.float32 .*now .* torch.float64"),
        (lambda x: x.sin() @ torch.ones(32, 5), r"Saved tensor 1 was \(2, 8, 32\).*now \(32, 5\)"),
    ],
    ids=["fewer", "shape", "dtype", "another function"],
)
def test_a_function_that_changes_is_refused(second, message):
    loss = checkpoint(Changing(lambda x: x.sin().cos(), second), inputs(True)).sum()
    with pytest.raises(RuntimeError, match=message + ".*Both calls must do the same"):
        loss.backward()


def test_a_cache_that_grows_is_refused():
    cache = []

    def function(x):
        cache.append(x)
        return torch.cat(cache, 1).sin()

    loss = checkpoint(function, inputs(True)).sum()
    with pytest.raises(RuntimeError, match="use_cache=False"):
        loss.backward()


def test_an_input_changed_in_between_is_refused():
    linear, x = nn.Linear(HIDDEN, HIDDEN), inputs(True) * 1
    loss = checkpoint(linear, x).square().sum()
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_batch_norm_counts_twice_as_documented():
    norm, x = nn.BatchNorm1d(4), torch.randn(8, 4, requires_grad=True)
    plain = gradients(lambda: copy.deepcopy(norm)(x), [x])
    assert equal(gradients(lambda: checkpoint(norm, x), [x]), plain)
    assert norm.num_batches_tracked == 2


# --- apply_gradient_checkpointing -----------------------------------------------------------------


OPTIONS = {
    "every block": {},
    "every second": {"every": 2},
    "one segment": {"segments": 1},
    "three segments": {"segments": 3},
    "products": {"save": MATRIX_PRODUCTS},
    "segments and products": {"segments": 2, "save": MATRIX_PRODUCTS},
}


def model_and_run(name):
    if name in ("gpt2", "llama"):
        transformers = pytest.importorskip("transformers")
        sizes = {"vocab_size": 50, "bos_token_id": None, "eos_token_id": None}
        if name == "gpt2":
            config = transformers.GPT2Config(
                n_layer=4, n_head=2, n_embd=HIDDEN, n_positions=SEQUENCE, **sizes
            )
            model = transformers.GPT2LMHeadModel(config)
        else:
            layout = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
            config = transformers.LlamaConfig(
                hidden_size=HIDDEN, intermediate_size=48, **layout, **sizes
            )
            model = transformers.LlamaForCausalLM(config)
        tokens = torch.randint(50, (BATCH, SEQUENCE))
        return model.train(), lambda: model(input_ids=tokens, use_cache=False).logits
    if name == "gpt":
        workload = pytest.importorskip("memlab.workloads.gpt")
        model = workload.GPT(workload.tiny(dropout=0.1))
        tokens = torch.randint(256, (BATCH, SEQUENCE))
        return model, lambda: model(tokens)
    if name == "vit":
        workload = pytest.importorskip("memlab.workloads.vit")
        model = workload.ViT(workload.small(layers=4, dropout=0.1))
        size = model.config.image_size
        images = torch.randn(BATCH, model.config.channels, size, size)
        return model, lambda: model(images)
    x = inputs()
    model = (
        nn.Sequential(*(Block(0.1) for _ in range(4))) if name == "sequential" else Tower(4, 0.1)
    )
    return model, lambda: model(x)


MODELS = ["tower", "sequential", "gpt", "vit", "gpt2", "llama"]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_from_outside(name):
    model, run = model_and_run(name)
    parameters = list(model.parameters())
    plain, before = gradients(run, parameters), saved_bytes(run, parameters)
    names, keys = [name for name, _ in model.named_parameters()], list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    blocks = list(model) if name == "sequential" else None
    for options in OPTIONS.values():
        handle = apply_gradient_checkpointing(model, blocks, **options)
        assert equal(gradients(run, parameters), plain), options
        assert saved_bytes(run, parameters) < before, options
        assert [name for name, _ in model.named_parameters()] == names and list(
            model.state_dict()
        ) == keys
        assert [type(module) for module in model.modules()] == classes
        handle.remove()
        handle.remove()
        assert not any("forward" in vars(module) for module in model.modules())
    assert equal(gradients(run, parameters), plain)
    assert saved_bytes(run, parameters) == before


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_hugging_face_records_the_same_hidden_states(name, options):
    model, _ = model_and_run(name)
    model.eval()  # no dropout: two runs compare
    tokens = torch.randint(50, (BATCH, SEQUENCE))
    run = partial(model, input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    plain = run(output_hidden_states=True).hidden_states
    handle = apply_gradient_checkpointing(model, **options)
    assert equal(run(output_hidden_states=True).hidden_states, plain)
    handle.remove()


@pytest.mark.parametrize(("every", "kept"), [(1, 6), (2, 3), (4, 2), (6, 1)])
def test_every_keeps_one_input_for_each_chosen_block(every, kept):
    tower, x = Tower(6), inputs()
    parameters = list(tower.parameters())
    plain = saved_bytes(lambda: tower.blocks[0](x), parameters)  # x among them
    handle = apply_gradient_checkpointing(tower, every=every)
    checkpointed = [i for i, block in enumerate(tower.blocks) if "forward" in vars(block)]
    assert checkpointed == list(range(0, 6, every)) and len(checkpointed) == kept
    assert saved_bytes(lambda: tower(x), parameters) == kept * UNIT + (6 - kept) * plain
    tower(x).sum().backward()
    handle.remove()


@pytest.mark.parametrize(
    ("segments", "lengths"), [(1, [6]), (2, [3, 3]), (4, [1, 2, 1, 2]), (6, [1] * 6)]
)
def test_segments_keep_one_input_each_and_hold_their_blocks_at_once(segments, lengths, tmp_path):
    tower, x = Tower(6), inputs()
    for parameter in tower.parameters():
        parameter.grad = torch.zeros_like(parameter)
    block = saved_bytes(lambda: tower.blocks[0](x), list(tower.parameters()))
    apply_gradient_checkpointing(tower, segments=segments, preserve_rng_state=False)
    assert saved_bytes(lambda: tower(x)) == segments * UNIT
    tower(x).sum().backward()
    assert [block.calls for block in tower.blocks] == [4] + [
        3
    ] * 5  # block 0 was called once more above
    left, peak = allocated_bytes(lambda: tower(x).sum().backward(), tmp_path)
    assert left == 0
    # The longest segment is held whole; the rest is for the inputs and for what is in flight.
    assert max(lengths) * (block - UNIT) < peak < max(lengths) * block + (segments + 12) * UNIT


def test_no_gradients_no_recomputation_the_same_outputs():
    tower, x = Tower(4), inputs()
    plain = tower(x)
    for options in OPTIONS.values():
        handle = apply_gradient_checkpointing(tower, **options)
        for block in tower.blocks:
            block.calls = 0
        with torch.no_grad():
            assert torch.equal(tower(x), plain)
        with torch.inference_mode():
            assert torch.equal(tower.eval()(x), plain)
        tower.train()
        assert [block.calls for block in tower.blocks] == [2] * 4
        handle.remove()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_hooks_of_the_blocks_run_once_with_their_own_inputs_and_outputs(options):
    tower, x, seen = Tower(4), inputs(), []
    for block in tower.blocks:
        block.register_forward_hook(lambda block, args, output: seen.append((args[0], output)))
    tower(x, shift=0.5)
    plain, seen = [tensor for pair in seen for tensor in pair], []
    for block in tower.blocks:
        block._forward_hooks.clear()
        block.register_forward_hook(lambda block, args, output: seen.append((args[0], output)))
    apply_gradient_checkpointing(tower, **options)
    tower(x, shift=0.5).sum().backward()
    assert equal([tensor for pair in seen for tensor in pair], plain)


def test_blocks_that_return_tuples():
    class Pair(Block):
        def forward(self, x, shift=None):
            return super().forward(x, shift), x.detach().mean()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Pair() for _ in range(4))

        def forward(self, x):
            total = 0.0
            for layer in self.layers:
                x, mean = layer(x)
                total = total + mean
            return x + total

    model, x = Model(), inputs(True)
    tensors = [x, *model.parameters()]
    plain = gradients(lambda: model(x), tensors)
    for options in OPTIONS.values():
        handle = apply_gradient_checkpointing(model, **options)
        assert equal(gradients(lambda: model(x), tensors), plain)
        handle.remove()
    apply_gradient_checkpointing(model, segments=1)
    assert saved_bytes(lambda: model(x)) == UNIT  # the first element is passed on


class Chain(nn.Module):
    """Calls its blocks in ways that a segment does not, or only in part, compute as a whole."""

    def __init__(self, how):
        super().__init__()
        self.blocks, self.how = nn.ModuleList(Block(0.1) for _ in range(4)), how

    def forward(self, x):
        one, two, three, four = self.blocks
        if self.how == "as it should be":
            return four(three(two(one(x))))
        if self.how == "other arguments":
            return four(three(two(one(x), shift=0.5), 0.25), shift=x)
        if self.how == "skipped":
            return four(three(one(x)))
        if self.how == "out of order":
            return four(two(three(one(x))))
        if self.how == "twice":
            return three(two(two(one(x))))
        if self.how == "by name":
            return four(x=three(two(one(x))))
        if self.how == "random numbers between":
            x = two(one(x))
            return four(three(x)) if torch.rand(()) < 2 else x
        if self.how == "gradients off between":
            with torch.no_grad():
                x = two(one(x))
            return four(three(x))
        x = two(one(x))
        if self.how == "changed in place":
            return four(three(x.add_(1)))
        return four(three(x + 1))  # something between


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ("as it should be", 1),
        ("other arguments", 1),  # the shift is the input, which is held once
        ("skipped", 1),
        ("out of order", 1),
        ("twice", 1),
        ("random numbers between", 1),
        ("by name", 2),
        ("gradients off between", 1),
        ("changed in place", 2),
        ("something between", 2),
    ],
)
def test_a_segment_ends_where_a_block_gets_something_else(how, kept):
    model, x = Chain(how), inputs(True)
    tensors = [x, *model.blocks[2].parameters()]
    if how == "gradients off between":
        tensors = tensors[1:]
    plain = gradients(lambda: model(x), tensors)
    apply_gradient_checkpointing(model, segments=1)
    assert equal(gradients(lambda: model(x), tensors), plain)
    assert saved_bytes(lambda: model(x)) == kept * UNIT


def test_blocks_that_pass_on_a_second_output_leave_nothing_to_the_garbage_collector(tmp_path):
    class Two(Block):
        def forward(self, x, memory):
            return super().forward(x + memory), memory * 2

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Two() for _ in range(4))

        def forward(self, x):
            memory = x.sin()
            for layer in self.layers:
                x, memory = layer(x, memory)
            return x + memory

    model, x = Model(), inputs()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tensors = list(model.parameters())
    plain = gradients(lambda: model(x), tensors)
    apply_gradient_checkpointing(model, segments=1)
    assert equal(gradients(lambda: model(x), tensors), plain)
    gradients(lambda: model(x), tensors)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert allocated_bytes(lambda: model(x).sum().backward(), tmp_path)[0] == 0
    assert (
        allocated_bytes(lambda: model(x).sum() and None, tmp_path)[0] == 0
    )  # nor without a backward


def test_blocks_that_return_no_tensor_keep_their_inputs():
    class Dictionary(Block):
        def forward(self, batch):
            return {"x": super().forward(batch["x"])}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Dictionary() for _ in range(2))

        def forward(self, x):
            batch = {"x": x}
            for layer in self.layers:
                batch = layer(batch)
            return batch["x"]

    model, x = Model(), inputs(True)
    tensors = [x, *model.parameters()]
    plain = gradients(lambda: model(x), tensors)
    apply_gradient_checkpointing(model, segments=1)
    assert equal(gradients(lambda: model(x), tensors), plain)
    assert saved_bytes(lambda: model(x)) == 2 * UNIT


# --- apply_gradient_checkpointing: which blocks, and coming off again -----------------------------


class Mixture(nn.Module):
    """Two lists on the outside, the shorter first; a longer list of experts within each block."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.mixed = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()] * 5)
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))


def checkpointed(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_blocks_are_found_or_named():
    model = Mixture()
    layers = ["layers.0", "layers.1", "layers.2"]
    for blocks, names in (
        (None, layers),
        (Mixture.Layer, layers),
        (model.layers, layers),
        ([model.layers[2], model.heads[0]], ["heads.0", "layers.2"]),
        (iter([model.layers[1]] * 2), ["layers.1"]),
    ):
        handle = apply_gradient_checkpointing(model, blocks)
        assert checkpointed(model) == names
        handle.remove()
    assert checkpointed(model) == []


@pytest.mark.parametrize(
    ("blocks", "options", "message"),
    [
        ([], {}, "No blocks found in Mixture: pass blocks="),
        (nn.Conv2d, {}, "No blocks found in Mixture: pass blocks="),
        ([nn.Linear(2, 2)], {}, "No blocks found in Mixture: pass blocks="),
        (["layers.0"], {}, "No blocks found in Mixture: pass blocks="),
        (None, {"every": 0}, "every must be an int from 1 to 3, but it is 0"),
        (None, {"every": 4}, "from 1 to 3"),
        (None, {"every": 2.0}, "every must be an int"),
        (None, {"segments": 0}, "segments must be an int from 1 to 3, but it is 0"),
        (None, {"segments": 4}, "from 1 to 3"),
        (None, {"segments": 2.0}, "segments must be an int"),
        (None, {"segments": 2, "every": 2}, "not both"),
    ],
)
def test_wrong_blocks_and_counts_are_refused(blocks, options, message):
    model = Mixture()
    with pytest.raises(ValueError, match=message):
        apply_gradient_checkpointing(model, blocks, **options)
    assert checkpointed(model) == []


def test_a_model_without_a_list_of_blocks_says_what_to_pass():
    with pytest.raises(ValueError, match="No blocks found in Sequential: pass blocks="):
        apply_gradient_checkpointing(nn.Sequential(Block(), nn.ReLU()))
    with pytest.raises(TypeError, match="save must be operators"):
        apply_gradient_checkpointing(Tower(), save=["mm"])


def test_the_blocks_of_a_sequential_are_found_and_a_container_can_be_named():
    for blocks in (lambda model: None, lambda model: model[1], lambda model: list(model[1])):
        model = nn.Sequential(nn.ReLU(), nn.Sequential(Block(), Block(), Block()))
        apply_gradient_checkpointing(model, blocks(model))
        assert checkpointed(model) == ["1.0", "1.1", "1.2"]


def test_applying_twice_is_refused_and_changes_nothing():
    tower = Tower(4)
    handle = apply_gradient_checkpointing(tower, every=2)
    with pytest.raises(ValueError, match="already: remove"):
        apply_gradient_checkpointing(tower)
    assert checkpointed(tower) == ["blocks.0", "blocks.2"]
    apply_gradient_checkpointing(tower, [tower.blocks[1]])  # another block is no second time
    handle.remove()
    apply_gradient_checkpointing(tower, [tower.blocks[0]])


def test_copies_are_refused_before_remove_and_work_after():
    tower, x = Tower(2), inputs()
    handle = apply_gradient_checkpointing(tower)
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="remove\\(\\) it before copying or pickling"):
            duplicate(tower)
    handle.remove()
    tower.wrap = None
    for twin in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        assert torch.equal(twin(x), tower(x))


def test_a_forward_that_somebody_wrapped_before_is_kept_and_after_is_respected():
    tower, x = Tower(1), inputs(True)
    block = tower.blocks[0]
    original = block.forward
    block.forward = doubled = lambda x: 2 * original(x)
    plain = gradients(lambda: tower(x), [x, *tower.parameters()])
    handle = apply_gradient_checkpointing(tower)
    assert equal(gradients(lambda: tower(x), [x, *tower.parameters()]), plain)
    checkpointed_forward, block.forward = block.forward, doubled
    with pytest.raises(RuntimeError, match="undo that first"):
        handle.remove()
    block.forward = checkpointed_forward
    handle.remove()
    assert block.forward is doubled


def test_the_signature_of_forward_stays():
    tower = Tower(1)
    before = inspect.signature(tower.blocks[0].forward)
    apply_gradient_checkpointing(tower)
    assert inspect.signature(tower.blocks[0].forward) == before


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_deleted_model_is_freed_at_once_but_not_before_its_backward(options):
    gc.collect()
    gc.disable()
    try:
        tower, x = Tower(4), inputs(True)
        ghost = weakref.ref(tower.blocks[3])
        handle = apply_gradient_checkpointing(tower, **options)
        loss = tower(x).sum()
        del tower
        loss.backward()  # the graph holds what it needs
        assert x.grad.any()
        del loss
        assert ghost() is None  # though the handle is still there
        handle.remove()
    finally:
        gc.enable()


# --- On a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("save", SAVE.values(), ids=SAVE)
def test_random_state_and_autocast_on_a_gpu(save):
    """Fused attention draws its own dropout mask there, which a kept output must not
    leave undrawn.
    """

    def block(x, weight):
        query = (x @ weight).view(2, 64, 4, 16).transpose(1, 2)
        y = F.scaled_dot_product_attention(query, query, query, dropout_p=0.2, is_causal=True)
        return F.dropout(y.transpose(1, 2).reshape(2, 64, 64) @ weight, 0.2).exp()

    x = torch.randn(2, 64, 64, device="cuda", requires_grad=True)
    weight = (torch.randn(64, 64, device="cuda") / 8).requires_grad_()

    def run(call):
        with torch.autocast("cuda", torch.float16):
            return call(block, x, weight)

    plain = gradients(lambda: run(lambda function, *args: function(*args)), [x, weight])
    assert equal(gradients(lambda: run(partial(checkpoint, save=save)), [x, weight]), plain)


@pytest.mark.gpu
def test_a_step_allocates_no_more_than_with_torch_on_a_gpu():
    tower, x = Tower(4).cuda(), inputs().cuda()

    def peak(call):
        torch.cuda.reset_peak_memory_stats()
        y = x
        for block in tower.blocks:
            y = call(block, y)
        y.sum().backward()
        return torch.cuda.max_memory_allocated()

    peak(checkpoint)
    assert peak(checkpoint) <= peak(partial(torch_checkpoint.checkpoint, use_reentrant=False))
