"""The course's switches, in the order in which a plan tries them, and what each costs in time."""

from __future__ import annotations

from dataclasses import dataclass

#: The records that the times below are from. A test holds them against it.
RECORDS = "results/nvidia-h100-80gb-hbm3-large.json"
NOTEBOOK = "11_capstone"
MODEL = "GPT-2 124M, 8 x 1,024 tokens, on an H100"


@dataclass(frozen=True)
class Switch:
    """One technique of the course, as a plan switches it on.

    Attributes:
        name: what a plan calls it.
        technique: its module under `memlab.techniques`; torch's own optimizer has none.
        takes: what it takes off.
        record: the two variants of the record between which only this was switched on.
        seconds: a step before and after, in that record.
        options: the names that a run's option for it may have.
    """

    name: str
    technique: str
    takes: str
    record: tuple[str, str]
    seconds: tuple[float, float]
    options: tuple[str, ...]

    @property
    def slower(self) -> float:
        """How many times as long a step took with it, in the record."""
        return self.seconds[1] / self.seconds[0]


# The order is that of the course: first what changes no number and repeats no work, then what
# rounds, then what computes twice or in small pieces, then what waits for a bus. (The seconds are
# of one small model, in which launching kernels costs more than it does in a large one.)
SWITCHES = (
    Switch(
        "fused AdamW",
        "",
        "the step's second copy of the model",
        ("checkpoints", "fused AdamW"),
        (0.081518, 0.094093),
        ("fused_adamw", "fused"),
    ),
    Switch(
        "fused loss",
        "compilation_and_fusion",
        "the logits, all but a chunk of tokens",
        ("BF16 autocast", "fused loss"),
        (0.0437174, 0.0911279),
        ("fused_loss",),
    ),
    Switch(
        "BF16 autocast",
        "mixed_precision",
        "half of the activations",
        ("SDPA", "BF16 autocast"),
        (0.164152, 0.0437174),
        ("bf16_autocast", "autocast", "mixed_precision"),
    ),
    Switch(
        "checkpoints",
        "gradient_checkpointing",
        "activations: a block keeps its input",
        ("fused loss", "checkpoints"),
        (0.0911279, 0.081518),
        ("checkpoints", "checkpointing", "gradient_checkpointing"),
    ),
    Switch(
        "BF16 weights",
        "low_precision",
        "half of weights, gradients and state",
        ("fused AdamW", "BF16 weights"),
        (0.094093, 0.154788),
        ("bf16_weights", "low_precision"),
    ),
    Switch(
        "8-bit AdamW",
        "lean_optimizers",
        "state: a byte a number",
        ("BF16 weights", "8-bit AdamW"),
        (0.154788, 0.140342),
        ("adamw_8bit", "eight_bit_adamw", "adamw8bit"),
    ),
    Switch(
        "micro-batches",
        "gradient_accumulation",
        "activations: those of a part of the batch",
        ("8-bit AdamW", "micro-batches"),
        (0.140342, 0.379489),
        ("micro_batches", "gradient_accumulation"),
    ),
    Switch(
        "optimizer in backward",
        "gradient_accumulation",
        "gradients: one at a time",
        ("micro-batches", "optimizer in backward"),
        (0.379489, 0.489158),
        ("optimizer_in_backward",),
    ),
    Switch(
        "activation offloading",
        "offloading",
        "what is kept for backward",
        ("tied, in tiles", "activations far"),
        (0.721331, 0.475903),
        ("activations_far", "offload_activations"),
    ),
    Switch(
        "optimizer state offloading",
        "offloading",
        "the optimizer's state",
        ("activations far", "state far"),
        (0.475903, 0.520109),
        ("state_far", "offload_optimizer_state"),
    ),
    Switch(
        "parameter offloading",
        "offloading",
        "the blocks' weights, gradients and state",
        ("lean start", "blocks far"),
        (0.500865, 0.740281),
        ("parameters_far", "stream_parameters", "offload_parameters"),
    ),
)

BY_NAME = {switch.name: switch for switch in SWITCHES}

#: A step does nothing twice and rounds nothing for these: they are never worth leaving out.
FREE = ("fused AdamW", "fused loss", "BF16 autocast")
