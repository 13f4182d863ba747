"""A model without its memory, and how it gets its numbers: never two copies of more than one
tensor.
"""

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from memlab import measure
from memlab.techniques.lean_start import materialize
from memlab.techniques.offloading import far_like
from memlab.workloads import gpt
from tests.helpers import numbers_of, small_gpt, small_llama


def on_meta(make, dtype=torch.float32):
    with torch.device("meta"):
        return make().to(dtype)


def on_the_cpu(name, like):
    return torch.empty_like(like, device="cpu")


def test_a_model_gets_its_numbers_and_runs_as_the_one_they_are_from():
    expected, model = small_gpt(), on_meta(small_gpt)
    model.blocks[0].mlp.expansion.weight.requires_grad_(False)
    asked = []

    def place(name, like):
        assert like.is_meta
        asked.append(name)
        return on_the_cpu(name, like)

    assert materialize(model, expected.state_dict(), place) is None
    assert asked == [name for name, _ in expected.named_parameters()]  # the tied one once
    assert model.head.weight is model.token_embedding.weight
    assert type(model.head.weight) is nn.Parameter
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "blocks.0.mlp.expansion.weight"
    ]
    for name, number in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], number)
        assert model.state_dict()[name].data_ptr() != number.data_ptr()

    model.requires_grad_(True)
    tokens, targets = torch.randint(500, (2, 2, 24))
    losses = [each(tokens, targets) for each in (model, expected)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for parameter, original in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter.grad, original.grad)


def test_buffers_of_every_kind_and_what_is_shared_within_a_module():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = self.two = nn.Parameter(torch.arange(6.0).view(2, 3))
            self.inner = nn.BatchNorm1d(3)
            self.register_buffer("kept", torch.arange(3))
            self.register_buffer("unsaved", torch.ones(2), persistent=False)
            self.register_buffer("nothing", None)
            self.inner.register_buffer("same", self.kept)

    expected, model = Odd(), on_meta(Odd)
    materialize(model, numbers_of(expected), on_the_cpu)
    assert model.one is model.two and model.inner.same is model.kept and model.nothing is None
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model.state_dict().keys() == expected.state_dict().keys()  # "unsaved" stays so
    assert all(map(torch.equal, numbers_of(model).values(), numbers_of(expected).values()))


def test_numbers_are_converted_as_they_are_copied_and_lie_where_place_says(tmp_path):
    expected, model = small_gpt(), on_meta(small_gpt, torch.bfloat16)

    def place(name, like):
        if "mlp" in name:
            return far_like(like, tmp_path, device="cpu")
        return on_the_cpu(name, like)

    materialize(model, expected.state_dict(), place)
    for name, parameter in model.named_parameters():
        in_a_file = parameter.untyped_storage().filename is not None
        assert parameter.dtype == torch.bfloat16 and in_a_file == ("mlp" in name)
        assert torch.equal(parameter, expected.state_dict()[name].bfloat16())


def test_a_hugging_face_model_is_materialized():
    expected, model = small_llama(), on_meta(small_llama)
    with pytest.raises(ValueError, match="inv_freq. If it is a buffer that is never saved, add it"):
        materialize(model, expected.state_dict(), on_the_cpu)
    materialize(model, numbers_of(expected), on_the_cpu)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens = torch.randint(400, (2, 20))
    assert torch.equal(model(tokens).logits, expected(tokens).logits)


def test_never_more_than_one_tensor_is_there_twice(tmp_path):
    """From a file the model is all that is allocated; of a state that is made as it is read, one
    FP32 tensor more.
    """
    torch.save(small_gpt().state_dict(), tmp_path / "weights.pt")
    shapes = {name: parameter.shape for name, parameter in small_gpt().named_parameters()}
    counts = [shape.numel() for shape in shapes.values()]

    class Lazy(Mapping):
        """A state whose tensors exist only while somebody holds them."""

        def __getitem__(self, name):
            return torch.ones(shapes[name])

        def __iter__(self):
            return iter(shapes)

        def __len__(self):
            return len(shapes)

    def build(make_state):
        def build_run():
            model = on_meta(small_gpt, torch.bfloat16)
            materialize(model, make_state(), on_the_cpu)
            return lambda: model.head.weight.data_ptr()

        return build_run

    from_file = build(lambda: torch.load(tmp_path / "weights.pt", mmap=True))
    assert measure(from_file, device="cpu", steps=1).known_bytes == 2 * sum(counts)

    lazily = measure(build(Lazy), device="cpu", steps=1)
    # Tensor by tensor: those made, 2 bytes a number, and the one that is read, 4.
    expected = max(2 * sum(counts[: i + 1]) + 4 * count for i, count in enumerate(counts))
    assert lazily.known_bytes == max(expected, 2 * sum(counts)) < 4 * sum(counts)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"make": small_gpt}, ValueError, "token_embedding.weight has numbers already: make the"),
        ({"lacks": "final_norm.bias"}, ValueError, "no final_norm.bias.*add it to the state"),
        ({"shape": "final_norm.bias"}, ValueError, r"is \(3,\), but the model needs \(64,\)"),
        ({"place": lambda n, like: torch.empty(2)}, TypeError, r"return \(500, 64\), torch.float3"),
        ({"place": lambda n, like: on_the_cpu(n, like).double()}, TypeError, "place must return"),
        ({"place": lambda n, like: like}, TypeError, "place must return .*, not Parameter"),
        ({"place": lambda n, like: None}, TypeError, "for token_embedding.weight, not None"),
    ],
)
def test_what_cannot_be_materialized_is_refused_and_nothing_is_changed(change, error, message):
    state = small_gpt().state_dict()
    if "lacks" in change:
        del state[change["lacks"]]
    if "shape" in change:
        state[change["shape"]] = torch.zeros(3)
    model = change.get("make", lambda: on_meta(small_gpt))()
    before = list(model.parameters())
    with pytest.raises(error, match=message):
        materialize(model, state, change.get("place", on_the_cpu))
    assert all(now is then for now, then in zip(model.parameters(), before, strict=True))
