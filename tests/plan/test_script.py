"""The printed lines run as they are: each script is executed, and predicted."""

import pytest

from memlab import predict
from memlab.plan.given import subject_of

pytestmark = pytest.mark.slow

MICRO = ("fused AdamW", "fused loss", "checkpoints", "8-bit AdamW", "micro-batches")
ROUNDED = ("BF16 autocast", "checkpoints", "BF16 weights", "optimizer state offloading")


def config_of(kind):
    transformers = pytest.importorskip("transformers")
    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=512, n_embd=64, n_layer=2, n_head=2, n_positions=64
        )
    if kind == "vit":
        return transformers.ViTConfig(
            image_size=16, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=2
        )
    return transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        dtype="bfloat16",
    )


@pytest.mark.parametrize(
    ("kind", "on", "lora"),
    [
        ("llama", MICRO, None),
        ("llama", "all but parameter offloading", None),
        ("llama", "all", None),
        ("llama", ("fused loss", "checkpoints"), 4),
        ("llama", ("checkpoints", "parameter offloading"), 4),
        ("gpt2", ROUNDED, None),
        ("vit", "all but parameter offloading", None),
    ],
)
def test_a_script_runs_as_it_is(kind, on, lora):
    if lora is not None:
        pytest.importorskip("peft")
    sequence = None if kind == "vit" else 32
    subject = subject_of(config_of(kind), 4, sequence, lora, {})
    if "all" in on:
        on = subject.switches if on == "all" else subject.switches[:-1]
    run, options = subject.run(on, 2)
    prediction = predict(run, gpu="24 GiB", progress=False, **options)
    assert prediction.columns["parameters"] > 0
    if "parameter offloading" in on:
        assert prediction.host_bytes > prediction.columns["parameters"] / 2
    # No name is imported for nothing, and no line is too long to read but the configuration's.
    code = subject.code(on, 2)
    imported = [
        line.split(" import ")[1].split(", ") for line in code.split("\n") if " import " in line
    ]
    for name in sum(imported, []):
        assert code.count(name) > 1, name
