"""Gradient accumulation: the large batch's gradients, the optimizer in backward against the
ordinary one bit for bit, and layer-major micro-batches, which let them compose; the bytes of each,
and what must be refused."""

import gc
import itertools
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memlab import measure
from memlab.techniques.gradient_accumulation import (
    accumulate_gradients,
    apply_layer_major_micro_batches,
    clip_gradient_norm,
    count_targets,
    groups_of,
    in_micro_batches,
    optimizer_in_backward,
    split_batch,
)
from memlab.techniques.gradient_checkpointing import apply_gradient_checkpointing
from memlab.workloads import gpt, vit
from tests.helpers import a_t5, a_unet, a_whisper, equal, small_gpt2, small_llama

BATCH, SEQUENCE, HIDDEN = 5, 8, 16
GPT = gpt.GPTConfig(vocabulary_size=32, context_length=SEQUENCE, layers=2, heads=2, hidden=HIDDEN)
VIT = vit.ViTConfig(
    image_size=8, patch_size=4, channels=1, classes=4, layers=2, heads=2, hidden=HIDDEN
)
# What another order of FP32 additions may change, relative to a parameter's largest gradient.
FLOAT = 1e-5


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, foreach=False)


def make_gpt(**changes):
    torch.manual_seed(0)
    return gpt.GPT(gpt.replace(GPT, **changes))


def make_vit():
    torch.manual_seed(0)
    return vit.ViT(VIT)


def make_hugging_face(name):
    sizes = {"vocab_size": 32, "use_cache": False}
    if name == "llama":
        no_tie = {"intermediate_size": 32, "tie_word_embeddings": False}
        return small_llama(hidden_size=HIDDEN, **sizes, **no_tie)
    return small_gpt2(n_embd=HIDDEN, n_positions=SEQUENCE, **sizes)


def ragged(lengths=(8, 1, 5, 2, 7)):
    """(tokens, targets), each (batch, sequence), for documents of these lengths."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(32, (len(lengths), SEQUENCE), generator=generator)
    targets = torch.randint(32, (len(lengths), SEQUENCE), generator=generator)
    for row, length in enumerate(lengths):
        targets[row, length:] = -100
    return tokens, targets


def image_batch(count=BATCH):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, 8, 8, generator=generator), torch.randint(
        4, (count,), generator=generator
    )


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(one, other):
    """The largest difference, relative to the parameter's largest gradient."""
    assert one.keys() == other.keys() and one
    return max(
        ((one[name] - other[name]).abs().max() / one[name].abs().max().clamp(min=1e-30)).item()
        for name in one
    )


# --- The gradients of the large batch -------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
@pytest.mark.parametrize(("make", "batch"), [(make_gpt, ragged), (make_vit, image_batch)])
def test_gradients_and_loss_are_those_of_the_large_batch(make, batch, size):
    """Also with a last micro-batch that is smaller, and with documents of different lengths."""
    model = make()
    loss = model(*batch())
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    accumulated = accumulate_gradients(model, split_batch(batch(), size))
    assert difference(expected, gradients(model)) < FLOAT
    assert not accumulated.requires_grad and accumulated.shape == ()
    torch.testing.assert_close(accumulated, loss.detach())


def test_the_mean_of_means_is_another_gradient():
    """The test above can fail: this is the usual loop, on the same data."""
    model = make_gpt()
    model(*ragged()).backward()
    expected = gradients(model)
    model.zero_grad()
    for tokens, targets in split_batch(ragged(), 1):
        (model(tokens, targets) / BATCH).backward()
    assert difference(expected, gradients(model)) > 0.1


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_hugging_face_model_is_accumulated_as_it_is(name):
    model, (tokens, targets) = make_hugging_face(name), ragged()
    model(input_ids=tokens, labels=targets).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    pieces = [
        {"input_ids": one, "labels": other} for one, other in split_batch((tokens, targets), 1)
    ]
    # The second document has one target, which the shift takes away: its mean would be NaN.
    accumulate_gradients(
        model, pieces, count=lambda input_ids, labels: (labels[:, 1:] != -100).sum()
    )
    assert difference(expected, gradients(model)) < FLOAT
    with pytest.raises(TypeError, match="pass count="):
        accumulate_gradients(model, pieces)


def test_a_micro_batch_without_targets_is_left_out():
    model, batch = make_gpt(), ragged((8, 0, 3))
    model(*batch).backward()
    expected = gradients(model)
    model.zero_grad()
    assert accumulate_gradients(model, split_batch(batch, 1)).isfinite()
    assert difference(expected, gradients(model)) < FLOAT


def test_what_is_in_grad_already_is_added_to():
    model = make_gpt()
    accumulate_gradients(model, split_batch(ragged(), 2))
    once = gradients(model)
    accumulate_gradients(model, split_batch(ragged(), 2))
    assert difference({n: 2 * g for n, g in once.items()}, gradients(model)) < FLOAT


def test_a_function_and_batches_of_one_tensor_are_taken():
    layer = nn.Linear(3, 1)
    rows = torch.randn(5, 3)
    expected = torch.autograd.grad(layer(rows).square().mean(), layer.weight)[0]
    loss = accumulate_gradients(lambda x: layer(x).square().mean(), rows.split(2), count=len)
    torch.testing.assert_close(layer.weight.grad, expected)
    torch.testing.assert_close(loss, layer(rows).square().mean().detach())


def test_batch_norm_depends_on_the_cut():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    batch = torch.randn(8, 4), torch.randint(3, (8,))

    def loss(x, y):
        return F.cross_entropy(model(x), y)

    found = []
    for size in (8, 4):
        model.zero_grad()
        accumulate_gradients(loss, split_batch(batch, size))
        found.append(gradients(model))
    assert difference(*found) > 1e-2


def test_groups_end_with_what_is_left():
    assert list(groups_of(range(10), 4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(groups_of(iter([]), 4)) == []
    stream = itertools.count()
    assert (
        next(groups_of(stream, 2)) == [0, 1] and next(stream) == 2
    )  # it reads no further than it needs
    batches = split_batch(ragged(), 1)
    model, sizes = make_gpt(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for group in groups_of(batches, 2):
        accumulate_gradients(model, group)
        optimizer.step()
        optimizer.zero_grad()
        sizes.append(len(group))
    by_hand = make_gpt()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):
        by_hand(*(tensor[rows] for tensor in ragged())).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sizes == [2, 2, 1]
    for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("encoding", [dict, "BatchEncoding"])
def test_a_dict_is_cut_into_dicts(encoding):
    if encoding == "BatchEncoding":
        encoding = pytest.importorskip("transformers").BatchEncoding
    tokens, targets = torch.arange(10).view(5, 2), torch.arange(5)
    cut = split_batch(encoding({"input_ids": tokens, "labels": targets}), 2)
    assert [type(part) for part in cut] == [dict] * 3
    assert equal([part["input_ids"] for part in cut], tokens.split(2))
    assert equal([part["labels"] for part in cut], targets.split(2))


def test_micro_batches_are_views():
    tokens, targets = ragged()
    pieces = split_batch((tokens, targets), 2)
    assert [len(one) for one, _ in pieces] == [2, 2, 1]
    assert pieces[1][1].untyped_storage().data_ptr() == targets.untyped_storage().data_ptr()
    assert count_targets(tokens, targets) == 23


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: split_batch((torch.ones(4), torch.ones(3)), 2),
            ValueError,
            r"equally long.*\[4, 3\]",
        ),
        (lambda: split_batch((), 2), ValueError, "equally long"),
        (lambda: split_batch({}, 2), ValueError, "equally long"),
        (lambda: split_batch({"input_ids": [[1, 2]]}, 2), TypeError, "'input_ids' is .*pt"),
        (lambda: split_batch([torch.ones(())], 2), TypeError, "0 is tensor"),
        (lambda: split_batch((torch.ones(4),), 0), ValueError, "at least 1, but it is 0"),
        (lambda: list(groups_of([], True)), ValueError, "at least 1, but it is True"),
        (lambda: count_targets(torch.ones(3)), TypeError, "int64 targets, not tensor.*pass count="),
        (lambda: accumulate_gradients(make_gpt(), []), ValueError, r"targets that count.*\[\]"),
        (lambda: accumulate_gradients(make_gpt(), [ragged((0, 0))]), ValueError, r"have \[0\]"),
        (
            lambda: accumulate_gradients(lambda x, y: make_gpt()(x), [ragged()]),
            ValueError,
            "must return a scalar",
        ),
    ],
)
def test_wrong_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- The optimizer in backward --------------------------------------------------------------------


def train(model, batch, in_backward, steps=3, make_optimizer=adamw):
    optimizer = (
        optimizer_in_backward(model, make_optimizer)
        if in_backward
        else make_optimizer(model.parameters())
    )
    for _ in range(steps):
        output = model(*batch) if isinstance(batch, tuple) else model(**batch).loss
        output.backward()
        assert (in_backward is False) or all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def same_weights(one, other):
    return all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (make_gpt, ragged()),  # its embedding is shared with its output layer
        (lambda: make_gpt(tied_embeddings=False), ragged()),
        (make_vit, image_batch()),
        (
            lambda: make_hugging_face("gpt2"),
            dict(zip(("input_ids", "labels"), ragged(), strict=True)),
        ),
    ],
    ids=["gpt", "untied gpt", "vit", "hugging face gpt2"],
)
def test_weights_are_those_of_the_ordinary_optimizer_bit_for_bit(make, batch):
    ordinary, in_backward, start = make(), make(), make()
    train(ordinary, batch, False)
    optimizer = train(in_backward, batch, True)
    assert same_weights(ordinary, in_backward) and not same_weights(start, in_backward)
    # A shared weight was stepped once a step.
    steps = {
        entry["step"].item()
        for one in optimizer.optimizers.values()
        for entry in one.state.values()
    }
    assert steps == {3}


def test_the_learning_rate_can_be_set_and_the_state_saved():
    ordinary, in_backward, resumed = make_gpt(), make_gpt(), make_gpt()
    one = train(ordinary, ragged(), False)
    other = train(in_backward, ragged(), True)
    resumed.load_state_dict(in_backward.state_dict())
    third = optimizer_in_backward(resumed, adamw)
    third.load_state_dict(pickle.loads(pickle.dumps(other.state_dict())))
    for optimizer in (one, other, third):
        for group in optimizer.param_groups:
            group["lr"] = 1e-4
    for model, optimizer in ((ordinary, one), (in_backward, other), (resumed, third)):
        model(*ragged()).backward()
        optimizer.step()
    assert same_weights(ordinary, in_backward) and same_weights(ordinary, resumed)
    with pytest.raises(ValueError, match="position_embedding"):
        third.load_state_dict(optimizer_in_backward(nn.Linear(1, 1), adamw).state_dict())


def test_frozen_and_unused_parameters_stay():
    model = make_gpt()
    model.position_embedding.weight.requires_grad_(False)
    before = model.position_embedding.weight.clone()
    optimizer = train(model, ragged(), True)
    assert torch.equal(before, model.position_embedding.weight)
    assert "position_embedding.weight" not in optimizer.optimizers
    unused = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    optimizer = optimizer_in_backward(unused, adamw)
    kept = unused[1].weight.clone()
    unused[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(kept, unused[1].weight)


def test_accumulation_is_refused_at_the_second_backward():
    model = make_gpt()
    optimizer = optimizer_in_backward(model, adamw)
    model(*ragged()).backward()
    with pytest.raises(
        RuntimeError, match="excludes accumulation.*apply_layer_major_micro_batches"
    ):
        model(*ragged()).backward()
    optimizer.step()
    model(*ragged()).backward()
    optimizer.step()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match="excludes accumulation"):
        accumulate_gradients(model, split_batch(ragged(), 2))
    assert all(map(torch.equal, model.parameters(), before))  # refused before any was stepped
    accumulate_gradients(model, [ragged()])  # one micro-batch is no accumulation
    optimizer.step()


def test_a_step_without_backward_is_refused():
    optimizer = optimizer_in_backward(make_gpt(), adamw)
    with pytest.raises(RuntimeError, match="stepped no parameter"):
        optimizer.step()


def test_what_cannot_be_stepped_in_backward_is_refused():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="Linear has no parameter"):
        optimizer_in_backward(frozen, adamw)
    used = nn.Linear(2, 2)
    used(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match="weight has a gradient already"):
        optimizer_in_backward(used, adamw)
    twice = nn.Linear(2, 2)
    first = optimizer_in_backward(twice, adamw)
    with pytest.raises(ValueError, match="weight has an optimizer in backward already"):
        optimizer_in_backward(twice, adamw)
    first.remove()
    first.remove()
    twice(torch.ones(1, 2)).sum().backward()
    assert twice.weight.grad is not None  # after remove() backward leaves gradients again
    twice.zero_grad()
    optimizer_in_backward(twice, adamw)
    for wrong in (lambda p: None, lambda p: adamw(nn.Linear(2, 2).parameters())):
        with pytest.raises(TypeError, match="must return the optimizer of weight"):
            optimizer_in_backward(nn.Linear(2, 2), wrong)


def test_hooks_that_fail_half_way_are_taken_off_and_the_next_try_works(monkeypatch):
    model = make_gpt()
    register = torch.Tensor.register_post_accumulate_grad_hook
    left = iter(range(3))

    def perhaps(parameter, hook):
        if next(left, None) is None:
            raise MemoryError("no room")
        return register(parameter, hook)

    with monkeypatch.context() as context:
        context.setattr(torch.Tensor, "register_post_accumulate_grad_hook", perhaps)
        with pytest.raises(MemoryError):
            optimizer_in_backward(model, adamw)
    model(*ragged()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()
    optimizer = optimizer_in_backward(model, adamw)
    model(*ragged()).backward()
    optimizer.step()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_lost_result_is_an_error_and_not_a_step_that_does_not_happen():
    model = make_gpt()
    optimizer_in_backward(model, adamw)
    gc.collect()
    with pytest.raises(RuntimeError, match="keep it while you train"):
        model(*ragged()).backward()


def test_nothing_outlives_the_model():
    model = make_gpt()
    optimizer = train(model, ragged(), True)
    ghost = weakref.ref(model.position_embedding.weight)
    del model, optimizer
    gc.collect()
    assert ghost() is None


# --- Layer by layer -------------------------------------------------------------------------------


def by_layer(model, micro_batch_size=1):
    return apply_layer_major_micro_batches(model, micro_batch_size)


CASES = {
    "gpt": (make_gpt, ragged()),
    "vit": (make_vit, image_batch()),
    "gpt2": (
        lambda: make_hugging_face("gpt2"),
        dict(zip(("input_ids", "labels"), ragged(), strict=True)),
    ),
    "llama": (
        lambda: make_hugging_face("llama"),
        dict(zip(("input_ids", "labels"), ragged(), strict=True)),
    ),
}


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("case", CASES)
def test_gradients_layer_by_layer_are_those_of_the_large_batch(case, size):
    make, batch = CASES[case]
    model = make()

    def loss():
        return model(*batch) if isinstance(batch, tuple) else model(**batch).loss

    loss().backward()
    expected = gradients(model)
    model.zero_grad()
    handle = by_layer(model, size)
    loss().backward()
    assert difference(expected, gradients(model)) < FLOAT
    with torch.no_grad():
        by_layers = loss()
    handle.remove()
    torch.testing.assert_close(by_layers, loss().detach())
    blocks = model.blocks if hasattr(model, "blocks") else []
    assert not any("forward" in vars(block) for block in blocks)


def test_a_padding_mask_is_cut_with_the_batch():
    model, (tokens, targets) = make_hugging_face("llama"), ragged()
    batch = {"input_ids": tokens, "labels": targets, "attention_mask": (targets != -100).long()}
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    by_layer(model, 2)
    model(**batch).loss.backward()
    assert difference(expected, gradients(model)) < FLOAT


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_and_the_optimizer_in_backward_compose(case):
    """Every hook fires once a step, and the weights are those of the large batch to
    float accuracy.
    """
    make, batch = CASES[case]
    ordinary, both = make(), make()
    # SGD: AdamW's first step is the gradient's sign, which rounding can turn where the gradient is
    # next to zero.
    train(ordinary, batch, False, make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    by_layer(both)
    train(
        both, batch, True, make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
    )  # raises on a second step
    for one, other in zip(ordinary.parameters(), both.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def rows_loss(model):
    """A function from hidden states and targets to the sum of the losses of each row, (batch,)."""

    def loss(hidden, targets):
        losses = F.cross_entropy(
            model.head(hidden).flatten(0, 1), targets.flatten(), reduction="none"
        )
        return losses.view(targets.shape).sum(dim=1)

    return loss


def test_the_output_layer_and_its_loss_go_in_micro_batches_too():
    model, (tokens, targets) = make_gpt(), ragged()
    model(tokens, targets).backward()
    expected = gradients(model)
    model.zero_grad()
    sums = in_micro_batches(rows_loss(model), 2, model.features(tokens), targets)
    assert sums.shape == (BATCH,)
    (sums.sum() / (targets != -100).sum()).backward()
    assert difference(expected, gradients(model)) < FLOAT


def test_arguments_are_cut_where_the_batch_is_and_whole_where_it_is_not():
    seen = []

    def function(x, pair, scale, *, mask=None, flag=True):
        seen.append((len(x), len(pair[0]), len(pair[1]), len(mask), scale, flag))
        return x * scale, (pair[0], None)

    x = torch.randn(3, 2)
    output, (first, nothing) = in_micro_batches(
        function, 2, x, (torch.arange(3), torch.ones(1, 2)), 2.0, mask=torch.zeros(3), flag=False
    )
    assert seen == [(2, 2, 1, 2, 2.0, False), (1, 1, 1, 1, 2.0, False)]
    assert torch.equal(output, x * 2) and torch.equal(first, torch.arange(3)) and nothing is None


class CalledByNames(nn.Module):
    """A model whose blocks get their input by its name, after another keyword."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(HIDDEN, HIDDEN)

        def forward(self, hidden, positions=None):
            return hidden + torch.tanh(self.linear(hidden + positions))

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))

    def forward(self, hidden):
        positions = torch.arange(SEQUENCE).view(1, SEQUENCE, 1)
        for block in self.blocks:
            hidden = block(positions=positions, hidden=hidden)
        return hidden.square().mean()


def by_names():
    model = CalledByNames()
    batch = torch.randn(BATCH, SEQUENCE, HIDDEN)
    return model, lambda: model(batch)


@pytest.mark.parametrize("make", [by_names, a_t5, a_whisper, a_unet])
def test_blocks_called_by_names_and_blocks_of_several_lists_go_in_micro_batches(make):
    model, run = make()
    run().backward()
    expected = gradients(model)
    model.zero_grad()
    handle = apply_layer_major_micro_batches(model, 2)
    loss = run()
    assert len(handle.names) == {by_names: 2, a_t5: 6, a_whisper: 5, a_unet: 6}[make]
    assert handle.never_used == []
    loss.backward()
    assert difference(expected, gradients(model)) < FLOAT


def test_dropout_draws_other_masks_as_soon_as_there_is_more_than_one_slice():
    model = nn.Sequential(nn.Sequential(nn.Dropout(0.5), nn.Linear(HIDDEN, 8), nn.Dropout(0.5)))
    batch = torch.randn(BATCH, SEQUENCE, HIDDEN)

    def run():
        torch.manual_seed(0)
        return model(batch)

    expected = run()
    with apply_layer_major_micro_batches(model, BATCH):
        assert torch.equal(run(), expected)
    with apply_layer_major_micro_batches(model, 2):
        masks = run() == 0
    assert not torch.equal(masks, expected == 0)
    assert masks.float().mean() == pytest.approx(0.5, abs=0.1)


def test_the_first_argument_may_have_its_name():
    x = torch.randn(BATCH, 3)
    doubled = in_micro_batches(lambda values, factor: values * factor, 2, factor=2.0, values=x)
    assert torch.equal(doubled, x * 2)


def test_what_differs_from_slice_to_slice_is_not_taken_for_what_is_the_same():
    def with_a_constant(x):
        return x, torch.ones(1, 3)

    def with_a_sum(x):
        return x, x.sum(0, keepdim=True)

    x = torch.randn(4, 3)
    assert torch.equal(in_micro_batches(with_a_constant, 2, x)[1], torch.ones(1, 3))
    with pytest.raises(TypeError, match=r"must be a tensor \(batch, ...\)"):
        in_micro_batches(with_a_sum, 2, x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: in_micro_batches(f, 0, torch.ones(2)), ValueError, "at least 1"),
        (lambda f: in_micro_batches(f, 1), ValueError, "first argument must be a tensor"),
        (lambda f: in_micro_batches(f, 1, torch.ones(0, 2)), ValueError, "at least one row"),
        (
            lambda f: in_micro_batches(f, 1, torch.ones(4), torch.ones(3)),
            ValueError,
            r"\(4, ...\) or \(1, ...\)",
        ),
        (
            lambda f: in_micro_batches(f, 1, torch.ones(4, 4, 2), torch.ones(4, 2)),
            ValueError,
            "Batch and sequence are both 4",
        ),
        (
            lambda f: in_micro_batches(f, 1, torch.ones(4), cache=object()),
            TypeError,
            "use_cache=False",
        ),
        (
            lambda f: in_micro_batches(torch.sum, 1, torch.ones(4)),
            TypeError,
            r"must be a tensor \(batch, ...\)",
        ),
        (lambda f: in_micro_batches(len, 1, torch.ones(4)), TypeError, "but it is int"),
        (
            lambda f: apply_layer_major_micro_batches(nn.Linear(1, 1), 1),
            ValueError,
            "No blocks found in Linear",
        ),
        (
            lambda f: apply_layer_major_micro_batches(make_gpt(), 1, blocks=[nn.Linear(1, 1)]),
            ValueError,
            "No blocks found in GPT",
        ),
        (lambda f: apply_layer_major_micro_batches(make_gpt(), 0), ValueError, "at least 1"),
        (
            lambda f: apply_layer_major_micro_batches(nn.Sequential(nn.BatchNorm1d(3)), 1),
            ValueError,
            "0 has batch norm",
        ),
        (
            lambda f: apply_layer_major_micro_batches([nn.Linear(1, 1)], 1),
            TypeError,
            "must be a torch.nn.Module",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(lambda *args, **kwargs: args[0])


# --- The common norm, and the optimizer in backward that excludes it ------------------------------


@pytest.mark.parametrize("max_norm", [1e-3, 1, 1e3, float("inf")])
def test_the_norm_is_clipped_as_torch_does_it(max_norm):
    ours, theirs = make_gpt(), make_gpt()
    for model in (ours, theirs):
        model(*ragged()).backward()
    ours.final_norm.bias.grad = theirs.final_norm.bias.grad = None  # not every one has a gradient
    norm = clip_gradient_norm(ours.parameters(), max_norm)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)) and norm > 0.1
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)


def test_where_there_is_no_norm_clipping_is_refused():
    model = make_gpt()
    optimizer = optimizer_in_backward(model, lambda p: torch.optim.SGD(p, lr=0.1))
    model(*ragged()).backward()
    with pytest.raises(RuntimeError, match="parameters has a gradient.* An optimizer in backward"):
        clip_gradient_norm(model.parameters(), 1.0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="None of the 0 parameters"):
        clip_gradient_norm([], 1.0)


@pytest.mark.parametrize(
    ("gradient", "max_norm", "error", "message"),
    [
        (float("nan"), 1.0, RuntimeError, "non-finite"),
        (float("inf"), 1.0, RuntimeError, "non-finite"),
        (1.0, 0, ValueError, "max_norm must be a positive number, but it is 0"),
        (1.0, float("nan"), ValueError, "but it is nan"),
    ],
)
def test_a_norm_that_cannot_be_clipped_is_refused_and_nothing_is_changed(
    gradient, max_norm, error, message
):
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, gradient])
    with pytest.raises(error, match=message):
        clip_gradient_norm(parameter, max_norm)  # one tensor is taken, too
    assert parameter.grad[0] == 3


# --- The bytes ------------------------------------------------------------------------------------

# Large enough for the tensors to count, small enough for a fraction of a second.
SIZES = gpt.GPTConfig(vocabulary_size=128, context_length=64, layers=4, heads=2, hidden=64)
ROWS = 8


def build(kind, length=SIZES.context_length):
    def build_run():
        torch.manual_seed(0)
        model = gpt.GPT(SIZES)
        tokens = torch.randint(128, (ROWS, length))
        if "checkpoints" in kind:
            apply_gradient_checkpointing(model)
        if "by layer" in kind:
            apply_layer_major_micro_batches(model, 1)
        backward = "in backward" in kind
        optimizer = optimizer_in_backward(model, adamw) if backward else adamw(model.parameters())
        size = ROWS // 2 if "pieces" in kind else ROWS

        def step():
            if "by layer" in kind:
                loss = in_micro_batches(rows_loss(model), 1, model.features(tokens), tokens).mean()
                loss.backward()
            else:
                loss = accumulate_gradients(model, split_batch((tokens, tokens), size))
            optimizer.step()
            model.zero_grad()
            return loss

        return step

    return build_run


def within(measured, predicted, share):
    assert abs(measured / predicted - 1) <= share, f"{measured:,} bytes, predicted {predicted:,}"


def test_accumulation_divides_the_activations_and_keeps_the_gradients():
    length, p = SIZES.context_length, SIZES.parameter_count

    def mountain(rows):
        return gpt.activation_bytes(SIZES, rows, length) + 2 * 4 * rows * length * 128

    batch = 8 * ROWS * length  # tokens and targets are one tensor here
    whole, pieces = measure(build("whole")), measure(build("pieces"))
    within(whole.known_bytes, 12 * p + mountain(ROWS) + batch, 1e-3)
    within(pieces.known_bytes, 16 * p + mountain(ROWS // 2) + batch, 1e-3)
    assert pieces.columns["gradients"] == 4 * p


def test_with_few_tokens_accumulation_raises_the_peak():
    length = 2
    whole = measure(build("whole", length)).known_bytes
    pieces = measure(build("pieces", length)).known_bytes
    assert SIZES.parameter_count * 16 < whole < pieces


def test_the_optimizer_in_backward_holds_few_gradients():
    length, p, h = 2, SIZES.parameter_count, SIZES.hidden
    ordinary, in_backward = measure(build("whole", length)), measure(build("in backward", length))
    assert ordinary.columns["gradients"] == 4 * p
    # The largest weight, its gradient's two temporaries in AdamW; the shared embedding, and a few
    # small ones.
    assert in_backward.columns["gradients"] <= 4 * 4 * h * h + 4 * 128 * h + 4096
    most = (
        12 * p + gpt.activation_bytes(SIZES, ROWS, length) + 3 * 4 * 4 * h * h + 4 * 128 * h + 8192
    )
    assert in_backward.known_bytes <= most < ordinary.known_bytes


def test_layer_by_layer_holds_the_inputs_one_slice_and_one_blocks_gradients():
    length, p, h, layers = SIZES.context_length, SIZES.parameter_count, SIZES.hidden, SIZES.layers
    run = measure(build("by layer, in backward"))
    unit, piece, gradients = 4 * ROWS * length * h, 4 * length * h, 4 * (12 * h**2 + 13 * h)
    alive = (layers + 1) * unit + (ROWS - 1) * piece + gradients + 4 * 128 * h
    alive += max(19 * piece + 16 * h**2, 15 * piece + 32 * h**2)
    small_print = (16 + 4 * 2) * length + 5056 * ((layers - 1) * ROWS + 1) + 8 * ROWS * length
    within(run.known_bytes, 12 * p + alive + small_print, 0.01)
    assert run.known_bytes < measure(build("whole, checkpoints, in backward")).known_bytes


@pytest.mark.gpu
def test_both_together_on_a_gpu():
    def run(both):
        model = make_gpt().cuda()
        batch = tuple(tensor.cuda() for tensor in ragged())
        if both:
            by_layer(model)
        train(model, batch, both, make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        return [p.detach() for p in model.parameters()]

    for one, other in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
