"""Dynamic length: however documents are arranged, padded or packed, the loss and the gradients are
the same, for our GPT and models of Hugging Face; the places of a batch are bounded; bytes by
formula; and what would go wrong is refused."""

import contextlib
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memlab import measure
from memlab.techniques.dynamic_length import (
    batches_of,
    batches_within,
    block_diagonal_mask,
    documents_apart,
    pack,
    pad,
    places,
)
from memlab.workloads import gpt, vit
from tests.helpers import largest_difference, small_gpt2, small_llama

CONFIG = gpt.tiny(layers=2)  # a context of 64 tokens
LENGTHS = (11, 3, 19, 1, 16)


def random_documents(lengths=LENGTHS, seed=0, high=256):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(high, (length + 1,), generator=generator) for length in lengths]


DOCUMENTS = random_documents()


def new_model(config=CONFIG, device=None):
    torch.manual_seed(0)
    model = gpt.GPT(config).to(device)
    with torch.no_grad():  # as drawn, attention hardly looks at anything
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    return model


def summed(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def gradients(model):
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@functools.cache
def one_by_one():
    """The reference: each document alone, in a batch of one. Loss and gradients."""
    model, total = new_model(), 0.0
    for document in DOCUMENTS:
        loss = summed(model(document[None, :-1]), document[None, 1:]) / sum(LENGTHS)
        loss.backward()
        total += loss.item()
    return total, gradients(model)


# --- Plans ----------------------------------------------------------------------------------------


def test_a_plan_by_documents_takes_each_once():
    lengths = [5, 9, 2, 9, 4]
    assert batches_of(lengths, 2) == [[0, 1], [2, 3], [4]]
    assert batches_of(lengths, 2, by_length=True) == [[1, 3], [0, 4], [2]]
    assert batches_of([], 2) == []


@pytest.mark.parametrize("packed", [False, True])
def test_a_plan_within_a_budget_takes_each_once_and_keeps_to_it(packed):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 65, (300,), generator=generator).tolist()
    batches = batches_within(lengths, 128, packed=packed)
    assert sorted(index for batch in batches for index in batch) == list(range(300))
    taken = [places(lengths, batch, packed=packed) for batch in batches]
    assert max(taken) <= 128
    assert taken[0] >= 64  # the longest is in the first one
    waste = sum(taken) - sum(lengths)
    assert waste == 0 if packed else 0 < waste < 0.1 * sum(lengths)
    # A plan that is not far from the best: the rows are nearly full.
    assert len(batches) <= (1.02 if packed else 1.3) * sum(lengths) / 128 + 1


def test_plans_by_hand():
    assert batches_within([4, 3, 2, 1], 6) == [[0], [1, 2], [3]]
    assert batches_within([4, 3, 2, 1], 6, packed=True) == [[0, 2], [1, 3]]
    assert batches_within([3, 3], 3) == batches_within([3, 3], 3, packed=True) == [[0], [1]]
    assert batches_within([], 3) == batches_within([], 3, packed=True) == []
    assert places([4, 3, 2], [0, 2]) == 8 and places([4, 3, 2], [0, 2], packed=True) == 6
    assert places([4], []) == 0
    assert batches_within(torch.tensor([4, 3, 2, 1]), 6) == [[0], [1, 2], [3]]


def test_buckets_do_not_make_the_worst_batch_smaller_and_a_budget_does():
    lengths = [64, *range(1, 60), 64]
    assert max(places(lengths, batch) for batch in batches_of(lengths, 4)) == 256
    assert max(places(lengths, batch) for batch in batches_of(lengths, 4, by_length=True)) == 256
    assert max(places(lengths, batch) for batch in batches_within(lengths, 64)) == 64


def test_bad_plans_are_refused():
    with pytest.raises(ValueError, match="Document 1 has 9 tokens, and a batch may have 8"):
        batches_within([5, 9], 8)
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="size must be a whole number of at least 1"):
            batches_of([1], wrong)
        with pytest.raises(ValueError, match="tokens must be a whole number of at least 1"):
            batches_within([1], wrong)
        with pytest.raises(ValueError, match="Lengths must be whole numbers .* number 1 is"):
            batches_of([3, wrong], 2)
        with pytest.raises(ValueError, match="Lengths must be whole numbers"):
            batches_within([3, wrong], 4)


# --- Rectangles and rows --------------------------------------------------------------------------


def test_padding_by_hand():
    tokens, targets = pad([torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6])], fill=9)
    assert tokens.tolist() == [[1, 2, 3], [5, 9, 9]]
    assert targets.tolist() == [[2, 3, 4], [6, -100, -100]]
    tokens, targets = pad([torch.tensor([5, 6])], length=3)
    assert tokens.tolist() == [[5, 0, 0]] and targets.tolist() == [[6, -100, -100]]


def test_a_row_by_hand_pairs_nothing_across_documents_and_restarts_positions():
    row = pack([torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6]), torch.tensor([7, 8, 9])])
    assert row.tokens.tolist() == [[1, 2, 3, 5, 7, 8]]
    assert row.targets.tolist() == [[2, 3, 4, 6, 8, 9]]
    assert row.positions.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert row.lengths == (3, 1, 2)
    mask = block_diagonal_mask(row.lengths)
    assert mask.shape == (1, 1, 6, 6) and mask.dtype == torch.bool
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("arrange", [pad, pack])
def test_bad_documents_are_refused(arrange):
    with pytest.raises(ValueError, match="at least one document"):
        arrange([])
    with pytest.raises(TypeError, match="document 1 is list"):
        arrange([torch.tensor([1, 2]), [1, 2]])
    with pytest.raises(TypeError, match="document 0 is torch.float32"):
        arrange([torch.ones(3)])
    for wrong in (torch.tensor([1]), torch.tensor([[1, 2]])):
        with pytest.raises(ValueError, match="one row of at least 2 tokens"):
            arrange([torch.tensor([1, 2]), wrong])


def test_a_document_that_does_not_fit_is_not_cut_in_silence():
    with pytest.raises(ValueError, match="A document of 19 tokens does not fit into 18"):
        pad(DOCUMENTS, length=18)


# --- The same loss and the same gradients ---------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "packed", "length"),
    [
        ([[0, 1, 2, 3, 4]], False, 64),
        ([[0, 1, 2, 3, 4]], False, None),
        (batches_of(LENGTHS, 2, by_length=True), False, None),
        (batches_within(LENGTHS, 24), False, None),
        ([[0, 1, 2, 3, 4]], True, None),
        ([[4, 3, 2, 1, 0]], True, None),
        (batches_within(LENGTHS, 24, packed=True), True, None),
    ],
)
def test_every_arrangement_has_the_loss_and_gradients_of_the_documents_alone(plan, packed, length):
    model, total = new_model(), 0.0
    for batch in plan:
        chosen = [DOCUMENTS[index] for index in batch]
        if packed:
            row = pack(chosen)
            with documents_apart(row.lengths, positions=model.position_embedding):
                loss = summed(model(row.tokens), row.targets) / sum(LENGTHS)
        else:
            tokens, targets = pad(chosen, length)
            loss = summed(model(tokens), targets) / sum(LENGTHS)
        loss.backward()
        total += loss.item()
    expected, expected_gradients = one_by_one()
    assert abs(total - expected) < 1e-5 * expected
    assert largest_difference(gradients(model), expected_gradients) < 1e-5


def test_a_document_does_not_see_its_neighbours_and_would_without():
    model, own = new_model(), DOCUMENTS[2]
    alone = model(own[None, :-1])[0]

    def in_a_row(apart, *neighbours):
        row = pack([*neighbours, own])
        context = (
            documents_apart(row.lengths, positions=model.position_embedding)
            if apart
            else contextlib.nullcontext()
        )
        with context:
            return model(row.tokens)[0, -len(own) + 1 :]

    for neighbours in (
        [DOCUMENTS[0]],
        random_documents((7, 8), seed=1),
        random_documents((1,) * 9),
    ):
        assert largest_difference(in_a_row(True, *neighbours), alone) < 1e-5
        assert largest_difference(in_a_row(False, *neighbours), alone) > 1e-2


def test_the_mask_and_the_loop_are_the_same():
    torch.manual_seed(0)
    n = sum(LENGTHS)
    q, k, v = (torch.randn(1, 2, n, 8) for _ in range(3))
    masked = F.scaled_dot_product_attention(q, k, v, attn_mask=block_diagonal_mask(LENGTHS))
    with documents_apart(LENGTHS, positions=None):
        apart = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert largest_difference(apart, masked) < 1e-5
    assert apart.shape == masked.shape


def test_options_of_attention_reach_the_kernel():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    with documents_apart((4, 5), positions=None):
        apart = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5, enable_gqa=True)
    for part in (slice(0, 4), slice(4, 9)):
        alone = F.scaled_dot_product_attention(
            q[:, :, part], k[:, :, part], v[:, :, part], is_causal=True, scale=0.5, enable_gqa=True
        )
        assert largest_difference(apart[:, :, part], alone) < 1e-6


def test_attention_is_put_back_also_after_an_error():
    original, model = F.scaled_dot_product_attention, new_model()
    row = pack(DOCUMENTS)
    with documents_apart(row.lengths, positions=model.position_embedding):
        assert F.scaled_dot_product_attention is not original
        model(row.tokens)
    assert F.scaled_dot_product_attention is original
    with (
        pytest.raises(ZeroDivisionError),
        documents_apart(row.lengths, positions=model.position_embedding),
    ):
        1 / 0  # noqa: B018
    assert F.scaled_dot_product_attention is original
    assert not model.position_embedding._forward_pre_hooks


# --- Checkpoints: attention runs again in backward ------------------------------------------------


def checkpointed(reentrant):
    model = new_model()
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=reentrant)
    return model


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model_is_right_with_backward_inside(reentrant):
    model, row = checkpointed(reentrant), pack(DOCUMENTS)
    with documents_apart(row.lengths, positions=model.position_embedding):
        (summed(model(row.tokens), row.targets) / sum(LENGTHS)).backward()
    assert largest_difference(gradients(model), one_by_one()[1]) < 1e-5


@pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad"
)  # under no_grad(), at the end
def test_a_checkpointed_model_is_no_silent_error_with_backward_outside():
    model, row = checkpointed(False), pack(DOCUMENTS)
    with documents_apart(row.lengths, positions=model.position_embedding):
        loss = summed(model(row.tokens), row.targets)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()
    model = checkpointed(True)
    with (
        pytest.raises(RuntimeError, match="run backward within documents_apart"),
        documents_apart(row.lengths, positions=model.position_embedding),
    ):
        summed(model(row.tokens), row.targets)
    with torch.no_grad(), documents_apart(row.lengths, positions=model.position_embedding):
        model(row.tokens)  # nothing to run again


# --- What would be wrong is refused ---------------------------------------------------------------


def test_models_that_attend_otherwise_are_refused():
    row = pack(DOCUMENTS)
    model = new_model(gpt.tiny(layers=1, attention="naive"))
    with (
        pytest.raises(ValueError, match="did not run: is attention written out"),
        documents_apart(row.lengths, positions=model.position_embedding),
    ):
        model(row.tokens)

    n = sum(LENGTHS)
    q = torch.randn(1, 2, n, 8)
    with pytest.raises(ValueError, match="a mask beside"), documents_apart(LENGTHS, positions=None):
        F.scaled_dot_product_attention(q, q, q, attn_mask=block_diagonal_mask(LENGTHS))
    for wrong in (torch.randn(1, 2, n + 1, 8), torch.randn(2, 2, n, 8), torch.randn(2, n, 8)):
        with (
            pytest.raises(ValueError, match=f"add up to {n} tokens"),
            documents_apart(LENGTHS, positions=None),
        ):
            F.scaled_dot_product_attention(wrong, wrong, wrong, is_causal=True)


def test_a_vit_has_no_documents():
    model = vit.ViT(vit.small(layers=1, hidden=32, heads=2)).eval()
    with (
        pytest.raises(ValueError, match="add up to 50 tokens"),
        torch.no_grad(),
        documents_apart(LENGTHS, positions=None),
    ):
        model(torch.randn(1, 1, 32, 32))


def test_positions_that_would_be_wrong_are_refused():
    model, row = new_model(), pack(DOCUMENTS)
    with (
        pytest.raises(TypeError, match="positions must be a module"),
        documents_apart((1,), positions="wpe"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="got other numbers"),
        documents_apart(row.lengths, positions=model.token_embedding),
    ):
        model(row.tokens)
    with (
        pytest.raises(ValueError, match="did not give its positions"),
        documents_apart(row.lengths, positions=nn.Embedding(64, 8)),
    ):
        model(row.tokens)
    with (
        pytest.raises(ValueError, match="65 tokens, but the model knows 64"),
        documents_apart((65,), positions=model.position_embedding),
    ):
        pass
    with (
        pytest.raises(RuntimeError, match="running already"),
        documents_apart(row.lengths, positions=None),
        documents_apart(row.lengths, positions=None),
    ):
        pass
    for wrong, message in (((), "at least one document"), ((3, 0), "number 1 is 0")):
        with pytest.raises(ValueError, match=message), documents_apart(wrong, positions=None):
            pass


# --- Hugging Face ---------------------------------------------------------------------------------


def hugging_face(name):
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sizes = {"vocab_size": 64, "initializer_range": 0.3, **special}
    if name == "GPT-2":
        model = small_gpt2(n_positions=24, **sizes)
        return model.eval(), model.transformer.wpe
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model = small_llama(max_position_embeddings=24, **heads, **sizes)
    return model.eval(), model.model.rotary_emb


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_hugging_face_models_read_documents_apart_as_with_their_own_collator(transformers, name):
    documents = random_documents(high=64)
    model, positions = hugging_face(name)
    for document in documents:
        (summed(model(document[None, :-1]).logits, document[None, 1:]) / sum(LENGTHS)).backward()
    expected = gradients(model)

    model, positions = hugging_face(name)
    row = pack(documents)  # longer than n_positions, which the documents are not
    with documents_apart(row.lengths, positions=positions):
        loss = summed(model(row.tokens, use_cache=False).logits, row.targets) / sum(LENGTHS)
    loss.backward()
    assert largest_difference(gradients(model), expected) < 1e-4

    model, _ = hugging_face(name)
    collate = transformers.DataCollatorWithFlattening(return_tensors="pt")
    flat = collate([{"input_ids": document.tolist()} for document in documents])
    theirs = model(**flat, use_cache=False).loss  # with a cache it would not look for documents
    assert abs(loss.item() - theirs.item()) < 1e-5 * theirs.item()
    theirs.backward()
    assert largest_difference(gradients(model), expected) < 1e-4

    # With position_ids their model makes a mask of its own, which is not what we are for.
    with (
        pytest.raises(ValueError, match="a mask beside|got other numbers"),
        documents_apart(row.lengths, positions=positions),
    ):
        model(row.tokens, position_ids=row.positions, use_cache=False)


def test_an_encoder_sees_both_ways_within_a_document(transformers):
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    row = pack(random_documents(high=64))
    with torch.no_grad():
        alone = [model(part).last_hidden_state for part in row.tokens.split(row.lengths, 1)]
        with documents_apart(row.lengths, positions=model.embeddings.position_embeddings):
            together = model(row.tokens).last_hidden_state
    assert largest_difference(together, torch.cat(alone, 1)) < 1e-4


def test_gradient_checkpointing_of_hugging_face_with_backward_inside(transformers):
    expected = None
    for recompute in (False, True):
        model, positions = hugging_face("Llama")
        model.train()
        if recompute:
            # The second name is the older one, which newer versions warn about.
            name = "activation_checkpointing_enable"
            enable = getattr(model, name, None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        row = pack(random_documents(high=64))
        with documents_apart(row.lengths, positions=positions):
            summed(model(row.tokens, use_cache=False).logits, row.targets).backward()
        expected = expected or gradients(model)
    assert largest_difference(gradients(model), expected) < 1e-5


# --- Bytes ----------------------------------------------------------------------------------------


def build(documents, packed, length=None, config=CONFIG):
    def build_run():
        torch.manual_seed(0)
        model = gpt.GPT(config)

        def step():
            model.zero_grad()
            if packed:
                row = pack(documents)
                targets = row.targets
                with documents_apart(row.lengths, positions=model.position_embedding):
                    logits = model(row.tokens)
                del row
            else:
                tokens, targets = pad(documents, length)
                logits = model(tokens)
            loss = summed(logits, targets)
            del logits
            loss.backward()
            return loss

        return step

    return build_run


def test_a_place_costs_what_a_token_costs_and_a_packed_row_one_tensor_a_layer_more():
    config = gpt.tiny(context_length=256)
    documents = random_documents((64, 10, 30, 7, 1, 50))
    n, longest, h, layers = 162, 64, config.hidden, config.layers
    runs = {
        "maximum": measure(build(documents, False, 100, config), device="cpu"),
        "longest": measure(build(documents, False, None, config), device="cpu"),
        "packed": measure(build(documents, True, None, config), device="cpu"),
    }
    wanted = {
        "maximum": gpt.activation_bytes(config, 6, 100),
        "longest": gpt.activation_bytes(config, 6, longest),
        "packed": gpt.activation_bytes(config, 1, n) + 4 * n * h * layers,
    }
    batch = {"maximum": 16 * 600, "longest": 16 * 6 * longest, "packed": 16 * n}
    for name, run in runs.items():
        held = run.columns["activations"] + run.columns["batch"]
        assert abs(held - wanted[name] - batch[name]) <= 64, (
            name,
            held - wanted[name] - batch[name],
        )
    assert runs["maximum"].losses[0] == pytest.approx(runs["packed"].losses[0], rel=1e-5)
    assert runs["longest"].known_bytes < runs["maximum"].known_bytes
    assert runs["packed"].known_bytes < runs["longest"].known_bytes


def test_equal_documents_gain_nothing_from_a_row():
    documents = random_documents((16, 16, 16, 16))
    padded, packed = (measure(build(documents, way), device="cpu") for way in (False, True))
    extra = packed.columns["activations"] - padded.columns["activations"]
    # The copy of the attention's output in each layer, and the positions' indices.
    assert extra == 4 * 64 * CONFIG.hidden * CONFIG.layers + 8 * 64 - 8 * 16


def test_nothing_of_the_square_of_the_row_is_made():
    n = (64,) * 16

    def build_attention(masked):
        def build_run():
            q = torch.randn(1, 1, sum(n), 8, requires_grad=True)
            mask = block_diagonal_mask(n) if masked else None

            def step():
                context = contextlib.nullcontext() if masked else documents_apart(n, positions=None)
                with context:
                    y = F.scaled_dot_product_attention(
                        q, q, q, attn_mask=mask, is_causal=not masked
                    )
                y.sum().backward()
                q.grad = None

            return step

        return build_run

    square = sum(n) ** 2
    masked, apart = (
        measure(build_attention(masked), device="cpu").known_bytes for masked in (True, False)
    )
    assert masked > square > 2 * apart


@pytest.mark.gpu
def test_on_a_gpu_loss_and_gradients_are_the_documents_and_checkpoints_work():
    documents = [document.cuda() for document in DOCUMENTS]
    tokens, targets = pad(documents)
    padded = new_model(device="cuda")
    (summed(padded(tokens), targets) / sum(LENGTHS)).backward()
    row = pack(documents)
    for recompute in (False, True):
        model = new_model(device="cuda")
        if recompute:
            for block in model.blocks:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        with documents_apart(row.lengths, positions=model.position_embedding):
            (summed(model(row.tokens), row.targets) / sum(LENGTHS)).backward()
        assert largest_difference(gradients(model), gradients(padded)) < 1e-4
