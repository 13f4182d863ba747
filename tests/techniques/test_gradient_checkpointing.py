"""Gradient checkpointing: the same gradients to the bit, the expected bytes, and clear refusals."""

import gc
import itertools
import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from memlab.techniques.gradient_checkpointing import MATRIX_PRODUCTS, apply_gradient_checkpointing
from memlab.workloads import gpt, vit
from tests.helpers import (
    a_resnet,
    a_t5,
    a_unet,
    a_whisper,
    equal,
    saved_bytes,
    small_gpt2,
    small_llama,
)

HIDDEN, BATCH, SEQUENCE = 32, 2, 8
UNIT = BATCH * SEQUENCE * HIDDEN * 4  # bytes of one (batch, sequence, hidden) tensor in FP32
CPU_RNG_BYTES = torch.get_rng_state().nbytes
ADDMM = torch.ops.aten.addmm.default
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Block(nn.Module):
    """A transformer block that counts its calls."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.query_key_value = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.projection = nn.Linear(HIDDEN, HIDDEN)
        self.mlp = nn.Sequential(
            nn.LayerNorm(HIDDEN),
            nn.Linear(HIDDEN, 4 * HIDDEN),
            nn.GELU(),
            nn.Linear(4 * HIDDEN, HIDDEN),
        )
        self.dropout = nn.Dropout(dropout)
        self.calls = 0

    def forward(self, x, shift=None):
        self.calls += 1
        if shift is not None:
            x = x + shift
        batch, sequence, hidden = x.shape
        query, key, value = (
            part.view(batch, sequence, 2, -1).transpose(1, 2)
            for part in self.query_key_value(self.norm(x)).split(hidden, 2)
        )
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.projection(y.transpose(1, 2).reshape(batch, sequence, hidden)))
        return x + self.dropout(self.mlp(x))


class Tower(nn.Module):
    def __init__(self, layers=4, dropout=0.0):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(layers))

    def forward(self, x, **kwargs):
        for block in self.blocks:
            x = block(x, **kwargs)
        return x


def tower_of(function):
    """A model of one block that computes `function`."""
    block = nn.Module()
    block.forward = function
    return nn.Sequential(block)


def inputs(requires_grad=False):
    return torch.randn(BATCH, SEQUENCE, HIDDEN, requires_grad=requires_grad)


def gradients(run, tensors):
    """Loss and gradients of one seeded forward and backward, and the random number
    drawn after it.
    """
    for tensor in tensors:
        tensor.grad = None
    torch.manual_seed(7)
    loss = run().float().square().mean()
    loss.backward()
    # Without dropout, the next number shows that the recomputation left the random state alone.
    return [loss.detach(), torch.rand(3), *(tensor.grad for tensor in tensors)]


def allocated_bytes(run, tmp_path):
    """What `run` leaves allocated in the CPU's allocator, while the garbage collector is off."""
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = run()
    finally:
        gc.enable()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    del result
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    return sum(event["args"]["Bytes"] for event in events if event["name"] == "[memory]")


def count_operators(run, operator):
    count = 0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, called, types, args=(), kwargs=None):
            nonlocal count
            count += called is operator
            return called(*args, **(kwargs or {}))

    with Counter():
        run()
    return count


# --- The gradients --------------------------------------------------------------------------------

OPTIONS = {
    "every block": {},
    "every second": {"every": 2},
    "products kept": {"save": MATRIX_PRODUCTS},
    "one operator kept": {"save": [ADDMM]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    "autocast", [None, {}, {"cache_enabled": False}], ids=["fp32", "bf16", "bf16-uncached"]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_the_plain_model_to_the_bit(dropout, autocast, options):
    tower, x = Tower(3, dropout), inputs(requires_grad=True)
    tensors = [x, *tower.parameters()]

    def run():
        # Only the forward pass is under autocast: the recomputation must restore it.
        with torch.autocast(
            "cpu", torch.bfloat16, enabled=autocast is not None, **(autocast or {})
        ):
            return tower(x, shift=0.5)

    plain = gradients(run, tensors)
    apply_gradient_checkpointing(tower, **options)
    checkpointed = gradients(run, tensors)
    assert all(gradient.any() for gradient in checkpointed)
    assert equal(checkpointed, plain)


def test_dropout_without_the_random_state_gives_other_gradients():
    tower, x = Tower(1, dropout=0.3), inputs(requires_grad=True)
    tensors = [x, *tower.parameters()]
    plain = gradients(lambda: tower(x), tensors)
    apply_gradient_checkpointing(tower, preserve_rng_state=False)
    checkpointed = gradients(lambda: tower(x), tensors)
    assert torch.equal(checkpointed[0], plain[0])  # the loss is right: nobody would notice
    assert not torch.equal(checkpointed[2], plain[2])


def test_without_grad_the_blocks_are_called_once_and_compute_the_same():
    tower, x = Tower(4), inputs()
    plain = tower(x)
    for options in OPTIONS.values():
        with apply_gradient_checkpointing(tower, **options):
            for block in tower.blocks:
                block.calls = 0
            with torch.no_grad():
                assert torch.equal(tower(x), plain)
            with torch.inference_mode():
                assert torch.equal(tower(x), plain)
            assert [block.calls for block in tower.blocks] == [2] * 4


def model_and_run(name):
    tokens = torch.randint(50, (BATCH, SEQUENCE))
    if name in ("gpt2", "llama"):
        if name == "gpt2":
            dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
            model = small_gpt2(
                vocab_size=50, n_layer=4, n_embd=HIDDEN, n_positions=SEQUENCE, **dropout
            )
        else:
            layout = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
            sizes = {"hidden_size": HIDDEN, "intermediate_size": 48, "tie_word_embeddings": False}
            model = small_llama(vocab_size=50, **layout, **sizes)
        return model, lambda: model(input_ids=tokens, use_cache=False).logits
    if name == "gpt":
        model = gpt.GPT(gpt.tiny(dropout=0.1))
        return model, lambda: model(tokens)
    if name == "vit":
        model = vit.ViT(vit.small(layers=4, dropout=0.1))
        size = model.config.image_size
        images = torch.randn(BATCH, model.config.channels, size, size)
        return model, lambda: model(images)
    x = inputs()
    model = nn.Sequential(*(Block(0.1) for _ in range(4)))
    return model, lambda: model(x)


@pytest.mark.parametrize("name", ["sequential", "gpt", "vit", "gpt2", "llama"])
def test_every_model_from_outside(name):
    model, run = model_and_run(name)
    parameters = list(model.parameters())
    plain, before = gradients(run, parameters), saved_bytes(run, parameters)
    names, keys = [name for name, _ in model.named_parameters()], list(model.state_dict())
    blocks = list(model) if name == "sequential" else None
    for options in OPTIONS.values():
        with apply_gradient_checkpointing(model, blocks, **options):
            assert equal(gradients(run, parameters), plain), options
            assert saved_bytes(run, parameters) < before, options
            assert [name for name, _ in model.named_parameters()] == names
            assert list(model.state_dict()) == keys
    assert equal(gradients(run, parameters), plain)
    assert saved_bytes(run, parameters) == before


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_hugging_face_records_the_same_hidden_states(name):
    model, _ = model_and_run(name)
    model.eval()  # no dropout: two runs compare
    tokens = torch.randint(50, (BATCH, SEQUENCE))
    run = partial(model, input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    plain = run(output_hidden_states=True).hidden_states
    apply_gradient_checkpointing(model)
    assert equal(run(output_hidden_states=True).hidden_states, plain)


def test_blocks_with_hooks_keywords_and_several_outputs():
    class Pair(Block):
        def forward(self, x, *, shift, preserve_rng_state):
            # The second name is one of torch.utils.checkpoint's own.
            assert preserve_rng_state == "a name"
            return super().forward(x, shift), x.detach().mean()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Pair(0.1) for _ in range(3))

        def forward(self, x):
            total = 0.0
            for layer in self.layers:
                x, mean = layer(x, shift=x, preserve_rng_state="a name")
                total = total + mean
            return x + total

    model, x, seen = Model(), inputs(True), []
    tensors = [x, *model.parameters()]
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, args, output: seen.append((args[0], output[0])))
    plain = gradients(lambda: model(x), tensors)
    plain_seen = list(itertools.chain(*seen))
    for options in OPTIONS.values():
        seen.clear()
        with apply_gradient_checkpointing(model, **options):
            assert equal(gradients(lambda: model(x), tensors), plain)
        assert equal(list(itertools.chain(*seen)), plain_seen)  # once, not in backward


def test_batch_norm_counts_twice_as_documented():
    model, x = nn.Sequential(nn.BatchNorm1d(4)), torch.randn(8, 4, requires_grad=True)
    plain = gradients(lambda: model(x), [x])
    apply_gradient_checkpointing(model)
    assert equal(gradients(lambda: model(x), [x]), plain)
    assert model[0].num_batches_tracked == 3


# --- The bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "checkpointed"), [(1, 6), (2, 3), (4, 2), (6, 1)])
def test_a_checkpointed_block_keeps_its_input_and_nothing_else(every, checkpointed):
    tower, x = Tower(6), inputs()
    parameters = list(tower.parameters())
    plain = saved_bytes(lambda: tower.blocks[0](x), parameters)
    assert plain > 15 * UNIT
    handle = apply_gradient_checkpointing(tower, every=every)
    assert handle.names == [f"blocks.{index}" for index in range(0, 6, every)]
    # A block that stays keeps its input as the one before has its own kept.
    kept = saved_bytes(lambda: tower(x), parameters)
    assert kept == checkpointed * UNIT + (6 - checkpointed) * plain


def test_allocated_bytes_are_the_inputs_and_the_random_states_and_all_are_freed(tmp_path):
    tower, x = Tower(8), inputs()
    for parameter in tower.parameters():
        parameter.grad = torch.zeros_like(parameter)
    apply_gradient_checkpointing(tower)
    tower(x).sum().backward()  # whatever is allocated once and for all
    # Seven inputs (the first was there before), the output, and the random state at each call.
    assert allocated_bytes(lambda: tower(x), tmp_path) == 8 * UNIT + 8 * CPU_RNG_BYTES
    assert allocated_bytes(lambda: tower(x).sum().backward(), tmp_path) == 0


def test_kept_outputs_cost_their_bytes_and_no_more(tmp_path):
    tower, x = Tower(1), inputs()
    apply_gradient_checkpointing(tower, save=MATRIX_PRODUCTS, preserve_rng_state=False)
    for parameter in tower.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tower(x).sum().backward()
    # query, key and value 3, attention 1 (and its log-sum-exp), projection 1, expansion 4, the
    # product after it 1, and the output of the block 1.
    log_sum_exp = BATCH * 2 * SEQUENCE * 4
    assert allocated_bytes(lambda: tower(x), tmp_path) == 11 * UNIT + log_sum_exp
    assert allocated_bytes(lambda: tower(x).sum().backward(), tmp_path) == 0


@pytest.mark.parametrize("segments", [1, 2, 3, 6])
def test_blocks_in_a_sequential_are_checkpointed_as_one(segments):
    tower, x = Tower(6, dropout=0.1), inputs(True)
    tensors = [x, *tower.parameters()]
    plain = gradients(lambda: tower(x), tensors)
    starts = range(0, 6, 6 // segments)
    tower.blocks = nn.ModuleList(
        nn.Sequential(*tower.blocks[start : start + 6 // segments]) for start in starts
    )
    apply_gradient_checkpointing(tower)
    assert equal(gradients(lambda: tower(x), tensors), plain)
    assert saved_bytes(lambda: tower(x)) == segments * UNIT


def test_inside_an_offload_only_what_goes_in_is_offloaded():
    tower, x, shift = Tower(1, dropout=0.3), inputs(True), inputs(True)
    tensors = [x, shift, *tower.parameters()]
    plain = gradients(lambda: tower(x, shift=shift), tensors)
    apply_gradient_checkpointing(tower)
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.detach().clone()

    def offloaded():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda copied: copied.clone()):
            return tower(x, shift=shift)

    assert equal(gradients(offloaded, tensors), plain)
    assert packed == [x.shape, shift.shape]


# --- What is kept besides -------------------------------------------------------------------------


def test_kept_products_and_attention_are_not_computed_again():
    def computed_again(operator, **options):
        tower = Tower(1)
        apply_gradient_checkpointing(tower, **options)
        return count_operators(tower(inputs()).sum().backward, operator)

    assert torch.Tag.nondeterministic_seeded in ATTENTION.tags
    # The fourth product comes after all that is saved.
    assert computed_again(ADDMM) == 3 and computed_again(ADDMM, save=MATRIX_PRODUCTS) == 0
    assert computed_again(ATTENTION) == 1 and computed_again(ATTENTION, save=MATRIX_PRODUCTS) == 0


def test_attention_with_dropout_is_computed_again_though_it_is_to_be_kept():
    """Or what draws after it would draw its numbers, and backward differentiate another network."""
    library = torch.library.Library("memlab_checkpointing", "FRAGMENT")
    library.define(
        "attention(Tensor x, float dropout_p) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,)
    )
    library.impl("attention", lambda x, p: x.clone().bernoulli_(1 - p) + x, "CPU")
    operator = torch.ops.memlab_checkpointing.attention.default
    torch.library.register_autograd(
        "memlab_checkpointing::attention", lambda ctx, gradient: (gradient, None), lib=library
    )
    x = inputs(True)

    def function(x, probability):
        return F.dropout(operator(x, probability).sin(), 0.5).exp()

    for probability in (0.5, 0.0):
        model = tower_of(partial(function, probability=probability))
        plain = gradients(lambda model=model: model(x), [x])
        apply_gradient_checkpointing(model, save=[operator])
        if probability:
            assert equal(gradients(lambda model=model: model(x), [x]), plain)
        again = count_operators(model(x).sum().backward, operator)
        assert again == (probability > 0)


def test_a_kept_output_that_is_changed_in_place_is_refused():
    linear = nn.Linear(HIDDEN, HIDDEN)
    model = tower_of(lambda x: linear(x).add_(1).sin().exp())
    apply_gradient_checkpointing(model, save=MATRIX_PRODUCTS)
    with pytest.raises(RuntimeError, match="selective activation checkpoint has been mutated"):
        model(inputs(True)).sum().backward()


@pytest.mark.parametrize(
    ("save", "error", "message"),
    [
        (torch.ops.aten.mm, TypeError, "save must be operators, as torch.ops.aten.mm.default"),
        (["mm"], TypeError, "but has 'mm'"),
        (3, TypeError, "but has 3"),
        ([torch.mm], TypeError, "save must be operators"),
        ([torch.ops.aten.rand_like.default], ValueError, "aten::rand_like draws random numbers"),
    ],
)
def test_save_refuses_what_cannot_be_kept(save, error, message):
    tower = Tower(1)
    with pytest.raises(error, match=message):
        apply_gradient_checkpointing(tower, save=save)
    assert "forward" not in vars(tower.blocks[0])


# --- Blocks that cannot be repeated ---------------------------------------------------------------


def test_a_block_that_does_something_else_the_second_time_is_refused():
    functions = iter([lambda x: x.sin().cos(), lambda x: x[:, :4].sin().cos()])
    model = tower_of(lambda x: next(functions)(x))
    apply_gradient_checkpointing(model)
    with pytest.raises(RuntimeError, match="have different metadata"):
        model(inputs(True)).sum().backward()


def test_a_cache_that_grows_is_refused():
    cache = []

    def function(x):
        cache.append(x)
        return torch.cat(cache, 1).sin()

    model = tower_of(function)
    apply_gradient_checkpointing(model)
    with pytest.raises(RuntimeError, match="have different metadata"):
        model(inputs(True)).sum().backward()


@pytest.mark.parametrize("keyword", [False, True])
def test_an_input_changed_in_between_is_refused(keyword):
    tower, x, shift = Tower(1), inputs(True) * 1, inputs()
    apply_gradient_checkpointing(tower)
    loss = tower(x, shift=shift).square().sum()
    with torch.no_grad():
        (shift if keyword else x).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- Which blocks ---------------------------------------------------------------------------------


class Mixture(nn.Module):
    """Two lists on the outside, the shorter first; a longer list of experts within each block."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.mixed = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()] * 5)
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))


def checkpointed(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_blocks_are_found_or_named():
    model = Mixture()
    layers = ["layers.0", "layers.1", "layers.2"]
    for blocks, names in (
        (None, layers),
        (Mixture.Layer, layers),
        (model.layers, layers),
        ([model.layers[2], model.heads[0]], ["layers.2", "heads.0"]),
        (iter([model.layers[1]] * 2), ["layers.1"]),
    ):
        with apply_gradient_checkpointing(model, blocks) as handle:
            assert handle.names == names and checkpointed(model) == sorted(names)
    assert checkpointed(model) == []


ALL_LISTS = {
    "T5": (a_t5, ["encoder.block.0-2", "decoder.block.0-2"], 6),
    "Whisper": (a_whisper, ["model.encoder.layers.0-1", "model.decoder.layers.0-2"], 8),
    "ResNet": (a_resnet, ["resnet.encoder.stages.0-3"], 2),
    "U-Net": (a_unet, ["down.0-1", "middle.0-0", "up.0-2"], 4),
}


@pytest.mark.parametrize(("make", "lists", "left"), ALL_LISTS.values(), ids=ALL_LISTS)
def test_all_lists_of_blocks_are_found_and_the_rest_is_named(make, lists, left):
    model, run = make()
    tensors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = gradients(run, tensors)
    plain = saved_bytes(run, model.parameters())
    handle = apply_gradient_checkpointing(model)
    names = []
    for block_list in lists:
        prefix, _, numbers = block_list.rpartition(".")
        first, last = numbers.split("-")
        names += [f"{prefix}.{number}" for number in range(int(first), int(last) + 1)]
    assert handle.names == names
    assert equal(gradients(run, tensors), expected)
    assert saved_bytes(run, model.parameters()) < 0.6 * plain
    # What is left has parameters, and together with the blocks it is the model.
    parts = [model.get_submodule(name) for name in (*handle.names, *handle.left)]
    covered = {parameter for part in parts for parameter in part.parameters()}
    assert len(handle.left) == left and covered == set(model.parameters())


def test_a_list_of_other_layers_counts_only_where_there_is_no_list_of_blocks():
    heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
    with apply_gradient_checkpointing(nn.Sequential(nn.ReLU(), heads)) as handle:
        assert handle.names == [f"1.{number}" for number in range(5)]
    with apply_gradient_checkpointing(nn.Sequential(heads, Tower(1))) as handle:
        assert handle.names == ["1.blocks.0"] and handle.left == ["0"]


@pytest.mark.parametrize(
    ("blocks", "options", "message"),
    [
        ([], {}, "No blocks found in Mixture: pass blocks="),
        (nn.Conv2d, {}, "No blocks found in Mixture: pass blocks="),
        ([nn.Linear(2, 2)], {}, "No blocks found in Mixture: pass blocks="),
        (["layers.0"], {}, "No blocks found in Mixture: pass blocks="),
        (Mixture.Layer(), {}, "No blocks found in Mixture: pass blocks="),
        (None, {"every": 0}, "every must be an int from 1 to 3, but it is 0"),
        (None, {"every": 4}, "from 1 to 3"),
        (None, {"every": 2.0}, "every must be an int"),
    ],
)
def test_wrong_blocks_and_counts_are_refused(blocks, options, message):
    model = Mixture()
    with pytest.raises(ValueError, match=message):
        apply_gradient_checkpointing(model, blocks, **options)
    assert checkpointed(model) == []


def test_a_model_without_a_list_of_blocks_says_what_to_pass():
    with pytest.raises(ValueError, match="No blocks found in Sequential: pass blocks="):
        apply_gradient_checkpointing(nn.Sequential(Block(), nn.ReLU()))


def test_applying_twice_is_refused_and_changes_nothing():
    tower = Tower(4)
    handle = apply_gradient_checkpointing(tower, every=2)
    with pytest.raises(ValueError, match="already: remove"):
        apply_gradient_checkpointing(tower)
    assert checkpointed(tower) == ["blocks.0", "blocks.2"]
    apply_gradient_checkpointing(tower, [tower.blocks[1]])  # another block is no second time
    handle.remove()
    apply_gradient_checkpointing(tower, [tower.blocks[0]])


# --- On a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("save", [None, MATRIX_PRODUCTS])
def test_random_state_and_autocast_on_a_gpu(save):
    """Fused attention draws its own dropout mask there, which a kept output must not leave
    undrawn.
    """
    weight = (torch.randn(64, 64, device="cuda") / 8).requires_grad_()
    x = torch.randn(2, 64, 64, device="cuda", requires_grad=True)

    def block(x):
        query = (x @ weight).view(2, 64, 4, 16).transpose(1, 2)
        y = F.scaled_dot_product_attention(query, query, query, dropout_p=0.2, is_causal=True)
        return F.dropout(y.transpose(1, 2).reshape(2, 64, 64) @ weight, 0.2).exp()

    model = tower_of(block)

    def run():
        with torch.autocast("cuda", torch.float16):
            return model(x)

    plain = gradients(run, [x, weight])
    apply_gradient_checkpointing(model, save=save)
    assert equal(gradients(run, [x, weight]), plain)
