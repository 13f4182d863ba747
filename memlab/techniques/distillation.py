"""Distillation: a small model learns from a large one, which has to be somewhere meanwhile.

The student's loss is a mix of the usual cross-entropy and of the divergence between the teacher's
distribution over the vocabulary and its own (`distillation_loss`). That adds to the memory of
training: the teacher's weights, its activations if autograd is left on, and its logits. All of it
can go. The teacher runs once, beforehand, and what it says of each token is kept in a file, cut
down to its k most likely words (`top_k_targets`, `write_top_k`, `TopKFile`). Training reads the
file (`top_k_distillation_loss`). The student's own logits go with `chunked_distillation_loss`,
which walks over the tokens in chunks.

What is cut off makes the renormalised targets biased. An extra bucket for the rest, or words drawn
at random instead of the likeliest (`sampled_targets`), mend that in two different ways.

Sources: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015),
arXiv:1503.02531; Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in
LLMs" (2025), arXiv:2503.16870.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TAILS = ("bucket", "renormalize")

# --- The loss -------------------------------------------------------------------------------------


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    weight: float = 0.5,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Return weight x T^2 x KL(teacher || student) + (1 - weight) x cross-entropy.

    Args:
        student_logits: (..., vocabulary).
        teacher_logits: Of the same shape. Call the teacher under `torch.no_grad()`.
        targets: int64 (...).
        temperature: T; both logits are divided by it before the KL's softmax. The KL's gradient
            falls as 1 / T^2, which the factor T^2 makes up for (Hinton et al.). The cross-entropy
            is taken at temperature 1.
        weight: The teacher's share of the loss, from 0 to 1.
        ignore_index: Tokens with this target count for nothing, in the KL and in the mean neither.
        reduction: "mean" over the tokens that count, or "sum".

    Returns:
        A scalar in FP32 or more.

    Raises:
        ValueError: The teacher's logits carry a graph, or a vocabulary, shape or option is another.
        TypeError: Logits are not floating point, or targets not int64.
    """
    _check(student_logits, targets, weight, reduction)
    _check_temperature(temperature)
    if teacher_logits.requires_grad:
        raise ValueError(
            "The teacher's logits carry a graph: call the teacher under torch.no_grad()."
        )
    _check_vocabulary(student_logits, teacher_logits.shape[-1])
    if teacher_logits.shape != student_logits.shape:
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise ValueError(
            f"Student's and teacher's logits must have one shape, but they are {shapes}."
        )
    log_q = _log_softmax(student_logits, temperature)
    log_p = _log_softmax(teacher_logits, temperature)
    of_words = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    del log_p
    return _mix(
        of_words.sum(-1), student_logits, targets, temperature, weight, ignore_index, reduction
    )


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def _mix(divergence, logits, targets, temperature, weight, ignore_index, reduction) -> Tensor:
    """The two parts together, from the divergence (...) of each token."""
    ignored = targets == ignore_index
    total = weight * temperature**2 * divergence.masked_fill(ignored, 0).sum()
    if weight < 1:  # with an autocast or 16-bit model the logits are 16-bit
        logits = logits.to(divergence.dtype).flatten(0, -2)
        entropy = F.cross_entropy(
            logits, targets.flatten(), ignore_index=ignore_index, reduction="sum"
        )
        total = total + (1 - weight) * entropy
    return total if reduction == "sum" else total / (~ignored).sum()


# --- Targets that take little room ----------------------------------------------------------------


@dataclass(frozen=True)
class TopK:
    """What a teacher says of some tokens, cut down to a few words for each.

    Attributes:
        log_probabilities: (tokens, k), of the teacher at `temperature`, normalised over the whole
            vocabulary.
        indices: The words, int32 (tokens, k).
        temperature: What the teacher's logits were divided by.
        vocabulary_size: Of the teacher.
    """

    log_probabilities: Tensor
    indices: Tensor
    temperature: float
    vocabulary_size: int

    def __len__(self) -> int:
        return len(self.indices)

    def rows(self, which: slice | Tensor) -> "TopK":
        """Return the same for some tokens: a slice, or a tensor of their numbers."""
        log_probabilities = self.log_probabilities[which]
        return replace(self, log_probabilities=log_probabilities, indices=self.indices[which])

    def to(self, device: torch.device | str) -> "TopK":
        """Return the same on another device."""
        log_probabilities = self.log_probabilities.to(device)
        return replace(self, log_probabilities=log_probabilities, indices=self.indices.to(device))


@torch.no_grad()
def top_k_targets(teacher_logits: Tensor, k: int, *, temperature: float = 1.0) -> TopK:
    """Keep the k likeliest words of each token.

    The temperature is fixed from here on: from k probabilities at one temperature those at another
    do not follow.

    Args:
        teacher_logits: (..., vocabulary).
        k: Words to keep of each token.
        temperature: What the logits are divided by.

    Returns:
        A `TopK` of (tokens, k).

    Raises:
        ValueError: k is not from 1 to the vocabulary's size, or the temperature not above 0.
    """
    rows = _rows(teacher_logits, k, temperature)
    if k > rows.shape[-1]:
        raise ValueError(
            f"The teacher has {rows.shape[-1]:,} words, and k must be no more, but it is {k}."
        )
    # The largest logits are the largest probabilities, so no softmax of the vocabulary's size is
    # made.
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32)) / temperature
    values, indices = rows.topk(k, dim=-1)
    values -= rows.logsumexp(-1, keepdim=True)
    return TopK(values, indices.int(), temperature, rows.shape[-1])


@torch.no_grad()
def sampled_targets(
    teacher_logits: Tensor,
    draws: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> TopK:
    """Draw words of each token by their probability, with replacement.

    The gradient of the loss from them, with `tail="renormalize"`, is that of the full KL on average
    over the draws, and noisy. The loss itself differs from the KL by a number that does not depend
    on the student.

    Args:
        teacher_logits: (..., vocabulary).
        draws: Words to draw of each token; each counts as 1 / draws.
        temperature: What the logits are divided by.
        generator: Where the random numbers are from; None takes PyTorch's own.

    Returns:
        A `TopK` of (tokens, draws).

    Raises:
        ValueError: There is less than one draw, or the temperature is not above 0.
    """
    rows = _rows(teacher_logits, draws, temperature)
    probabilities = _log_softmax(rows, temperature).exp_()
    indices = probabilities.multinomial(draws, replacement=True, generator=generator)
    equal = torch.full(indices.shape, 1 / draws, device=rows.device).log_()
    return TopK(equal, indices.int(), temperature, rows.shape[-1])


def _rows(logits: Tensor, count: int, temperature: float) -> Tensor:
    _check_temperature(temperature)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(
            f"The words to keep of each token must be 1 or more, but they are {count!r}."
        )
    return logits.detach().flatten(0, -2)


def top_k_distillation_loss(
    student_logits: Tensor,
    teacher: TopK,
    targets: Tensor,
    *,
    tail: str = "bucket",
    weight: float = 0.5,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Return `distillation_loss`, as far as k words for each token can tell.

    Args:
        student_logits: (..., vocabulary).
        teacher: As many tokens, in the same order. The temperature is the teacher's.
        targets: int64 (...).
        tail: What becomes of the words that were cut off. "renormalize" takes the k probabilities
            as if they were all, which teaches the student that the others have none. "bucket" adds
            one more word, the sum of all others, on both sides: the student learns how much they
            have together, and not how it is divided.
        weight: As for `distillation_loss`, and so are the others.
        ignore_index: Tokens with this target count for nothing.
        reduction: "mean" over the tokens that count, or "sum".

    Returns:
        A scalar in FP32 or more.

    Raises:
        ValueError: As `distillation_loss`, or another tail or number of tokens.
        TypeError: Logits are not floating point, or targets not int64.
    """
    _check(student_logits, targets, weight, reduction)
    _check_vocabulary(student_logits, teacher.vocabulary_size)
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(TAILS)}, but it is {tail!r}.")
    if len(teacher) != targets.numel():
        raise ValueError(
            f"The student has {targets.numel()} tokens, and the teacher says {len(teacher)}."
        )
    temperature = teacher.temperature
    indices = teacher.indices.long()
    rows = student_logits.flatten(0, -2)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    rows = rows if temperature == 1 else rows / temperature
    # Only k words of it are needed.
    log_q = rows.gather(-1, indices) - rows.logsumexp(-1, keepdim=True)
    log_p = teacher.log_probabilities.to(log_q.dtype)
    if tail == "renormalize":
        log_p = log_p - log_p.logsumexp(-1, keepdim=True)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    else:
        # The rest to 1. Rounding can leave less than nothing; a bucket below 1e-6 is as good as
        # empty.
        rest_p = (1 - log_p.exp().sum(-1)).clamp(min=0)
        rest_q = (1 - log_q.exp().sum(-1)).clamp(min=1e-6)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        divergence = divergence + rest_p.xlogy(rest_p) - rest_p * rest_q.log()
    divergence = divergence.reshape(targets.shape)
    return _mix(divergence, student_logits, targets, temperature, weight, ignore_index, reduction)


# --- On disk --------------------------------------------------------------------------------------

_HEADER = 128  # bytes: what the numbers are, as JSON, padded with blanks


def write_top_k(path: str | os.PathLike, parts: Iterable[TopK]) -> int:
    """Write what a teacher says into a file, part by part.

    A token's k log-probabilities (FP16) and its k words (INT32) lie side by side: 6 x k bytes.

    Args:
        path: The file.
        parts: What the teacher says of some tokens after the other. They may come from a generator
            that runs the teacher, so that no more than one is alive.

    Returns:
        The bytes of the file.

    Raises:
        ValueError: There is no part, or one has another k, temperature or vocabulary than the
            first.
    """
    kind = None
    tokens = 0
    with open(path, "wb") as file:
        file.write(b" " * _HEADER)
        for part in parts:
            kind_of_part = (part.indices.shape[1], part.temperature, part.vocabulary_size)
            kind = kind or kind_of_part
            if kind_of_part != kind:
                raise ValueError(
                    f"All parts must be of k, temperature, vocabulary {kind}, but one is"
                    f" {kind_of_part}."
                )
            columns = [part.log_probabilities.half(), part.indices.int()]
            columns = [column.cpu().contiguous().view(torch.uint8) for column in columns]
            file.write(bytes(torch.cat(columns, dim=1).untyped_storage()))
            tokens += len(part)
        if kind is None:
            raise ValueError("There is nothing to write: the teacher said nothing of any token.")
        names = ("k", "temperature", "vocabulary_size")
        header = dict(zip(names, kind, strict=True), tokens=tokens)
        file.seek(0)
        file.write(json.dumps(header).encode().ljust(_HEADER))
    return _HEADER + tokens * 6 * kind[0]


class TopKFile:
    """A file of `write_top_k`, mapped into memory and not read.

    `file[rows]` is a `TopK` of some tokens, a slice or an int64 tensor of their numbers: a copy, on
    the CPU. A DataLoader's workers share its pages.

    Args:
        path: The file.

    Attributes:
        k: Words of a token.
        temperature: What the teacher's logits were divided by.
        vocabulary_size: Of the teacher.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is another one, or was cut off.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.path.abspath(path)
        with open(self.path, "rb") as file:
            head = file.read(_HEADER)
        try:
            header = json.loads(head)
            self.k = header["k"]
            self.temperature = header["temperature"]
            self.vocabulary_size = header["vocabulary_size"]
            self._tokens = header["tokens"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} was not written by write_top_k, or not to its end."
            ) from error
        size = os.path.getsize(self.path)
        expected = _HEADER + self._tokens * 6 * self.k
        if size != expected:
            raise ValueError(
                f"{path} must have {expected:,} bytes, but it has {size:,}: was it cut off?"
            )
        mapped = torch.from_file(self.path, shared=False, size=size, dtype=torch.uint8)
        self._rows = mapped[_HEADER:].view(self._tokens, 6 * self.k)

    def __len__(self) -> int:
        return self._tokens

    def __getitem__(self, rows: slice | Tensor) -> TopK:
        values, words = self._rows[rows].split([2 * self.k, 4 * self.k], dim=1)
        # Copies, which lie in one piece and so can be read as numbers.
        values = values.clone(memory_format=torch.contiguous_format).view(torch.float16)
        words = words.clone(memory_format=torch.contiguous_format).view(torch.int32)
        return TopK(values, words, self.temperature, self.vocabulary_size)

    def __reduce__(self):  # a process that is started anew maps the file itself
        return TopKFile, (self.path,)


# --- Without the logits of all tokens -------------------------------------------------------------


def chunked_distillation_loss(
    hidden: Tensor,
    head: nn.Linear,
    teacher: TopK | Callable[[slice], Tensor],
    targets: Tensor,
    *,
    temperature: float = 1.0,
    weight: float = 0.5,
    tail: str = "bucket",
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the mean distillation loss without the logits of more than a chunk of tokens.

    Each chunk's gradient is taken at once, in forward. The gradients are those of the plain loss up
    to the order of additions; backward gives them away, once: a second is a RuntimeError.

    Args:
        hidden: What goes into the student's output layer, (tokens, hidden).
        head: That layer.
        teacher: A `TopK` of as many tokens; or a function that returns the teacher's logits
            (chunk, vocabulary) of the tokens in a slice, called without grad, so that these too
            exist for a chunk only.
        targets: int64 (tokens,).
        temperature: For a function; a `TopK` has its own.
        weight: As for `distillation_loss`.
        tail: For a `TopK`, as for `top_k_distillation_loss`.
        ignore_index: Tokens with this target count for nothing.
        chunk_tokens: None takes as many as the hidden size: a chunk's logits are then as large as
            the head.

    Raises:
        TypeError: The head is no plain nn.Linear, or as `distillation_loss`.
        ValueError: Shapes do not fit, or as `distillation_loss`.
    """
    _check_chunks(hidden, head, teacher, targets, chunk_tokens)
    common = {"weight": weight, "ignore_index": ignore_index, "reduction": "sum"}

    def loss_of(logits: Tensor, rows: slice) -> Tensor:
        if isinstance(teacher, TopK):
            top_k = teacher.rows(rows)
            return top_k_distillation_loss(logits, top_k, targets[rows], tail=tail, **common)
        with torch.no_grad():
            said = teacher(rows)
        return distillation_loss(logits, said, targets[rows], temperature=temperature, **common)

    count = (targets != ignore_index).sum()
    size = chunk_tokens or hidden.shape[1]
    return _Chunked.apply(hidden, head.weight, head.bias, loss_of, size) / count


class _Chunked(torch.autograd.Function):
    """The sum of a loss over chunks of tokens, and with it the gradients of what it is made of."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, loss_of, chunk_tokens):
        sum_dtype = torch.promote_types(weight.dtype, torch.float32)
        needed = ctx.needs_input_grad[:3]
        of_hidden = torch.empty_like(hidden) if needed[0] else None
        of_weight = torch.zeros_like(weight, dtype=sum_dtype) if needed[1] else None
        of_bias = torch.zeros_like(bias, dtype=sum_dtype) if needed[2] else None
        total = torch.zeros((), dtype=sum_dtype, device=hidden.device)
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = F.linear(hidden[rows], weight, bias).requires_grad_()
            # A small graph, from the loss to the chunk's logits and no further.
            with torch.enable_grad():
                loss = loss_of(logits, rows)
            total += loss.detach()
            if not any(needed):
                continue
            (gradient,) = torch.autograd.grad(loss, logits)
            del loss, logits
            if of_bias is not None:
                of_bias += gradient.sum(0)
            if of_hidden is not None:
                of_hidden[rows] = gradient @ weight.to(gradient.dtype)
            if of_weight is not None:
                inputs = hidden[rows].to(gradient.dtype)
                if gradient.dtype == sum_dtype:
                    torch.addmm(of_weight, gradient.T, inputs, out=of_weight)
                else:
                    of_weight += gradient.T @ inputs
            del gradient
        ctx.gradients = [of_hidden, of_weight, of_bias]
        ctx.head_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, gradient):
        if ctx.gradients is None:
            raise RuntimeError(
                "chunked_distillation_loss gave its gradients away in the first backward pass."
            )
        gradients = [g if g is None else g.mul_(gradient) for g in ctx.gradients]
        ctx.gradients = None
        of_hidden, *of_head = gradients
        of_head = [g if g is None else g.to(ctx.head_dtype) for g in of_head]
        return of_hidden, *of_head, None, None


# --- What is refused ------------------------------------------------------------------------------


def _check(logits: Tensor, targets: Tensor, weight: float, reduction: str) -> None:
    if not logits.is_floating_point() or targets.dtype != torch.int64:
        kinds = f"{logits.dtype} and {targets.dtype}"
        raise TypeError(f"Logits must be floating point and targets int64, but they are {kinds}.")
    if logits.ndim < 2 or logits.shape[:-1] != targets.shape:
        shapes = f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        raise ValueError(
            f"Logits must be (..., vocabulary) and targets (...), but they are {shapes}."
        )
    if not 0 <= weight <= 1:
        raise ValueError(
            f"weight, the teacher's share of the loss, must be from 0 to 1, but it is {weight}."
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", but it is {reduction!r}.')


def _check_chunks(hidden, head, teacher, targets, chunk_tokens) -> None:
    if type(head) is not nn.Linear:
        raise TypeError(f"head must be a plain nn.Linear, but it is {type(head).__name__}.")
    if hidden.ndim != 2 or hidden.shape[1] != head.in_features or targets.shape != hidden.shape[:1]:
        shapes = f"{tuple(hidden.shape)} and targets {tuple(targets.shape)}"
        raise ValueError(
            f"hidden must be (tokens, {head.in_features}) and targets (tokens,), not {shapes}."
        )
    if chunk_tokens is not None and (type(chunk_tokens) is not int or chunk_tokens < 1):
        raise ValueError(
            f"chunk_tokens must be a positive int or None, but it is {chunk_tokens!r}."
        )
    if isinstance(teacher, TopK) and len(teacher) != len(targets):
        raise ValueError(
            f"The student has {len(targets)} tokens, and the teacher says {len(teacher)}."
        )


def _check_vocabulary(logits: Tensor, vocabulary: int) -> None:
    if logits.shape[-1] != vocabulary:
        raise ValueError(
            f"Student and teacher must have one vocabulary, but they have {logits.shape[-1]:,} and "
            f"{vocabulary:,} words: a word's number has to mean the same word to both."
        )


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, but it is {temperature!r}.")
