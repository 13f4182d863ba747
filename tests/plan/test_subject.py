"""A model and a run as what is planned: their switches, and the least that they need."""

from memlab.plan import ModelSubject, RunSubject
from memlab.plan.script import Model


def subject(batch=4, lora=None, **changes):
    fields = {
        "name": "a model",
        "config_source": "AutoConfig()",
        "auto_class": "AutoModel",
        "sixteen_bits": False,
        "parameters": 1000,
    }
    return ModelSubject(Model(**fields | changes), batch, 16, lora)


def test_what_does_not_suit_a_model_is_no_switch_for_it():
    every = set(subject().switches)
    assert every - set(subject(sixteen_bits=True).switches) == {"BF16 autocast", "BF16 weights"}
    assert every - set(subject(images=True).switches) == {"fused loss"}
    assert every - set(subject(batch=1).switches) == {"micro-batches"}


def test_a_later_switch_replaces_an_earlier_one():
    on = ("fused AdamW", "BF16 autocast", "checkpoints", "BF16 weights")
    assert subject().in_force(on) == ("checkpoints", "BF16 weights")
    on = ("fused AdamW", "checkpoints", "8-bit AdamW", "micro-batches", "optimizer in backward")
    assert subject().in_force(on) == on[2:]
    on += ("parameter offloading",)
    assert subject().in_force(on) == ("checkpoints", *on[2:4], on[-1])


def test_the_least_is_weights_gradients_and_state():
    # Bytes a parameter: FP32; BF16; a byte for each of two moments, with a scale for 256.
    assert subject().least_bytes(()) == 16_000
    assert subject(sixteen_bits=True).least_bytes(()) == 8_000
    assert subject().least_bytes(("BF16 weights",)) == 8_000
    assert subject().least_bytes(("8-bit AdamW",)) == 8_000 + 2_000 + 2 * 1000 * 4 // 256
    assert subject().least_bytes(("optimizer in backward",)) == 12_000
    assert subject().least_bytes(("optimizer in backward", "optimizer state offloading")) == 4_000
    assert subject(lora=8).least_bytes(()) == 4_000


def test_a_run_has_the_switches_that_it_has_options_for():
    def train(batch=1, checkpointing=False, fused_loss=False, state_far=True): ...

    assert RunSubject(train).switches == ("fused loss", "checkpoints")
    given = RunSubject(train, {"fused_loss": True, "batch": 2})
    assert given.switches == ("checkpoints",) == given.in_force(("checkpoints",))
    assert given.code(("checkpoints",), 1) == (
        "train(fused_loss=True, batch=2, checkpointing=True)\n"
    )
