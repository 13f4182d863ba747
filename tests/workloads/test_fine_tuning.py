"""The fine-tuning loop: what its switches change in a prediction, and what it refuses."""

import functools
import json

import pytest

from memlab import predict
from memlab.workloads.fine_tuning import fine_tune

TOKENS = 64
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
LOGITS = 4 * TOKENS * SIZES["vocab_size"]  # one FP32 tensor


@pytest.fixture(scope="module")
def needs(tmp_path_factory):
    """A small Llama's prediction, by the switches that are on."""
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("llama") / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **SIZES}))

    @functools.cache
    def predicted(**options):
        options = {"sequence": TOKENS, **options}
        return predict(fine_tune, model=str(path), progress=False, **options)

    return predicted


def test_full_fine_tuning_has_sixteen_bytes_a_parameter(needs):
    most = {column: values.max() for column, values in needs().timeline.bytes.items()}
    assert most["optimizer_state"] == pytest.approx(2 * most["parameters"], rel=1e-2)
    assert most["gradients"] == pytest.approx(most["parameters"], rel=1e-2)


def test_a_lora_has_a_base_of_two_bytes_a_parameter(needs):
    pytest.importorskip("peft")
    full, lora = needs(), needs(lora=True)
    adapters = lora.columns["optimizer_state"] / 2  # FP32, as AdamW's moments
    base = lora.columns["parameters"] - adapters
    assert base == pytest.approx(full.columns["parameters"] / 2, rel=1e-2)
    assert 0 < adapters < base


def test_mixed_precision_shrinks_activations_and_a_frozen_base(needs):
    pytest.importorskip("peft")
    full, fp32 = needs(), needs(mixed_precision=False)
    assert full.columns["parameters"] == fp32.columns["parameters"]
    lora, lora_fp32 = needs(lora=True), needs(lora=True, mixed_precision=False)
    assert lora.activations_at_backward < lora_fp32.activations_at_backward
    adapters = lora.columns["optimizer_state"] / 2
    base, base_fp32 = (run.columns["parameters"] - adapters for run in (lora, lora_fp32))
    assert base == pytest.approx(base_fp32 / 2, rel=1e-2)


def test_each_switch_takes_bytes_off_at_its_place(needs):
    plain = needs()
    kept = plain.activations_at_backward
    assert needs(checkpoints=True).activations_at_backward < kept
    assert needs(fused_loss=True).activations_at_backward <= kept - LOGITS
    offloaded = needs(offload=True)
    assert offloaded.activations_at_backward <= kept - LOGITS
    assert offloaded.host_columns["activations"] >= LOGITS
    state = needs(adamw_8bit=True).columns["optimizer_state"]
    assert state < 0.35 * plain.columns["optimizer_state"]


def test_a_step_that_is_not_fused_makes_a_copy_of_the_weights(needs):
    fused, foreach = needs(sequence=1), needs(sequence=1, fused_adamw=False)
    assert foreach.phase == "optimizer"
    assert foreach.columns["temporaries"] == pytest.approx(foreach.columns["parameters"], rel=1e-2)
    assert fused.peak_bytes < foreach.peak_bytes


def test_micro_batches_divide_the_activations_and_let_gradients_wait(needs):
    whole, in_four = needs(batch=4), needs(batch=4, micro_batches=4)
    # Not a quarter: autocast's copies of the weights are the same for each of the four.
    assert in_four.activations_at_backward < 0.35 * whole.activations_at_backward
    assert in_four.columns["gradients"] == pytest.approx(whole.columns["parameters"], rel=1e-2)


def test_an_optimizer_in_backward_holds_the_gradients_of_a_few_weights(needs):
    waiting, stepped = (
        needs(sequence=1, in_backward=in_backward).timeline.bytes["gradients"].max()
        for in_backward in (False, True)
    )
    largest = 4 * SIZES["vocab_size"] * SIZES["hidden_size"]
    assert largest <= stepped < 1.2 * largest < 0.6 * waiting


def test_bf16_weights_halve_the_models_state(needs):
    full, short = needs(), needs(bf16_weights=True)
    for column in ("parameters", "gradients", "optimizer_state"):
        most, halved = (run.timeline.bytes[column].max() for run in (full, short))
        assert halved == pytest.approx(most / 2, rel=1e-2)
    state = needs(bf16_weights=True, adamw_8bit=True).columns["optimizer_state"]
    assert state < 0.7 * short.columns["optimizer_state"]


def test_a_data_set_on_the_gpu_has_eight_bytes_a_token(needs):
    count = 1000
    kept = needs(sequences_on_gpu=count).columns["kept"] - needs().columns["kept"]
    assert kept == pytest.approx(8 * count * TOKENS, abs=4096)


def test_an_mlp_in_chunks_keeps_no_wide_tensor(needs):
    options = {"fused_loss": True, "mixed_precision": False}
    kept, chunked = (needs(mlp_chunk=chunk, **options) for chunk in (None, TOKENS // 4))
    wide = 4 * TOKENS * SIZES["intermediate_size"]  # in FP32, and there are four in a layer
    shrinks = kept.activations_at_backward - chunked.activations_at_backward
    assert shrinks == pytest.approx(4 * wide * SIZES["num_hidden_layers"], rel=0.1)


def test_fewer_layers_have_fewer_parameters(needs):
    one, two, three = (needs(layers=layers).columns["parameters"] for layers in (1, 2, 3))
    assert three - two == two - one > 0 and three == needs().columns["parameters"]


def test_half_of_the_channels_are_half_of_the_mlps_weights(needs):
    whole, half = (needs(channels=share).columns["parameters"] for share in (1.0, 0.5))
    mlps = 3 * SIZES["num_hidden_layers"] * SIZES["hidden_size"] * SIZES["intermediate_size"]
    assert whole - half == 4 * mlps / 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "Lama 8B"}, "no model is known as 'Lama 8B'"),
        ({"sequence": 1025}, "GPT-2 124M reads at most 1,024 tokens, not 1,025"),
        ({"batch": 0}, "batch has to be a whole number of at least 1, not 0"),
        ({"sequence": 1.5}, "sequence has to be a whole number of at least 1, not 1.5"),
        ({"batch": 4, "micro_batches": 3}, "a batch of 4 cannot be cut into 3 equal micro-batches"),
        ({"batch": 2, "micro_batches": 2, "in_backward": True}, "leave in_backward out"),
        ({"lora": True, "bf16_weights": True}, "base of a LoRA is in BF16 already"),
        ({"layers": -1}, "layers has to be a whole number of at least 1, not -1"),
        ({"channels": 0}, "channels has to be a share above 0 and at most 1, not 0"),
        ({"sequences_on_gpu": -1}, "sequences_on_gpu has to be a whole number of at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=words):
        predict(fine_tune, progress=False, **options)


def test_of_a_sharded_model_each_rank_holds_its_part(needs):
    whole, sharded = needs(checkpoints=True), needs(checkpoints=True, ranks=4, shard=True)
    assert sharded.columns["optimizer_state"] == pytest.approx(
        whole.columns["optimizer_state"] / 4, rel=0.05
    )
    # The weights are never all there: the model is built without bytes.
    most = sharded.timeline.bytes["parameters"].max()
    assert most < 0.8 * whole.columns["parameters"]
