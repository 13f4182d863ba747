"""Offloading: the same gradients and weights, the bytes that the formula says, and nothing left
behind.
"""

import contextlib
import copy
import gc
import os
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from memlab import measure
from memlab.techniques import offloading
from memlab.techniques.gradient_checkpointing import apply_gradient_checkpointing
from memlab.techniques.offloading import (
    far_like,
    far_zeros,
    offload_activations,
    offload_optimizer_state,
    stream_parameters,
)
from memlab.workloads import gpt, vit
from tests.helpers import equal, is_far, small_llama

SMALL = gpt.GPTConfig(vocabulary_size=64, context_length=32, layers=3, heads=2, hidden=32)
TOKENS, HIDDEN = 4 * 32, 32
U = 4 * TOKENS * HIDDEN  # bytes of a hidden state


def a_gpt(device="cpu", **changes):
    torch.manual_seed(0)
    config = gpt.GPTConfig(**{**vars(SMALL), **changes})
    model, batch = gpt.GPT(config).to(device), torch.randint(64, (2, 4, 32), device=device)
    return model, list(model.blocks), lambda: model(batch[0], batch[1])


def a_vit(device="cpu"):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "channels": 1, "classes": 10}
    model = vit.ViT(vit.ViTConfig(**sizes, layers=2, heads=2, hidden=32)).to(device)
    images, labels = (
        torch.randn(4, 1, 16, 16, device=device),
        torch.randint(10, (4,), device=device),
    )
    return model, list(model.blocks), lambda: model(images, labels)


def a_llama(device="cpu"):
    model = small_llama(vocab_size=64, use_cache=False, tie_word_embeddings=False).to(device)
    tokens = torch.randint(64, (2, 16), device=device)
    return model, list(model.model.layers), lambda: model(input_ids=tokens, labels=tokens).loss


MODELS = pytest.mark.parametrize("make", [a_gpt, a_vit, a_llama])


def gradients(model, run, context=None):
    model.zero_grad()
    with context or contextlib.nullcontext():
        loss = run()
    loss.backward()
    return [parameter.grad.detach().cpu().clone() for parameter in model.parameters()]


# --- The far side ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_far_tensor_is_a_file_without_a_name_in_the_folder_that_was_given(dtype, tmp_path):
    tensor = torch.arange(60).reshape(3, 20).to(dtype).t()
    far = far_like(tensor, tmp_path)
    assert (far.shape, far.stride(), far.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
    assert far.untyped_storage().nbytes() == tensor.nbytes
    assert os.path.dirname(far.untyped_storage().filename) == str(tmp_path)
    assert os.listdir(tmp_path) == []
    assert torch.equal(far.copy_(tensor), tensor)


def test_far_tensors_of_no_or_one_number():
    assert far_like(torch.empty(0, 3)).shape == (0, 3)
    assert far_like(torch.tensor(2.0)).fill_(3).item() == 3


def test_whose_far_side_is_meant_can_be_said_for_a_tensor_without_memory(tmp_path):
    like = torch.empty(3, 20, dtype=torch.bfloat16, device="meta").t()
    far = far_like(like, tmp_path, device="cpu")
    assert (far.shape, far.stride(), far.dtype) == (like.shape, like.stride(), like.dtype)
    assert os.path.dirname(far.untyped_storage().filename) == str(tmp_path)
    assert is_far(far_like(torch.empty(2), device=torch.device("cpu")))
    for device in ("meta", torch.device("mps")):
        with pytest.raises(ValueError, match=f"CPU and CUDA tensors: this one is on {device}"):
            far_like(torch.empty(2), device=device)


@pytest.mark.parametrize("size", [(3, 4), ((3, 4),), (torch.Size([3, 4]),), (5,), (0,), ((),)])
@pytest.mark.parametrize("dtype", [None, torch.uint8])
def test_far_zeros_are_zeros_on_the_far_side(size, dtype, tmp_path):
    far, near = far_zeros(*size, dtype=dtype, directory=tmp_path), torch.zeros(*size, dtype=dtype)
    assert torch.equal(far, near) and far.dtype == near.dtype and is_far(far)
    assert os.path.dirname(far.untyped_storage().filename) == str(tmp_path)
    assert is_far(far_zeros(*size, device="cpu"))


def test_far_zeros_follow_the_default_type_and_device(monkeypatch):
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("meta"))
    with pytest.raises(ValueError, match="this one is on meta"):
        far_zeros(2)
    with torch.device("meta"):
        assert torch.equal(far_zeros(2, device="cpu").cpu(), torch.zeros(2, device="cpu"))
        assert is_far(far_like(torch.empty(2, device="cpu")))
    torch.set_default_dtype(torch.float64)
    try:
        assert far_zeros(2, device="cpu").dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_far_tensor_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="CPU and CUDA tensors: this one is on meta"):
        far_like(torch.empty(2, device="meta"))
    with pytest.raises(FileNotFoundError):
        far_like(torch.empty(2), tmp_path / "nowhere")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No room for a file of 8 bytes: pass another directory="):
        far_like(torch.empty(2), tmp_path)
    assert os.listdir(tmp_path) == []


# --- Activations: the same numbers ----------------------------------------------------------------


@MODELS
@pytest.mark.parametrize("min_bytes", [0, 4096])
def test_gradients_are_equal_on_real_models(make, min_bytes):
    model, _, run = make()
    expected = gradients(model, run)
    offload = offload_activations(model, min_bytes=min_bytes)
    assert equal(gradients(model, run, offload), expected)
    assert offload.moved_bytes > 0
    assert equal(gradients(model, run, offload), expected)  # on rooms that were used before


def test_gradients_are_equal_with_dropout():
    model, _, run = a_gpt(dropout=0.2)
    torch.manual_seed(1)
    expected = gradients(model, run)
    torch.manual_seed(1)
    assert equal(gradients(model, run, offload_activations(model, min_bytes=0)), expected)


@MODELS
@pytest.mark.parametrize("library", ["ours", "torch"])
def test_gradients_are_equal_under_checkpointing_and_only_the_inputs_move(make, library):
    model, blocks, run = make()
    expected = gradients(model, run)
    everything = offload_activations(model, min_bytes=0)
    gradients(model, run, everything)
    if library == "ours":
        apply_gradient_checkpointing(model, blocks)
    else:
        for block in blocks:
            forward = block.forward
            block.forward = lambda *args, _forward=forward, **kwargs: torch_checkpoint(
                _forward, *args, use_reentrant=False, **kwargs
            )
    inputs = offload_activations(model, min_bytes=0)
    assert equal(gradients(model, run, inputs), expected)
    assert 0 < inputs.moved_bytes < 0.6 * everything.moved_bytes


def test_second_derivatives_and_a_second_backward_are_right():
    x = torch.randn(5, requires_grad=True)
    with offload_activations(min_bytes=0):
        y = (x.exp() * x).sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, retain_graph=True)
    assert torch.allclose(second, x.exp() * (2 + x))
    (again,) = torch.autograd.grad(y, x)
    assert torch.equal(again, first)


def test_what_is_no_plain_tensor_stays_as_it_is():
    weight = torch.eye(4).to_sparse().requires_grad_()
    x = torch.randn(4, 3, requires_grad=True)
    z = torch.randn(4, dtype=torch.complex64, requires_grad=True)

    def run():
        weight.grad = x.grad = z.grad = None
        (torch.sparse.mm(weight, x).sum() + (z.conj() * z.conj()).abs().sum()).backward()
        return x.grad, z.grad

    expected = run()
    with offload_activations(min_bytes=0):
        assert equal(run(), expected)


# --- Activations: the bytes -----------------------------------------------------------------------


def test_the_bytes_that_move_are_the_hand_count():
    """A block saves 16 hidden states in 8 storages; the norms' statistics and the softmax's
    denominators are smaller than a hidden state. After the blocks come the last norm's two and the
    log-softmax."""
    model, _, run = a_gpt()
    offload = offload_activations(model, min_bytes=U)
    gradients(model, run, offload)
    assert offload.moved_bytes == 3 * 16 * U + 2 * U + 4 * TOKENS * 64
    # All of them: statistics (16 bytes a token and block, 8 in the end) and denominators; the
    # token's indices and the targets are the batch, which moves unless it is named, and the
    # positions' indices; the loss's weight.
    more = offload_activations(model, min_bytes=0)
    gradients(model, run, more)
    statistics = 3 * (16 + 4 * 2) * TOKENS + 8 * TOKENS
    batch = 2 * 4 * 32 * 8
    assert more.moved_bytes == offload.moved_bytes + statistics + batch + 8 * 32 + 4


def test_a_storage_moves_once_and_is_near_once_at_a_time():
    x = torch.randn(1000, requires_grad=True)
    near = []

    def look(tensor):
        near.append(tensor.untyped_storage().data_ptr())
        return tensor

    with offload_activations(min_bytes=4000) as offload:
        a, b = (x * 2).split(500)
        y = (a * b).sum() + (a * a).sum() + (b.exp() * b).sum()
    # a and b are one storage; b.exp() is another, of 2,000 bytes, and stays.
    assert offload.moved_bytes == 4000
    saved = y.grad_fn.next_functions[0][0].next_functions[0][0].next_functions[0][0]
    one, other = saved._saved_self, saved._saved_other
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    y.backward()
    assert torch.allclose(x.grad[:500], 2 * (b + 2 * a).detach())


def test_nothing_is_near_between_two_backward_passes():
    model, _, run = a_gpt()
    offload = offload_activations(model, min_bytes=U)
    with offload:
        loss = run()
    loss.backward(retain_graph=True)
    moved, near = offload._last(), []
    while moved is not None:
        near.append(moved.near())
        moved = moved.before()
    assert near == [None] * (3 * 8 + 3)


def test_the_model_and_what_is_named_stay_near():
    linear, x = nn.Linear(64, 64), torch.randn(32, 64)
    with offload_activations(linear, x, min_bytes=0) as offload:
        y = linear(linear(x))
    assert offload.moved_bytes == 32 * 64 * 4  # between the two calls
    with offload_activations(min_bytes=0) as offload:
        linear(linear(x))
    assert offload.moved_bytes == 2 * 32 * 64 * 4 + 64 * 64 * 4
    y.sum().backward()


def test_the_peak_is_thirteen_hidden_states_and_the_model():
    """`measure` counts near bytes only. The formula is notebook 08's."""
    h, layers, tokens = 64, 4, 8 * 64
    config = gpt.tiny()
    u, p, v = 4 * tokens * h, config.parameter_count, config.vocabulary_size

    def build(far):
        def build_run():
            torch.manual_seed(0)
            model = gpt.GPT(config)
            optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
            batch = torch.randint(v, (2, 8, 64))
            offload = offload_activations(model, min_bytes=u) if far else contextlib.nullcontext()

            def step():
                with offload:
                    loss = model(batch[0], batch[1])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                return loss

            return step

        return build_run

    plain, offloaded = measure(build(False)), measure(build(True))
    state = 12 * p + 4 * (12 * layers + 4) + 2 * 8 * tokens + 8 * 64 + 8
    statistics = (16 + 4 * config.heads) * tokens
    in_the_first_block = 4 * (p - 64 * h - 8 * h * h - 12 * h) + 13 * u + statistics
    when_backward_begins = 3 * 4 * tokens * v + layers * statistics
    assert offloaded.known_bytes == state + max(in_the_first_block, when_backward_begins)
    assert offloaded.outside_bytes == layers * 16 * u + 2 * u + 4 * tokens * v
    assert offloaded.losses == plain.losses
    assert offloaded.known_bytes < 0.6 * plain.known_bytes


# --- Activations: nothing left behind, nothing wrong ----------------------------------------------


def test_the_room_on_the_far_side_is_used_again():
    model, _, run = a_gpt()
    offload = offload_activations(model, min_bytes=U)
    gradients(model, run, offload)
    room = sorted(far.data_ptr() for free in offload._room.values() for far in free)
    assert len(room) == 3 * 8 + 3
    gradients(model, run, offload)
    assert sorted(far.data_ptr() for free in offload._room.values() for far in free) == room


def test_a_loss_that_is_dropped_gives_its_room_back_and_all_is_gone_with_the_context(tmp_path):
    model, _, run = a_gpt()
    offload = offload_activations(model, min_bytes=U, directory=tmp_path)
    with offload:
        loss = run()
    assert not any(offload._room.values())
    del loss
    assert sum(map(len, offload._room.values())) == 3 * 8 + 3
    file = weakref.ref(next(free[0] for free in offload._room.values() if free).untyped_storage())
    del offload
    gc.collect()  # the hooks are methods of their context
    assert file() is None and os.listdir(tmp_path) == []


def test_after_an_exception_hooks_and_files_are_gone(tmp_path):
    model, blocks, run = a_gpt()
    expected = gradients(model, run)
    offload = offload_activations(model, min_bytes=0, directory=tmp_path)

    def stop(*_):
        raise KeyboardInterrupt

    handle = blocks[2].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt), offload:
        run()
    handle.remove()
    gc.collect()
    assert os.listdir(tmp_path) == []
    moved = offload.moved_bytes
    gradients(model, run)
    assert offload.moved_bytes == moved  # these hooks are off
    assert equal(gradients(model, run, offload), expected)


def test_a_model_is_not_kept_alive():
    model, _, run = a_gpt()
    ghost, offload = weakref.ref(model), offload_activations(model)
    gradients(model, run, offload)
    del model, run
    gc.collect()
    assert ghost() is None


@pytest.mark.parametrize("stays", [True, False])
def test_a_change_in_place_is_refused_where_the_value_is_lost_and_harmless_where_it_is_not(stays):
    x = torch.randn(8, requires_grad=True)
    with offload_activations(min_bytes=33 if stays else 0):
        y = x.exp()
    y.add_(1)
    if stays:
        with pytest.raises(RuntimeError, match="saved tensor of 32 bytes was changed in place"):
            y.sum().backward()
    else:
        y.sum().backward()
        assert torch.equal(x.grad, x.detach().exp())


def test_a_tensor_saved_before_and_after_a_change_moves_twice():
    x = torch.randn(8, requires_grad=True)
    with offload_activations(min_bytes=0) as offload:
        y = x * 1
        a = y.square()
        y.add_(1)
        b = y.square()
    (a + b).sum().backward()
    assert torch.allclose(x.grad, 2 * x.detach() + 2 * (x.detach() + 1))
    assert offload.moved_bytes == 2 * 32


def test_optimizers_that_step_before_backward_are_refused():
    model, _, run = a_gpt()
    with offload_activations(model):
        loss = run()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    with pytest.raises(RuntimeError, match="step the optimizer after backward"):
        loss.backward()


@pytest.mark.parametrize(
    ("stays", "options", "error", "message"),
    [
        (("model",), {}, TypeError, "must be models and tensors"),
        ((), {"min_bytes": -1}, ValueError, "must be 0 or more, but they are -1 and 2"),
        ((), {"min_bytes": 0.5}, ValueError, "must be 0 or more"),
        ((), {"ahead": -1}, ValueError, "but they are 1048576 and -1"),
    ],
)
def test_wrong_arguments_are_refused(stays, options, error, message):
    with pytest.raises(error, match=message):
        offload_activations(*stays, **options)


# --- Optimizer state ------------------------------------------------------------------------------

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
}


def train(model, run, optimizer, steps=3, context=None):
    for _ in range(steps):
        with context or contextlib.nullcontext():
            loss = run()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().cpu().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weights_are_those_of_a_plain_optimizer(kind):
    model, _, run = a_gpt()
    expected = train(model, run, OPTIMIZERS[kind](model.parameters()))
    model, _, run = a_gpt()
    optimizer = OPTIMIZERS[kind](model.parameters())
    offload_optimizer_state(optimizer, min_bytes=512)
    assert equal(train(model, run, optimizer), expected)
    large = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.nbytes >= 512
    ]
    assert large and all(map(is_far, large))
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["params"] == list(model.parameters())


@pytest.mark.filterwarnings("error")
def test_groups_keep_their_rates_and_schedulers_work_applied_before_or_after():
    def run_with(order):
        model, blocks, run = a_gpt()
        inner = {id(p) for block in blocks for p in block.parameters()}
        others = [p for p in model.parameters() if id(p) not in inner]
        groups = [
            {"params": list(model.blocks.parameters()), "lr": 1e-2},
            {"params": others, "lr": 1e-3},
        ]
        optimizer = torch.optim.AdamW(groups)
        for what in order:
            if what == "scheduler":
                scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            else:
                offload_optimizer_state(optimizer, min_bytes=0)
        for _ in range(2):
            weights = train(model, run, optimizer, steps=1)
            scheduler.step()
        return weights

    expected = run_with(["scheduler"])
    assert equal(run_with(["scheduler", "offload"]), expected)
    assert equal(run_with(["offload", "scheduler"]), expected)


def test_only_one_parameters_state_is_near_during_a_step():
    model, _, run = a_gpt()
    optimizer, most, steps = torch.optim.AdamW(model.parameters()), [], []
    offload_optimizer_state(optimizer, min_bytes=512)

    def count(optimizer, args, kwargs):
        values = [value for state in optimizer.state.values() for value in state.values()]
        near = [value.nbytes for value in values if value.nbytes >= 512 and not is_far(value)]
        most.append(sum(near))
        steps.append(optimizer.param_groups[0]["params"])

    handle = optimizer.register_step_post_hook(count)
    train(model, run, optimizer, steps=2)
    handle.remove()
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert max(most) == 2 * largest
    assert len(steps) == 2 * len(list(model.parameters())) and {len(one) for one in steps} == {1}


def test_a_checkpoint_file_can_be_written_and_loaded(tmp_path):
    model, _, run = a_gpt()
    optimizer = torch.optim.AdamW(model.parameters())
    offload_optimizer_state(optimizer, min_bytes=512)
    train(model, run, optimizer, steps=2)
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "file.pt"
    )
    expected = train(model, run, optimizer, steps=2)
    model, _, run = a_gpt()
    optimizer = torch.optim.AdamW(model.parameters())
    offload_optimizer_state(optimizer, min_bytes=512)
    saved = torch.load(tmp_path / "file.pt")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert equal(train(model, run, optimizer, steps=2), expected)
    state = optimizer.state[model.token_embedding.weight]
    assert is_far(state["exp_avg"]) and not is_far(state["step"])


def test_a_step_takes_a_closure_and_survives_an_exception():
    model, _, run = a_gpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    offload_optimizer_state(optimizer, min_bytes=0)

    def closure():
        optimizer.zero_grad()
        loss = run()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first
    seen = []

    def stop(optimizer, args, kwargs):
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt

    handle = optimizer.register_step_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    handle.remove()
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert all(is_far(state["momentum_buffer"]) for state in optimizer.state.values())


@pytest.mark.parametrize("with_scheduler", [False, True])
def test_removed_all_state_is_near_again_and_the_step_is_the_plain_one(with_scheduler):
    def run_with(offload):
        model, _, run = a_gpt()
        optimizer = torch.optim.AdamW(model.parameters())
        if offload:
            handle = offload_optimizer_state(optimizer, min_bytes=0)
        if with_scheduler:
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        train(model, run, optimizer, steps=1)
        if offload:
            handle.remove()
            handle.remove()
            state = [value for values in optimizer.state.values() for value in values.values()]
            assert not any(map(is_far, state))
            assert ("step" in vars(optimizer)) == with_scheduler
        weights = train(model, run, optimizer, steps=1)
        if offload:
            offload_optimizer_state(optimizer)  # once more, it is not refused
        return weights

    assert equal(run_with(offload=True), run_with(offload=False))


def test_an_optimizer_is_not_kept_alive():
    model, _, run = a_gpt()
    optimizer = torch.optim.AdamW(model.parameters())
    offload_optimizer_state(optimizer)
    train(model, run, optimizer, steps=1)
    ghost = weakref.ref(optimizer)
    del optimizer
    assert ghost() is None


def test_wrong_optimizers_are_refused():
    parameters = [nn.Parameter(torch.zeros(3))]
    with pytest.raises(TypeError, match="must be a torch.optim.Optimizer, but it is"):
        offload_optimizer_state(parameters)
    with pytest.raises(ValueError, match="LBFGS updates all parameters at once"):
        offload_optimizer_state(torch.optim.LBFGS(parameters))
    optimizer = torch.optim.AdamW(parameters)
    offload_optimizer_state(optimizer)
    with pytest.raises(ValueError, match="offloaded already: remove"):
        offload_optimizer_state(optimizer)


# --- Parameters -----------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize("saved_by", ["offload", "checkpoint", "autograd"])
def test_streamed_models_train_to_the_same_weights(make, saved_by):
    model, blocks, run = make()
    expected = train(model, run, torch.optim.AdamW(model.parameters()))
    model, blocks, run = make()
    names, objects = list(model.state_dict()), list(model.parameters())
    stream_parameters(blocks, min_bytes=1024)
    assert list(model.state_dict()) == names and all(
        one is other for one, other in zip(model.parameters(), objects, strict=True)
    )
    if saved_by == "checkpoint":
        apply_gradient_checkpointing(model, blocks)
    context = offload_activations(model) if saved_by == "offload" else None
    optimizer = torch.optim.AdamW(model.parameters())
    offload_optimizer_state(optimizer, min_bytes=0)
    assert equal(train(model, run, optimizer, context=context), expected)
    with torch.no_grad():
        assert torch.isfinite(run())


@MODELS
@pytest.mark.parametrize("device", ["cpu", None])
def test_parameters_that_are_far_already_stay_where_they_are(make, device, tmp_path):
    model, blocks, run = make()
    expected = train(model, run, torch.optim.AdamW(model.parameters()))
    model, blocks, run = make()
    for parameter in model.parameters():  # also those outside the blocks
        parameter.data = far_like(parameter, tmp_path).copy_(parameter.detach())
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    stream_parameters(blocks, min_bytes=1024, device=device)
    weights = train(
        model, run, torch.optim.AdamW(model.parameters()), context=offload_activations(model)
    )
    assert equal(weights, expected)
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    run().backward()
    streamed = [p for block in blocks for p in block.parameters() if p.nbytes >= 1024]
    assert streamed and all(is_far(parameter.grad) for parameter in streamed)


def test_matrices_and_their_gradients_are_far_and_small_ones_near():
    model, blocks, run = a_gpt()
    stream_parameters(blocks, min_bytes=4 * 32 * 32)
    with offload_activations(model) as offload:
        loss = run()
    loss.backward()
    loss = run()  # gradients add up where they are
    loss.backward()
    for parameter in blocks[0].parameters():
        assert is_far(parameter) == is_far(parameter.grad) == (parameter.ndim == 2)
    assert not is_far(model.token_embedding.weight.grad)
    assert (
        offload.moved_bytes == 0
    )  # no activation is of a MiB, and what is saved of weights is far already


def test_frozen_blocks_with_adapters_in_them_train_to_the_same_weights():
    """The base of a LoRA: most of its parameters get no gradient."""

    def run_with(stream):
        model, blocks, run = a_gpt()
        model.requires_grad_(False)
        for block in blocks:
            block.mlp.requires_grad_(True)
        if stream:
            stream_parameters(blocks, min_bytes=1024)
            apply_gradient_checkpointing(model)
            assert is_far(blocks[0].attention.query_key_value.weight)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        train(model, run, optimizer)
        return model.state_dict().values()

    assert equal(run_with(True), run_with(False))


def test_without_room_for_all_blocks_none_is_far_and_the_next_try_works(monkeypatch):
    model, blocks, run = a_gpt()
    make = offloading.far_like
    rooms = iter([make] * 5)
    with monkeypatch.context() as context:
        context.setattr(offloading, "far_like", lambda *args, **kwargs: next(rooms, no_room)(*args))
        with pytest.raises(OSError, match="No room"):
            stream_parameters(blocks, min_bytes=1024)
    assert not any(map(is_far, model.parameters()))
    assert not any("forward" in vars(block) for block in blocks)
    stream_parameters(blocks, min_bytes=1024)
    run().backward()


def no_room(*_):
    raise OSError("No room")


@pytest.mark.parametrize("way", ["offload", "checkpoint"])
def test_no_near_copy_waits_for_backward(way):
    model, blocks, run = a_gpt()
    stream_parameters(blocks, min_bytes=4 * 32 * 32)
    copies = []

    def look(module, inputs):
        copies.append(weakref.ref(vars(module)["weight"].untyped_storage()))

    for block in blocks:
        block.mlp.expansion.register_forward_pre_hook(look)
    if way == "checkpoint":
        apply_gradient_checkpointing(model)
    with offload_activations(model) if way == "offload" else contextlib.nullcontext():
        loss = run()
    assert len(copies) == 3 and all(copy() is None for copy in copies)
    assert "weight" not in vars(blocks[0].mlp.expansion)
    loss.backward()
    assert all(copy() is None for copy in copies)
    loss = run()  # with neither, autograd holds them
    assert (way == "checkpoint") == all(copy() is None for copy in copies[-3:])
    loss.backward()


def test_a_streamed_parameter_that_changes_before_backward_is_refused():
    model, blocks, run = a_gpt()
    stream_parameters(blocks, min_bytes=1024)
    with offload_activations(model):
        loss = run()
    with torch.no_grad():
        blocks[1].mlp.projection.weight.mul_(2)
    with pytest.raises(RuntimeError, match="was changed in place"):
        loss.backward()


def test_after_an_exception_in_a_streamed_block_its_parameters_are_its_own_again():
    model, blocks, run = a_gpt()
    stream_parameters(blocks, min_bytes=1024)

    def stop(*_):
        raise KeyboardInterrupt

    handle = blocks[1].mlp.projection.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run()
    handle.remove()
    assert (
        blocks[1].mlp.projection.weight
        is dict(model.named_parameters())["blocks.1.mlp.projection.weight"]
    )
    run().backward()


def test_removed_parameters_and_gradients_are_near_again_and_train_to_the_same_weights():
    def run_with(stream):
        model, blocks, run = a_gpt()
        optimizer = torch.optim.AdamW(model.parameters())
        handle = stream_parameters(blocks, min_bytes=1024) if stream else None
        train(model, run, optimizer, steps=1)
        run().backward()
        if stream:
            assert any(map(is_far, model.parameters()))
            handle.remove()
            handle.remove()
        optimizer.step()
        assert not any(is_far(p) or is_far(p.grad) for p in model.parameters())
        return train(model, run, optimizer, steps=1)

    assert equal(run_with(stream=True), run_with(stream=False))


def test_when_one_block_cannot_be_streamed_none_is():
    model, blocks, run = a_gpt()
    with pytest.raises(ValueError, match="Linear has no parameter of 1,024 bytes or more"):
        stream_parameters([*blocks, nn.Linear(1, 1)], min_bytes=1024)
    assert not any(map(is_far, model.parameters()))
    assert not any("forward" in vars(block) for block in blocks)


def test_streamed_blocks_are_freed_and_not_copied():
    model, blocks, run = a_gpt()
    stream_parameters(blocks, min_bytes=1024)
    run().backward()
    with pytest.raises(TypeError, match="cannot be copied or pickled: use its state_dict"):
        copy.deepcopy(model)
    ghosts = [weakref.ref(block.mlp.projection.weight) for block in blocks]
    del model, blocks, run
    assert [ghost() for ghost in ghosts] == [None] * 3


def test_what_cannot_be_streamed_is_refused():
    model, blocks, run = a_gpt()
    with pytest.raises(ValueError, match="Block has no parameter of 1,000,000 bytes or more"):
        stream_parameters(blocks, min_bytes=1_000_000)
    gradients(model, run)
    with pytest.raises(ValueError, match="before there are gradients"):
        stream_parameters(blocks, min_bytes=0)
    model.zero_grad()
    handle = apply_gradient_checkpointing(model)
    with pytest.raises(ValueError, match="before checkpointing"):
        stream_parameters(blocks, min_bytes=0)
    handle.remove()
    stream_parameters(blocks, min_bytes=0)
    with pytest.raises(ValueError, match="Stream parameters once"):
        stream_parameters(blocks, min_bytes=0)


# --- On a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@MODELS
@pytest.mark.parametrize("ahead", [0, 2])
def test_everything_far_trains_to_the_same_weights_on_a_gpu(make, ahead):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        model, blocks, run = make("cuda")
        expected = train(model, run, torch.optim.AdamW(model.parameters(), foreach=False))
        model, blocks, run = make("cuda")
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        offload_optimizer_state(optimizer, min_bytes=0)
        context = offload_activations(model, min_bytes=0, ahead=ahead)
        weights = train(model, run, optimizer, context=context)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights, expected, strict=True))
        assert context._leaving == type(context._leaving)() and context.moved_bytes > 0
        # Adam's first steps are the gradients' signs, and where a gradient is next to nothing, the
        # host and the GPU do not agree on that. SGD steps as the gradients are.
        model, blocks, run = make("cuda")
        expected = train(model, run, torch.optim.SGD(model.parameters(), lr=0.1))
        model, blocks, run = make("cuda")
        stream_parameters(blocks, min_bytes=1024)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        weights = train(model, run, optimizer, context=offload_activations(model, min_bytes=0))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(weights, expected, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
def test_the_peak_on_a_gpu_falls_and_copies_run_on_their_own_stream():
    def peak(context):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with context:
            x = torch.randn(1024, 1024, device="cuda", requires_grad=True)
            y = x
            for _ in range(16):
                y = F.gelu(y)
        y.sum().backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, x.grad

    torch.manual_seed(0)
    plain, expected = peak(contextlib.nullcontext())
    torch.manual_seed(0)
    offloaded, gradient = peak(offload_activations(ahead=2))
    assert torch.equal(gradient, expected)
    assert plain >= 17 * 2**22 and offloaded <= 9 * 2**22


@pytest.mark.gpu
def test_a_change_beside_the_copy_is_refused_on_a_gpu():
    x = torch.randn(1024, 1024, device="cuda", requires_grad=True)
    with offload_activations(ahead=2):
        y = x.exp()
        y.add_(1)
    with pytest.raises(RuntimeError, match="was changed in place"):
        y.sum().backward()


@pytest.mark.gpu
def test_the_gradient_of_a_streamed_parameter_comes_to_pinned_memory():
    block = nn.Sequential(nn.Linear(256, 256, device="cuda"), nn.GELU())
    x = torch.randn(8, 256, device="cuda")
    block(x).square().mean().backward()
    expected = block[0].weight.grad.cpu()
    block.zero_grad()
    stream_parameters([block])
    block(x).square().mean().backward()
    assert block[0].weight.is_pinned() and block[0].weight.grad.is_pinned()
    assert block[0].bias.grad.is_cuda  # small: it has stayed
    assert torch.equal(block[0].weight.grad, expected)
