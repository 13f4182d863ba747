"""Distillation: the loss by its definition, what k words can and cannot tell, files to the byte,
logits in chunks.
"""

import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memlab import measure
from memlab.techniques.distillation import (
    TopK,
    TopKFile,
    chunked_distillation_loss,
    distillation_loss,
    sampled_targets,
    top_k_distillation_loss,
    top_k_targets,
    write_top_k,
)
from memlab.workloads import gpt, vit

VOCABULARY = 11


def logits(shape=(2, 3), dtype=torch.float64):
    torch.manual_seed(0)
    student = (2 * torch.randn(*shape, VOCABULARY)).to(dtype).requires_grad_()
    teacher = (2 * torch.randn(*shape, VOCABULARY)).to(dtype)
    return student, teacher, torch.randint(VOCABULARY, shape)


def gradient(loss, of):
    return torch.autograd.grad(loss, of)[0]


# --- The loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_and_its_gradient_are_those_of_the_definition(temperature, weight):
    student, teacher, targets = logits()
    p, q = ((x / temperature).softmax(-1) for x in (teacher, student))
    divergence = (p * (p / q).log()).sum(-1).mean()
    entropy = -student.log_softmax(-1).gather(-1, targets[..., None]).mean()
    expected = weight * temperature**2 * divergence + (1 - weight) * entropy
    loss = distillation_loss(student, teacher, targets, temperature=temperature, weight=weight)
    torch.testing.assert_close(loss, expected)
    by_hand = weight * temperature * (q - p)
    by_hand = by_hand + (1 - weight) * (student.softmax(-1) - F.one_hot(targets, VOCABULARY))
    torch.testing.assert_close(gradient(loss, student), by_hand / targets.numel())


def test_it_is_what_kl_div_and_cross_entropy_give():
    student, teacher, targets = logits((5,))
    for temperature in (1.0, 3.0):
        divergence = F.kl_div(
            (student / temperature).log_softmax(-1),
            (teacher / temperature).softmax(-1),
            reduction="batchmean",
        )
        expected = 0.7 * temperature**2 * divergence + 0.3 * F.cross_entropy(student, targets)
        loss = distillation_loss(student, teacher, targets, temperature=temperature, weight=0.7)
        torch.testing.assert_close(loss, expected)


def test_ignored_tokens_count_for_nothing_and_sum_is_mean_times_count():
    student, teacher, targets = logits((6,))
    ignored = targets.clone()
    ignored[::2] = -100
    k = top_k_targets(teacher, 4)
    chunk = {"weight": 0.5, "chunk_tokens": 2}
    head = nn.Linear(VOCABULARY, VOCABULARY, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(torch.eye(VOCABULARY))
    for loss in (
        lambda s, y, rows: distillation_loss(s, teacher[rows], y),
        lambda s, y, rows: top_k_distillation_loss(s, k.rows(rows), y),
        lambda s, y, rows: chunked_distillation_loss(s, head, k.rows(rows), y, **chunk),
    ):
        whole = loss(student, ignored, slice(None))
        torch.testing.assert_close(whole, loss(student[1::2], targets[1::2], slice(1, None, 2)))
        assert not gradient(whole, student)[::2].any()
    mean, total = (
        distillation_loss(student, teacher, ignored, reduction=r) for r in ("mean", "sum")
    )
    torch.testing.assert_close(3 * mean, total)


def test_16_bit_logits_give_a_loss_in_fp32():
    student, teacher, targets = logits((4,), torch.bfloat16)
    exact = distillation_loss(student.float(), teacher.float(), targets)
    loss = distillation_loss(student, teacher, targets)
    assert loss.dtype == torch.float32 and torch.equal(loss, exact)
    assert (
        top_k_distillation_loss(student, top_k_targets(teacher, 4), targets).dtype == torch.float32
    )


# --- k words --------------------------------------------------------------------------------------


def test_the_k_words_are_the_likeliest_and_their_probabilities_those_of_all():
    _, teacher, _ = logits((2, 3))
    for temperature in (1.0, 2.0):
        k = top_k_targets(teacher, 4, temperature=temperature)
        p = (teacher / temperature).softmax(-1).flatten(0, 1)
        assert k.log_probabilities.shape == k.indices.shape == (6, 4) and len(k) == 6
        assert k.indices.dtype == torch.int32 and k.vocabulary_size == VOCABULARY
        torch.testing.assert_close(k.log_probabilities.exp(), p.gather(1, k.indices.long()))
        torch.testing.assert_close(k.log_probabilities.exp(), p.sort(descending=True).values[:, :4])


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_all_words_it_is_the_whole_loss(tail, temperature):
    student, teacher, targets = logits()
    k = top_k_targets(teacher, VOCABULARY, temperature=temperature)
    loss = top_k_distillation_loss(student, k, targets, tail=tail, weight=0.6)
    full = distillation_loss(student, teacher, targets, temperature=temperature, weight=0.6)
    torch.testing.assert_close(loss, full)
    torch.testing.assert_close(gradient(loss, student), gradient(full, student))


def test_the_bias_of_each_tail_is_what_the_formulas_say():
    """At weight 1 and temperature 1. Full gradient: q - p. Both biases come from the words that
    were cut off.
    """
    student, teacher, targets = logits((5,))
    p, q = teacher.softmax(-1), student.softmax(-1).detach()
    k = top_k_targets(teacher, 3)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(1, k.indices.long(), True)
    renormalized = (p * kept) / (p * kept).sum(-1, keepdim=True)
    rest_p, rest_q = ((x * ~kept).sum(-1, keepdim=True) for x in (p, q))
    in_bucket = torch.where(kept, p, rest_p * q / rest_q)
    for tail, target in (("renormalize", renormalized), ("bucket", in_bucket)):
        loss = top_k_distillation_loss(student, k, targets, tail=tail, weight=1.0)
        torch.testing.assert_close(gradient(loss, student), (q - target) / 5)
    # A coarser look at two distributions finds less difference, never more.
    bucket = top_k_distillation_loss(student, k, targets, weight=1.0)
    assert 0 < bucket < distillation_loss(student, teacher, targets, weight=1.0)


def test_drawn_words_are_right_on_average():
    student, teacher, targets = logits((4,), torch.float32)
    full = gradient(distillation_loss(student, teacher, targets, weight=1.0), student)
    generator = torch.Generator().manual_seed(0)
    many = sampled_targets(teacher, 40_000, generator=generator)
    of_many = top_k_distillation_loss(student, many, targets, tail="renormalize", weight=1.0)
    assert (gradient(of_many, student) - full).abs().max() < 0.01 * full.abs().max()
    # As many top words as this, renormalised, are far off: the error of drawing is noise, that of
    # cutting is not.
    top = top_k_distillation_loss(
        student, top_k_targets(teacher, 2), targets, tail="renormalize", weight=1.0
    )
    assert (gradient(top, student) - full).abs().max() > 0.05 * full.abs().max()
    few = sampled_targets(teacher, 3, generator=generator)
    assert few.indices.shape == (4, 3) and few.indices.dtype == torch.int32
    torch.testing.assert_close(few.log_probabilities.exp(), torch.full((4, 3), 1 / 3))


def test_a_student_that_is_sure_of_the_kept_words_has_a_finite_loss():
    student = torch.full((1, VOCABULARY), -200.0)
    student[0, 0] = 0
    student.requires_grad_()
    teacher = torch.zeros(1, VOCABULARY)
    loss = top_k_distillation_loss(
        student, top_k_targets(teacher, 1), torch.tensor([0]), weight=1.0
    )
    assert loss.isfinite() and gradient(loss, student).isfinite().all()


# --- On disk --------------------------------------------------------------------------------------


def test_a_file_has_six_bytes_a_word_and_gives_back_what_was_written(tmp_path):
    _, teacher, _ = logits((7,), torch.float32)
    path, k = tmp_path / "targets", 4
    written = top_k_targets(teacher, k, temperature=2.0)
    size = write_top_k(path, (written.rows(slice(i, i + 3)) for i in range(0, 7, 3)))
    assert size == path.stat().st_size == 128 + 7 * k * (2 + 4)
    file = TopKFile(path)
    assert (len(file), file.k, file.temperature, file.vocabulary_size) == (7, k, 2.0, VOCABULARY)
    for rows in (slice(None), slice(2, 5), torch.tensor([6, 0, 0])):
        read = file[rows]
        assert read.log_probabilities.dtype == torch.float16 and read.indices.dtype == torch.int32
        assert torch.equal(read.log_probabilities, written.rows(rows).log_probabilities.half())
        assert torch.equal(read.indices, written.rows(rows).indices)
        assert read.indices.is_contiguous() and read.temperature == 2.0
    other = pickle.loads(pickle.dumps(file))
    assert torch.equal(other[:].indices, written.indices)


def test_at_the_size_of_gpt_2_a_token_takes_384_bytes_instead_of_201_thousand(tmp_path):
    teacher = torch.randn(2, 50_257)
    size = write_top_k(tmp_path / "targets", [top_k_targets(teacher, 64)])
    assert (size - 128) / 2 == 384 and teacher.nbytes / 2 == 201_028


def test_what_is_mapped_is_not_in_the_ledger_and_what_is_read_is_a_copy(tmp_path):
    tokens, k, taken = 4096, 64, 16
    teacher = TopK(
        torch.zeros(tokens, k), torch.zeros(tokens, k, dtype=torch.int32), 1.0, VOCABULARY
    )
    write_top_k(tmp_path / "targets", [teacher])
    file = TopKFile(tmp_path / "targets")

    def build():
        model = nn.Linear(1, 1)

        def step():
            read = file[:taken]
            loss = model(read.log_probabilities.float().sum()[None]).sum()
            loss.backward()
            return loss

        return step

    peak = measure(build, device="cpu").known_bytes
    # What was read, and its FP32 copy; the rest is the model, its gradient, the sum and the loss.
    assert taken * k * (6 + 4) <= peak < taken * k * (6 + 4) + 200


def test_a_wrong_file_is_refused(tmp_path):
    path = tmp_path / "targets"
    with pytest.raises(FileNotFoundError):
        TopKFile(path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="was not written by write_top_k"):
        TopKFile(path)
    part = top_k_targets(torch.randn(3, VOCABULARY), 2)

    def stops():
        yield part
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_top_k(path, stops())
    with pytest.raises(ValueError, match="not to its end"):
        TopKFile(path)
    write_top_k(path, [part])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="must have 164 bytes, but it has 163"):
        TopKFile(path)
    with pytest.raises(ValueError, match="nothing to write"):
        write_top_k(path, [])
    with pytest.raises(ValueError, match=r"\(2, 1.0, 11\), but one is \(3, 1.0, 11\)"):
        write_top_k(path, [part, top_k_targets(torch.randn(3, VOCABULARY), 3)])


# --- In chunks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 100])
@pytest.mark.parametrize("kind", ["function", "bucket", "renormalize"])
def test_chunks_give_the_loss_and_gradients_of_the_plain_one(kind, chunk_tokens, bias):
    _, teacher, targets = logits((10,))
    targets[3] = -100
    head = nn.Linear(6, VOCABULARY, bias=bias).double()
    hidden = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    k, options = top_k_targets(teacher, 4, temperature=2.0), {"weight": 0.7}
    if kind == "function":
        plain = distillation_loss(head(hidden), teacher, targets, temperature=2.0, **options)
        said, options = (lambda rows: teacher[rows]), options | {"temperature": 2.0}
    else:
        plain = top_k_distillation_loss(head(hidden), k, targets, tail=kind, **options)
        said, options = k, options | {"tail": kind}
    chunked = chunked_distillation_loss(
        hidden, head, said, targets, chunk_tokens=chunk_tokens, **options
    )
    torch.testing.assert_close(chunked, plain)
    inputs = [hidden, *head.parameters()]
    ours, theirs = (
        torch.autograd.grad(3 * loss, inputs, retain_graph=True) for loss in (chunked, plain)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(RuntimeError, match="gave its gradients away"):
        chunked.backward()


def test_chunks_with_a_frozen_head_without_grad_and_in_16_bits():
    _, teacher, targets = logits((10,), torch.float32)
    k, head = top_k_targets(teacher, 4), nn.Linear(6, VOCABULARY)
    hidden = torch.randn(10, 6, requires_grad=True)
    with torch.no_grad():
        assert not chunked_distillation_loss(hidden, head, k, targets).requires_grad
    head.requires_grad_(False)
    chunked_distillation_loss(hidden, head, k, targets).backward()
    expected = gradient(top_k_distillation_loss(head(hidden), k, targets), hidden)
    torch.testing.assert_close(hidden.grad, expected)
    assert head.weight.grad is None

    head = nn.Linear(6, VOCABULARY)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [
            chunked_distillation_loss(hidden, head, k, targets, chunk_tokens=3),
            top_k_distillation_loss(head(hidden), k, targets),
        ]
    ours, theirs = (torch.autograd.grad(loss, [head.weight, hidden]) for loss in losses)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=0.01, rtol=0.05)


def peak_bytes(config, loss_of, batch=4, sequence=64, teacher=None):
    def build():
        torch.manual_seed(0)
        model = gpt.GPT(config)
        others = [gpt.GPT(teacher)] if teacher else []
        tokens = torch.randint(256, (batch, sequence))

        def step():
            loss = loss_of(model, tokens, *others)
            loss.backward()
            model.zero_grad()
            return loss

        return step

    return measure(build, device="cpu")


def test_the_columns_of_a_run_with_each_kind_of_teacher():
    config = gpt.tiny(vocabulary_size=2048, layers=2, hidden=32)
    large = gpt.tiny(vocabulary_size=2048, layers=4, hidden=64)
    n, V, k = 4 * 64, 2048, 8
    one = 4 * n * V  # a tensor of the logits' size
    kept = gpt.activation_bytes(config, 4, 64) - one
    teacher = TopK(
        torch.full((n, k), math.log(0.1)), torch.arange(k, dtype=torch.int32).expand(n, k), 2.0, V
    )

    def alone(model, tokens):
        return model(tokens, tokens)

    def top_k(model, tokens):
        return top_k_distillation_loss(model(tokens), teacher, tokens)

    def chunked(model, tokens):
        return chunked_distillation_loss(
            model.features(tokens).flatten(0, 1), model.head, teacher, tokens.flatten()
        )

    base = 4 * config.parameter_count + 8 * n + kept
    assert peak_bytes(config, alone).known_bytes == pytest.approx(base + 3 * one, rel=0.01)
    assert peak_bytes(config, top_k).known_bytes == pytest.approx(base + 5 * one, rel=0.02)
    run = peak_bytes(config, chunked)
    chunk = 4 * config.hidden * V  # as many tokens as the hidden size, so as large as the head
    assert run.known_bytes < base + 4 * V * config.hidden + 4 * n * config.hidden + 6.5 * chunk
    assert run.known_bytes < peak_bytes(config, alone).known_bytes

    def no_grad(model, tokens, whole):
        with torch.no_grad():
            said = whole(tokens)
        return distillation_loss(model(tokens), said, tokens, temperature=2.0)

    # The teacher's weights stay; of its activations nothing does, and of its logits two tensors of
    # their size.
    run = peak_bytes(config, no_grad, teacher=large)
    weights = 4 * (config.parameter_count + large.parameter_count)
    assert run.columns["parameters"] == weights
    assert run.known_bytes == pytest.approx(weights + 8 * n + kept + 7 * one, rel=0.01)


# --- On models ------------------------------------------------------------------------------------


def hugging_face(name, **sizes):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(vocab_size=50, use_cache=False, **sizes)
    cls = f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    return getattr(transformers, cls)(config)


def gpt_pair():
    student, teacher = (gpt.GPT(gpt.tiny(vocabulary_size=50, layers=n, hidden=32)) for n in (1, 2))
    return student, teacher, student.features, student.head, student, teacher, (2, 8)


def vit_pair():
    student, teacher = (vit.ViT(vit.small(layers=n, hidden=32, heads=2)) for n in (1, 2))
    return student, teacher, None, None, student, teacher, None


def gpt2_pair():
    sizes = {"n_positions": 16, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    student, teacher = (hugging_face("GPT2", n_embd=32, n_layer=n, **sizes) for n in (1, 2))
    features = lambda x: student.transformer(x).last_hidden_state  # noqa: E731
    return (
        student,
        teacher,
        features,
        student.lm_head,
        lambda x: student(x).logits,
        lambda x: teacher(x).logits,
        (2, 8),
    )


def llama_pair():
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    student, teacher = (hugging_face("Llama", num_hidden_layers=n, **sizes) for n in (1, 2))
    features = lambda x: student.model(x).last_hidden_state  # noqa: E731
    return (
        student,
        teacher,
        features,
        student.lm_head,
        lambda x: student(x).logits,
        lambda x: teacher(x).logits,
        (2, 8),
    )


@pytest.mark.parametrize("make", [gpt_pair, vit_pair, gpt2_pair, llama_pair])
def test_a_model_learns_from_a_file_what_it_learns_from_the_teacher(make, tmp_path):
    torch.manual_seed(0)
    student, teacher, features, head, student_logits, teacher_logits, shape = make()
    inputs = torch.randint(50, shape) if shape else torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        said = teacher_logits(inputs)
    targets = torch.randint(said.shape[-1], said.shape[:-1])
    write_top_k(tmp_path / "targets", [top_k_targets(said, said.shape[-1], temperature=2.0)])
    file = TopKFile(tmp_path / "targets")

    def gradients(loss):
        student.zero_grad()
        loss.backward()
        return [parameter.grad.clone() for parameter in student.parameters()]

    expected = gradients(distillation_loss(student_logits(inputs), said, targets, temperature=2.0))
    given = [
        gradients(
            top_k_distillation_loss(student_logits(inputs), file[:], targets, tail="renormalize")
        )
    ]
    if features:
        hidden = features(inputs).flatten(0, 1)
        options = {"tail": "renormalize", "chunk_tokens": 5}
        given.append(
            gradients(
                chunked_distillation_loss(hidden, head, file[:], targets.flatten(), **options)
            )
        )
    for own in given:
        for one, other in zip(own, expected, strict=True):  # FP16 in the file: three digits
            assert (one - other).abs().max() <= 3e-3 * other.abs().max() + 1e-7
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_loss_falls_and_the_student_comes_to_say_what_the_teacher_says():
    torch.manual_seed(0)
    student, teacher, *_, shape = gpt_pair()
    tokens = torch.randint(50, shape)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)  # a new model is sure of nothing
        k = top_k_targets(teacher(tokens), 8)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    divergences = []
    for _ in range(60):
        loss = top_k_distillation_loss(student(tokens), k, tokens, weight=1.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        divergences.append(loss.item())
    assert divergences[-1] < 0.2 * divergences[0]


# --- What is refused ------------------------------------------------------------------------------


def test_bad_input_is_refused():
    student, teacher, targets = logits((4,), torch.float32)
    k, head = top_k_targets(teacher, 3), nn.Linear(6, VOCABULARY)
    hidden = torch.randn(4, 6)

    def plain(*arguments, **options):
        return lambda: distillation_loss(*arguments, **options)

    def top(*arguments, **options):
        return lambda: top_k_distillation_loss(*arguments, **options)

    def chunked(*arguments, **options):
        return lambda: chunked_distillation_loss(*arguments, **options)

    smaller = nn.Linear(6, VOCABULARY - 1)
    cases = [
        (plain(student, student * 1, targets), ValueError, "carry a graph.*no_grad"),
        (
            plain(student, teacher[:, :-1], targets),
            ValueError,
            "one vocabulary, but they have 11 and 10 words",
        ),
        (
            plain(student, teacher[:2], targets),
            ValueError,
            r"one shape, but they are \(4, 11\) and \(2, 11\)",
        ),
        (plain(student, teacher, targets[:2]), ValueError, r"\(4, 11\) and \(2,\)"),
        (plain(student, teacher, targets.int()), TypeError, "targets int64.*int32"),
        (plain(student.int(), teacher, targets), TypeError, "Logits must be floating point"),
        (
            plain(student, teacher, targets, temperature=0),
            ValueError,
            "temperature must be above 0",
        ),
        (plain(student, teacher, targets, weight=2), ValueError, "from 0 to 1, but it is 2"),
        (plain(student, teacher, targets, reduction="none"), ValueError, '"mean" or "sum"'),
        (
            top(student, k.rows(slice(2)), targets),
            ValueError,
            "has 4 tokens, and the teacher says 2",
        ),
        (top(student[:, 1:], k, targets), ValueError, "they have 10 and 11 words"),
        (
            top(student, k, targets, tail="drop"),
            ValueError,
            "tail must be one of bucket, renormalize",
        ),
        (
            lambda: top_k_targets(teacher, 12),
            ValueError,
            "has 11 words, and k must be no more, but it is 12",
        ),
        (lambda: top_k_targets(teacher, 0), ValueError, "must be 1 or more, but they are 0"),
        (lambda: top_k_targets(teacher, 2, temperature=-1), ValueError, "above 0, but it is -1"),
        (lambda: sampled_targets(teacher, 0), ValueError, "1 or more, but they are 0"),
        (chunked(hidden, smaller, k, targets), ValueError, "they have 10 and 11 words"),
        (
            chunked(hidden, smaller, lambda rows: teacher[rows], targets),
            ValueError,
            "10 and 11 words",
        ),
        (
            chunked(hidden, head.weight, k, targets),
            TypeError,
            "plain nn.Linear, but it is Parameter",
        ),
        (
            chunked(hidden, nn.Linear(5, VOCABULARY), k, targets),
            ValueError,
            r"must be \(tokens, 5\)",
        ),
        (chunked(hidden[None], head, k, targets), ValueError, r"not \(1, 4, 6\)"),
        (chunked(hidden, head, k.rows(slice(2)), targets), ValueError, "the teacher says 2"),
        (chunked(hidden, head, k, targets, chunk_tokens=0), ValueError, "positive int or None"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()


@pytest.mark.gpu
def test_on_a_gpu_a_file_s_targets_move_and_give_the_same(tmp_path):
    student, teacher, targets = logits((64,), torch.float32)
    write_top_k(tmp_path / "targets", [top_k_targets(teacher.cuda(), 4)])
    k = TopKFile(tmp_path / "targets")[:]
    expected = gradient(top_k_distillation_loss(student, k, targets), student)
    on_gpu = student.detach().cuda().requires_grad_()
    given = gradient(top_k_distillation_loss(on_gpu, k.to("cuda"), targets.cuda()), on_gpu)
    torch.testing.assert_close(given.cpu(), expected)
