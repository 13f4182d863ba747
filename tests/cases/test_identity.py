"""Cases: what a block is: its type, its operator, its model, and whose state."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from memlab import measure, watch

FLOAT = 4


def mlp():
    return nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))


def test_a_compiled_optimizer_step_is_the_optimizers_phase_and_its_state_is_state():
    """The compiler's own module holds the state as buffers, and no hook runs in a compiled step."""

    def train():
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters())
        step = torch.compile(optimizer.step, backend="eager")
        for batch in torch.randn(3, 16, 256):
            optimizer.zero_grad()
            loss = model(batch).mean()
            loss.backward()
            step()
            yield loss

    measured = measure(train, steps=3)
    assert measured.columns["parameters"] == 2_102_272
    assert measured.columns["optimizer_state"] == 2 * 2_102_272 + 4 * FLOAT
    phases = [phase.kind for phase in measured.ledger.phases]
    assert phases == ["forward", "backward", "optimizer"] * 3
    state = [block for block in measured.largest() if block.column == "optimizer_state"]
    assert state and {block.operator for block in state} == {"aten::zeros_like"}
    assert measured.by_model().bytes == {"Sequential": {"trained": 2_102_272}}


def test_two_models_of_one_class_and_an_average():
    def train():
        policy = mlp()
        reference = copy.deepcopy(policy).requires_grad_(False)
        average = torch.optim.swa_utils.AveragedModel(policy)
        optimizer = torch.optim.SGD(policy.parameters())
        for batch in torch.randn(2, 4, 256):
            with torch.no_grad():
                wanted = reference(batch)
            loss = F.mse_loss(policy(batch), wanted)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(policy)
            yield loss

    measured = measure(train)
    size = 2_102_272
    rows = {model: list(row.values()) for model, row in measured.by_model().bytes.items()}
    # trained, frozen, buffers: the average counts its updates in one.
    assert rows == {
        "AveragedModel": [size, 0, 8],
        "Sequential (1)": [size, 0, 0],
        "Sequential (2)": [0, size, 0],
    }
    averages = {b.name for b in measured.largest(1000) if b.model.startswith("AveragedModel")}
    assert "module.0.weight" in averages


def test_equal_blocks_are_one_line_with_their_type():
    def train():
        model = nn.Linear(16, 8000, bias=False)
        for batch in torch.randn(1, 8, 64, 16):
            loss = sum(model(rows).logsumexp(-1).mean() for rows in batch)
            loss.backward()
            yield loss

    measured = measure(train, steps=1)
    lines = [str(group) for group in measured.groups()]
    assert "8 x 1.95 MiB, FP32 (64, 8000)" in lines
    [logits] = [group for group in measured.groups() if group.shape == [64, 8000]]
    assert (logits.operator, logits.module, logits.column) == (
        "aten::linear",
        "Linear",
        "activations",
    )


def test_a_convolution_is_told_by_its_outermost_operator():
    def train():
        model = nn.Conv2d(3, 8, 3)
        yield model(torch.randn(2, 3, 16, 16)).square().mean()

    block = next(b for b in measure(train, steps=1).largest() if b.shape == (2, 8, 14, 14))
    assert (block.operator, block.dtype) == ("aten::conv2d", "float32")


# The bytes of a column, by data type --------------------------------------------------------------


def tiny_llama(words=1000):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=words,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def test_a_model_that_is_prepared_for_low_bit_training_is_cast_to_fp32():
    """On a model that is in BF16 and not quantized, all of it becomes twice as large."""
    peft = pytest.importorskip("peft")

    def bytes_of(prepare):
        with watch() as empty:
            pass
        model = prepare(tiny_llama(words=4000))
        tokens = torch.randint(1000, (1, 8))
        with watch(model) as w, torch.no_grad():
            model(input_ids=tokens)
        was_there = empty.measurement.by_dtype().bytes.get("parameters", {})
        found = w.measurement.by_dtype().bytes["parameters"]
        came = {dtype: size - was_there.get(dtype, 0) for dtype, size in found.items()}
        return {dtype: size for dtype, size in came.items() if size}

    before = bytes_of(lambda model: model)
    after = bytes_of(peft.prepare_model_for_kbit_training)
    buffers = 2 * 16 * 2  # the rotary embedding's two lists of frequencies stay
    assert before == {"BF16": 1_188_480 + buffers}
    assert after == {"BF16": buffers, "FP32": 2_376_960}


def test_modules_to_save_are_a_copy_a_gradient_and_two_moments():
    peft = pytest.importorskip("peft")
    saved = ["embed_tokens", "lm_head"]

    def train(modules_to_save=None):
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj"], modules_to_save=modules_to_save, task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(tiny_llama(), config)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, foreach=False)
        for tokens in torch.randint(1000, (2, 1, 8)):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            yield loss
            optimizer.zero_grad()

    def columns(**options):
        measured = measure(train, **options)
        ledger = measured.ledger
        # At the end of the last step: the peak may be that of building.
        end = ledger.phases[-1].end - 1
        [model] = measured.by_model(end).bytes.values()
        return ledger.columns_at(end), model

    before, model_before = columns()
    after, model = columns(modules_to_save=saved)
    copies = 2 * 1000 * 64 * 2  # in BF16, as the model is
    more = {name: after[name] - before[name] for name in after}
    assert more["parameters"] == more["gradients"] == copies
    assert more["optimizer_state"] == 2 * copies + 2 * FLOAT
    assert model["trained"] - model_before["trained"] == copies
    assert model["frozen"] == model_before["frozen"]


# What learning adds, and what got no gradient -----------------------------------------------------


def test_reentrant_checkpointing_over_a_frozen_embedding_trains_the_head_alone():
    """The first block is given nothing that needs a gradient, so none of the blocks gets one."""

    def train():
        embedding = nn.Embedding(100, 32).requires_grad_(False)
        blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))
        head = nn.Linear(32, 100)
        trained = [*blocks.parameters(), *head.parameters()]
        optimizer = torch.optim.SGD(trained)
        for tokens in torch.randint(100, (2, 16)):
            hidden = embedding(tokens)
            for block in blocks:
                hidden = checkpoint(block, hidden, use_reentrant=True)
            loss = F.cross_entropy(head(hidden), tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss

    measured = measure(train)
    block = FLOAT * (32 * 32 + 32)
    head = FLOAT * (32 * 100 + 100)
    assert measured.without_gradient == (12, 14, 6 * block, 6 * block + head)
    assert "12 of 14 parameters that need a gradient got none" in str(measured)
    assert measured.timeline.bytes["gradients"].max() == head


def test_an_expert_that_is_hit_first_adds_a_gradient_and_two_moments():
    """Experts in a list: the memory creeps until each of them was hit."""
    size = FLOAT * 32 * 32

    def train(hit=(0, 0, 1, 2, 2)):
        experts = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(3))
        optimizer = torch.optim.Adam(experts.parameters(), foreach=False)
        for expert in hit:
            loss = experts[expert](torch.ones(4, 32)).mean()
            loss.backward()
            optimizer.step()
            yield loss

    measured = measure(train, steps=5)
    ends = [p.end - 1 for p in measured.ledger.phases if p.kind == "optimizer"]
    columns = [measured.ledger.columns_at(end) for end in ends]
    assert [found["gradients"] for found in columns] == [n * size for n in (1, 1, 2, 3, 3)]
    state = 2 * size + FLOAT  # two moments and the number of steps
    assert [found["optimizer_state"] for found in columns] == [n * state for n in (1, 1, 2, 3, 3)]


def test_fused_experts_indexed_in_a_loop_make_a_whole_gradient_for_each():
    """The backward of `select` makes a tensor of the size of all experts, each time."""

    def train():
        experts = nn.Parameter(torch.randn(4, 32, 32))
        inputs = torch.ones(8, 32)
        loss = sum((inputs @ experts[number]).mean() for number in range(4))
        loss.backward()
        yield loss

    whole = FLOAT * 4 * 32 * 32
    made = [
        b for b in measure(train, steps=1).ledger.blocks if b.operator == "aten::select_backward"
    ]
    assert [block.bytes for block in made] == [whole] * 4
