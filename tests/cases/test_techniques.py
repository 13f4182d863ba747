"""What people ask about techniques, each with the answer that is true to the byte.

The numbers are those of small models on a CPU. The masks of dropout are FP32 there, and one byte a
number on CUDA.
"""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memlab import compare, measure
from memlab.techniques.gradient_checkpointing import apply_gradient_checkpointing
from memlab.techniques.in_place import apply_in_place_activations
from memlab.techniques.offloading import stream_parameters

# The libraries stay what they were before the measurement: it walks all objects that are alive.
pytestmark = pytest.mark.usefixtures("objects_frozen")


# --- Log-probabilities of single tokens -----------------------------------------------------------

TOKENS, WORDS, CHUNK = 512, 8000, 64
UNIT = 4 * TOKENS * WORDS  # all logits in FP32


def at_once(logits, targets):
    return logits.float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def of_chunk(logits, targets):
    logits = logits.float()
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(-1)


def in_chunks(logits, targets, function=of_chunk):
    slices = [slice(start, start + CHUNK) for start in range(0, len(logits), CHUNK)]
    return torch.cat([function(logits[rows], targets[rows]) for rows in slices])


def recomputed(logits, targets):
    def again(*piece):
        return checkpoint(of_chunk, *piece, use_reentrant=False)

    return in_chunks(logits, targets, again)


def log_probabilities(way, whole_logits=True):
    head = nn.Linear(64, WORDS, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(TOKENS, 64, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(WORDS, (TOKENS,))
    while True:
        logits = head(hidden)
        chosen = way(logits, targets)
        loss = -chosen.mean()
        loss.backward()
        hidden.grad = head.weight.grad = None
        del logits, chosen
        yield loss


@pytest.mark.parametrize(
    ("way", "kept", "peak_bytes"),
    [(at_once, 1.5, 58_439_688), (in_chunks, 1.5, 38_987_272), (recomputed, 0.503, 26_728_072)],
)
def test_chunks_of_log_probabilities_keep_as_much_and_need_less_at_the_peak(way, kept, peak_bytes):
    measurement = measure(log_probabilities, way=way)
    assert measurement.activations_at_backward / UNIT == pytest.approx(kept, abs=0.0005)
    assert measurement.known_bytes == peak_bytes


class OfHiddenStates(nn.Module):
    """The logits are made where they are needed, and live no longer."""

    def __init__(self, way):
        super().__init__()
        self.head = nn.Linear(64, WORDS, bias=False)
        self.way = way

    def forward(self, hidden, targets):
        if self.way == "at once":
            return at_once(self.head(hidden), targets)
        return in_chunks(hidden, targets, self.again if self.way == "recomputed" else self.of_rows)

    def of_rows(self, hidden, targets):
        return of_chunk(self.head(hidden), targets)

    def again(self, *rows):
        return checkpoint(self.of_rows, *rows, use_reentrant=False)


def from_hidden_states(way):
    model = OfHiddenStates(way)
    hidden = torch.randn(TOKENS, 64, requires_grad=True)
    targets = torch.randint(WORDS, (TOKENS,))
    while True:
        chosen = model(hidden, targets)
        loss = -chosen.mean()
        loss.backward()
        model.zero_grad()
        hidden.grad = None
        yield loss


@pytest.mark.parametrize(
    ("way", "kept"), [("at once", 1.0), ("in chunks", 1.0), ("recomputed", 0.003)]
)
def test_from_hidden_states_recomputing_leaves_next_to_nothing(way, kept):
    measurement = measure(from_hidden_states, way=way)
    assert measurement.activations_at_backward / UNIT == pytest.approx(kept, abs=0.0005)


# --- LoRA -----------------------------------------------------------------------------------------

ATTENTION = ("q_proj", "v_proj")
ALL_LINEAR = (*ATTENTION, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def a_llama(transformers, layers, key_value_heads):
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        vocab_size=64,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)


def steps_of(model, tokens, autocast=False):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    text = torch.randint(64, (1, tokens))
    while True:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=text, labels=text).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def fine_tuning(transformers, peft, tokens, **lora):
    model = a_llama(transformers, layers=2, key_value_heads=4)
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(**lora))
    return steps_of(model.train(), tokens)


@functools.cache
def bytes_of_a_token(transformers, peft=None, **lora):
    """What a token more adds to what a forward leaves for its backward."""
    kept = {
        tokens: measure(
            fine_tuning, steps=1, transformers=transformers, peft=peft, tokens=tokens, **lora
        ).activations_at_backward
        for tokens in (128, 256)
    }
    return (kept[256] - kept[128]) / 128


@pytest.mark.parametrize(
    ("targets", "rank", "dropout", "percent"),
    [
        (ATTENTION, 8, 0.0, 68),
        (ATTENTION, 8, 0.1, 78),
        (ALL_LINEAR, 8, 0.0, 85),
        (ALL_LINEAR, 64, 0.0, 99.9),
        (ALL_LINEAR, 8, 0.1, 137),
        (ALL_LINEAR, 64, 0.1, 152),
    ],
)
def test_what_a_lora_keeps_for_a_token(transformers, targets, rank, dropout, percent):
    """Adapters of all layers with dropout keep more than full fine-tuning does."""
    peft = pytest.importorskip("peft")
    adapters = bytes_of_a_token(
        transformers, peft, target_modules=targets, r=rank, lora_dropout=dropout
    )
    assert 100 * adapters / bytes_of_a_token(transformers) == pytest.approx(percent, abs=0.5)


def adapters_on_bf16(transformers, peft, layers, in_fp32, autocast):
    model = a_llama(transformers, layers, key_value_heads=1).bfloat16()
    lora = peft.LoraConfig(target_modules=list(ALL_LINEAR), r=4)
    model = peft.get_peft_model(model, lora, autocast_adapter_dtype=in_fp32)
    return steps_of(model.train(), 128, autocast)


@pytest.mark.parametrize(("autocast", "more_bytes"), [(False, 400_384), (True, 146_944)])
def test_what_adapters_in_fp32_keep_for_a_layer_of_a_bf16_model(transformers, autocast, more_bytes):
    peft = pytest.importorskip("peft")

    def bytes_of_a_layer(in_fp32):
        kept = [
            measure(
                adapters_on_bf16,
                steps=1,
                transformers=transformers,
                peft=peft,
                layers=layers,
                in_fp32=in_fp32,
                autocast=autocast,
            ).activations_at_backward
            for layers in (2, 3)
        ]
        return kept[1] - kept[0]

    assert bytes_of_a_layer(in_fp32=True) - bytes_of_a_layer(in_fp32=False) == more_bytes


def test_the_frozen_base_of_a_lora_is_streamed(transformers):
    peft = pytest.importorskip("peft")

    def trained(stream):
        torch.manual_seed(0)
        model = a_llama(transformers, layers=2, key_value_heads=4)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=list(ALL_LINEAR), r=4))
        if stream:
            handle = stream_parameters(model.model.layers, min_bytes=2**14)
        torch.manual_seed(0)
        losses = [loss.item() for loss, _ in zip(steps_of(adapted, 16), range(3), strict=False)]
        if stream:
            assert handle.never_used == []
            handle.remove()
        return losses

    assert trained(stream=True) == trained(stream=False)


# --- Checkpointing that does not work -------------------------------------------------------------


def with_the_librarys_switch(transformers, switch=False):
    model = a_llama(transformers, layers=4, key_value_heads=4)
    if switch:
        model.gradient_checkpointing_enable()
    return steps_of(model.eval(), 64)


def test_checkpointing_that_is_switched_on_in_eval_mode_saves_nothing(transformers):
    off = measure(with_the_librarys_switch, transformers=transformers)
    on = measure(with_the_librarys_switch, transformers=transformers, switch=True)
    assert on.known_columns == off.known_columns
    assert on.activations_at_backward == off.activations_at_backward
    verdict = compare(off, on).verdict
    assert "Is the switch on?" in verdict and "0 of 4 blocks were recomputed" in verdict


class Frozen(nn.Module):
    """Frozen embeddings, two trained blocks, a trained head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(500, 256).requires_grad_(False)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(nn.Linear(256, 256) for _ in range(3)), nn.Tanh()) for _ in range(2)
        )
        self.head = nn.Linear(256, 500)

    def forward(self, tokens, reentrant):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True) if reentrant else block(x)
        return self.head(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("way", "bytes_"), [("reentrant", 514_000), ("ours", 2_093_008)])
def test_frozen_embeddings_and_the_reentrant_form_train_the_head_alone(way, bytes_):
    def train():
        model = Frozen()
        if way == "ours":
            apply_gradient_checkpointing(model)
        tokens = torch.arange(64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        while True:
            logits = model(tokens, reentrant=way == "reentrant")
            loss = nn.functional.cross_entropy(logits, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss

    measurement = measure(train, steps=3)
    assert measurement.timeline.bytes["gradients"].max() == bytes_
    assert measurement.losses[2] < measurement.losses[0]  # nothing looks wrong


# --- Experts --------------------------------------------------------------------------------------

EXPERTS, WIDTH = 3, 64
EXPERT_BYTES = 4 * WIDTH * WIDTH


def experts_in_a_list(gradients_stay):
    """Each step goes to the next expert, and from the fourth on to the first again."""
    experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(EXPERTS))
    optimizer = torch.optim.AdamW(experts.parameters())
    x = torch.randn(8, WIDTH)
    step = 0
    while True:
        loss = experts[step % EXPERTS](x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=not gradients_stay)
        step += 1
        yield loss


@pytest.mark.parametrize("gradients_stay", [False, True])
def test_an_experts_first_hit_adds_its_gradient_and_state_and_the_creep_ends(gradients_stay):
    after = measure(experts_in_a_list, steps=6, gradients_stay=gradients_stay).bytes_after_step
    grown = [now - before for before, now in zip(after, after[1:], strict=False)]
    first_hit = (12 if gradients_stay else 8) * WIDTH * WIDTH + 4  # and AdamW's count of steps
    assert grown == [first_hit, first_hit, 0, 0, 0]


def experts_in_one(indexed):
    weights = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))
    x = torch.randn(8, WIDTH)
    while True:
        parts = [weights[index] for index in range(EXPERTS)] if indexed else weights.unbind()
        loss = sum((x @ part).square().mean() for part in parts)
        loss.backward()
        weights.grad = None
        yield loss


def test_experts_in_one_tensor_indexed_in_a_loop_make_it_whole_for_each():
    def whole_in_backward(indexed):
        blocks = measure(experts_in_one, steps=1, indexed=indexed).ledger.blocks
        sizes = [block.bytes for block in blocks if block.phase == "backward"]
        return sizes.count(EXPERTS * EXPERT_BYTES)

    assert whole_in_backward(indexed=True) >= EXPERTS
    assert whole_in_backward(indexed=False) == 1


# --- A trial --------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_d20_a_trial_of_in_place_activations_counts_as_building(steps):
    def train(in_place=False):
        torch.manual_seed(0)
        layers = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.LeakyReLU())]
        model = nn.Sequential(*layers)
        if in_place:
            apply_in_place_activations(model, torch.randn(256, 64))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        while True:
            loss = model(torch.randn(32, 64)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss

    plain = measure(train, steps=steps)
    in_place = measure(train, steps=steps, in_place=True)
    peaks = [step.peak_bytes for step in in_place.steps]
    assert len(set(peaks)) == 1 and peaks[0] < plain.steps[0].peak_bytes
    assert in_place.building_peak_bytes == in_place.peak_bytes > 4 * peaks[0]
    assert in_place.verdict.kind == "building"


# --- Frozen in the middle of a net ----------------------------------------------------------------

BATCH, CHANNELS = 4, 8


@pytest.mark.parametrize(
    ("make", "axes", "keeps_its_input"),
    [
        (lambda: nn.Linear(CHANNELS, CHANNELS), 0, False),
        (lambda: nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1), 1, True),
        (lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), 2, True),
        (lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1), 2, True),
        (lambda: nn.BatchNorm2d(CHANNELS).eval(), 2, True),
    ],
    ids=["Linear", "Conv1d", "Conv2d", "ConvTranspose2d", "BatchNorm2d"],
)
def test_which_frozen_layers_keep_their_input(make, axes, keeps_its_input):
    shape = (BATCH, CHANNELS, *[16] * axes) if axes else (BATCH * 16, CHANNELS)
    input_bytes = 4 * torch.Size(shape).numel()

    def train(frozen):
        before = nn.Parameter(torch.randn(shape))
        layer = make().requires_grad_(not frozen)
        while True:
            # What comes in is made by an operator that keeps nothing, and so does what comes after.
            loss = (layer(before + 1.0) + 1.0).mean()
            loss.backward()
            before.grad = None
            layer.zero_grad()
            yield loss

    kept = {
        frozen: measure(train, steps=1, frozen=frozen).activations_at_backward
        for frozen in (False, True)
    }
    assert kept[False] - kept[True] == (0 if keeps_its_input else input_bytes)


def a_frozen_resnet(transformers, trained):
    config = transformers.ResNetConfig(
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2] * 4,
        layer_type="basic",
        num_labels=10,
    )
    model = transformers.ResNetForImageClassification(config).train()
    if trained == "the first half":
        model.resnet.encoder.stages[2:].requires_grad_(False)
        model.classifier.requires_grad_(False)
    if trained == "norms":
        model.requires_grad_(False).eval()
        for module in model.modules():
            module.requires_grad_(isinstance(module, nn.BatchNorm2d))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.randn(8, 3, 64, 64)
    labels = torch.randint(10, (8,))
    while True:
        loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss


@pytest.mark.parametrize(
    ("trained", "bytes_"),
    [("all", 14_145_356), ("the first half", 14_128_972), ("norms", 14_090_572)],
)
def test_a_frozen_resnet_keeps_nearly_as_much(transformers, trained, bytes_):
    measurement = measure(a_frozen_resnet, steps=1, transformers=transformers, trained=trained)
    assert measurement.activations_at_backward == bytes_


def a_frozen_vit(transformers, only_norms):
    config = transformers.ViTConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.ViTForImageClassification(config)
    if only_norms:
        for module in model.modules():
            module.requires_grad_(isinstance(module, nn.LayerNorm))
    images = torch.randn(8, 3, 64, 64)
    while True:
        loss = model(pixel_values=images, labels=torch.arange(8)).loss
        loss.backward()
        model.zero_grad()
        yield loss


def test_a_frozen_vit_keeps_less_than_two_thirds(transformers):
    whole, norms = (
        measure(
            a_frozen_vit, steps=1, transformers=transformers, only_norms=only_norms
        ).activations_at_backward
        for only_norms in (False, True)
    )
    assert norms / whole == pytest.approx(0.623, abs=0.0005)
