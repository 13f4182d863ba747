"""Cases: what a block is: its type, its operator, its model, and whose state."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

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


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=1000,
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
        model = prepare(tiny_llama())
        tokens = torch.randint(1000, (1, 8))
        with watch(model) as w, torch.no_grad():
            model(input_ids=tokens)
        return w.measurement.by_dtype().bytes["parameters"]

    before = bytes_of(lambda model: model)
    after = bytes_of(peft.prepare_model_for_kbit_training)
    buffers = 2 * 16 * 2  # the rotary embedding's two lists of frequencies stay
    assert after["BF16"] == buffers
    assert after["FP32"] == 2 * (before["BF16"] - buffers)


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
