"""Dynamic length: spend memory on the tokens of documents, not on the padding between them.

A batch of documents of different lengths is padded to a rectangle, and activations are paid for
every place in it. `pad` makes the rectangle no longer than its longest document. `batches_of` puts
documents of similar length together, `batches_within` bounds the places of a batch instead of the
documents in it. `pack` leaves no padding: the documents follow each other in one row, and under
`documents_apart` a model reads each as if it were alone. The loss stays the same if it is summed
over the targets and divided by how many there are.

Sources: Krell et al., "Efficient Sequence Packing without Cross-contamination" (2021),
arXiv:2107.02027; Ott et al., "fairseq" (2019), arXiv:1904.01038, for batches by tokens; Kundu et
al., "Enhancing Training Efficiency Using Packing with Flash Attention" (2024), arXiv:2407.09105,
for positions that restart. In production: `DataCollatorWithFlattening` of transformers, and
FlashAttention's kernels for variable lengths.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100  # a target that does not count, as in torch.nn.functional.cross_entropy

# --- Which documents go together ------------------------------------------------------------------


def batches_of(lengths: Sequence[int], size: int, *, by_length: bool = False) -> list[list[int]]:
    """Group documents into batches of `size` documents, the last with the rest.

    Args:
        lengths: The tokens of each document.
        size: Documents in a batch.
        by_length: Sort first, so that a batch's documents are of similar length, the longest batch
            first. This takes padding away, and not the peak: the longest documents then meet in one
            batch.

    Returns:
        The batches, each a list of documents' indices.

    Raises:
        ValueError: A size below 1, or lengths that are not whole numbers of at least 1.
    """
    lengths = _lengths(lengths)
    _count("size", size)
    order = _longest_first(lengths) if by_length else range(len(lengths))
    return [list(order[start : start + size]) for start in range(0, len(lengths), size)]


def batches_within(lengths: Sequence[int], tokens: int, *, packed: bool = False) -> list[list[int]]:
    """Group documents into batches of at most `tokens` tokens, padding included. The longest first.

    A padded batch is (documents x longest): documents of similar length go together, few long or
    many short ones. A packed batch is the sum of the lengths: each document goes into the first
    row with room for it (first-fit decreasing, which takes time in proportion to documents x rows:
    plan a part of a large data set at a time). Shuffle the batches before training with one batch
    a step.

    Args:
        lengths: The tokens of each document.
        tokens: The most tokens in a batch, padding included.
        packed: Whether documents follow each other in one row, without padding.

    Returns:
        The batches, each a list of documents' indices.

    Raises:
        ValueError: A document longer than `tokens`, and as `batches_of` does.
    """
    lengths = _lengths(lengths)
    _count("tokens", tokens)
    order = _longest_first(lengths)
    if order and lengths[order[0]] > tokens:
        raise ValueError(
            f"Document {order[0]} has {lengths[order[0]]} tokens, and a batch may have {tokens}: "
            "raise tokens, or cut the document."
        )
    batches: list[list[int]] = []
    room: list[int] = []  # in packed rows
    for index in order:
        length = lengths[index]
        if packed:
            fits = next((row for row, free in enumerate(room) if free >= length), None)
            if fits is not None:
                batches[fits].append(index)
                room[fits] -= length
                continue
        # Sorted, so the first document of a batch is its longest.
        elif batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens:
            batches[-1].append(index)
            continue
        batches.append([index])
        room.append(tokens - length)
    return batches


def places(lengths: Sequence[int], batch: Sequence[int], *, packed: bool = False) -> int:
    """Count the places that a batch takes, with padding or packed.

    Args:
        lengths: The tokens of each document.
        batch: The indices of the batch's documents.
        packed: Whether documents follow each other in one row, without padding.

    Returns:
        The number of places.
    """
    taken = [lengths[index] for index in batch]
    return sum(taken) if packed else len(taken) * max(taken, default=0)


# --- A rectangle, or a row ------------------------------------------------------------------------


def pad(
    documents: Sequence[Tensor], length: int | None = None, *, fill: int = 0, device=None
) -> tuple[Tensor, Tensor]:
    """Put documents under each other, padded to a rectangle, and pair tokens with targets.

    A document of n + 1 tokens gives n pairs of a token and its target, the token after it. Where it
    has ended, the token is `fill` and the target -100, which `torch.nn.functional.cross_entropy`
    leaves out. The padding is on the right: under causal attention no token sees it, so no mask is
    needed. Attention that looks both ways needs one.

    Args:
        documents: Each int64 `(tokens + 1,)`.
        length: Of the rectangle; None pads to the longest of these documents.
        fill: The token in the padding.
        device: Where the two go; None leaves them where the documents are.

    Returns:
        Tokens and targets, each int64 `(documents, length)`.

    Raises:
        TypeError: Documents that are not int64.
        ValueError: No documents, one that is not one row of at least two tokens, or one that is
            longer than `length`.
    """
    _check(documents)
    longest = max(len(document) for document in documents) - 1
    length = longest if length is None else length
    if longest > length:
        raise ValueError(
            f"A document of {longest} tokens does not fit into {length}: raise length or cut it."
        )
    first = documents[0]
    tokens = first.new_full((len(documents), length), fill)
    targets = first.new_full((len(documents), length), IGNORED)
    for row, document in enumerate(documents):
        tokens[row, : len(document) - 1] = document[:-1]
        targets[row, : len(document) - 1] = document[1:]
    return tokens.to(device), targets.to(device)


class Row(NamedTuple):
    """Documents one after the other: tokens, targets, positions, each int64 (1, tokens), and the
    lengths.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    lengths: tuple[int, ...]


def pack(documents: Sequence[Tensor], device=None) -> Row:
    """Put documents into one row without padding, and count positions anew in each.

    Tokens and targets are paired within a document, so no document's last token has to predict the
    next one's first. A model has to be kept from looking across: see `documents_apart`.

    Args:
        documents: Each int64 `(tokens + 1,)`.
        device: Where the row goes; None leaves it where the documents are.

    Returns:
        The row, of as many places as the documents have pairs.

    Raises:
        TypeError, ValueError: As `pad` does.
    """
    _check(documents)
    lengths = tuple(len(document) - 1 for document in documents)
    tokens = torch.cat([document[:-1] for document in documents])[None].to(device)
    targets = torch.cat([document[1:] for document in documents])[None].to(device)
    return Row(tokens, targets, _positions(lengths, tokens.device)[None], lengths)


def block_diagonal_mask(lengths: Sequence[int], device=None) -> Tensor:
    """Make the mask of causal attention within documents.

    This is what `documents_apart` does without: its bytes grow with the square of the row.

    Args:
        lengths: The tokens of each document.
        device: Where the mask is made.

    Returns:
        The mask, bool `(1, 1, tokens, tokens)`, True where a token is seen.
    """
    lengths = _lengths(lengths)
    blocks = [torch.ones(n, n, dtype=torch.bool, device=device).tril() for n in lengths]
    return torch.block_diag(*blocks).bool()[None, None]


# --- A model that reads a row document by document ------------------------------------------------


class _Attention:
    """Takes the place of `scaled_dot_product_attention`: one call of it for every document of the
    row.
    """

    def __init__(self, lengths: tuple[int, ...]):
        self.lengths = lengths
        self.grad = torch.is_grad_enabled()
        self.calls = 0
        self.without_grad = 0
        self.original = F.scaled_dot_product_attention

    def __call__(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options
    ):
        if attn_mask is not None:
            raise ValueError(
                "Attention got a mask beside the documents' lengths. Give the model no attention"
                " mask, and no position_ids either, from which it may make one:"
                " documents_apart(positions=...) sets them."
            )
        count = sum(self.lengths)
        if query.ndim != 4 or query.shape[0] != 1 or not query.shape[2] == key.shape[2] == count:
            raise ValueError(
                f"The lengths add up to {count} tokens, so queries and keys must be (1, heads,"
                f" {count}, width), but they are {tuple(query.shape)} and {tuple(key.shape)}."
            )
        self.calls += 1
        self.without_grad += self.grad and not torch.is_grad_enabled()
        options |= {"dropout_p": dropout_p, "is_causal": is_causal}
        parts = zip(*(tensor.split(self.lengths, 2) for tensor in (query, key, value)), strict=True)
        outputs = [self.original(*part, **options) for part in parts]
        # Joined token by token, (1, tokens, heads, width), as a model reads it next. Else it
        # copies.
        return torch.cat([output.transpose(1, 2) for output in outputs], 1).transpose(1, 2)


@contextmanager
def documents_apart(lengths: Sequence[int], *, positions: nn.Module | None) -> Iterator[None]:
    """Within this context a model reads a row as documents that know nothing of each other.

    Attention runs document by document, so nothing of (tokens x tokens) is made; all else runs on
    the row. The model must attend through `torch.nn.functional.scaled_dot_product_attention`,
    causally or both ways, without a mask, not be compiled, and treat each token apart elsewhere.
    Run backward within the context too where the model is checkpointed, since it attends again
    there. Autograd saves the attention's output twice, as it comes from each document and as it is
    joined.

    Args:
        lengths: `pack(documents).lengths`, the tokens of each document.
        positions: The module that is given the positions, int64 `(..., tokens)`: an `nn.Embedding`
            of learned ones, or the module of rotary ones. It gets positions that restart with each
            document. None for a model without.

    Raises:
        ValueError: The model does otherwise.
        TypeError: Other `positions`.
        RuntimeError: A checkpoint's second pass did not happen within the context, or another such
            context is running.
    """
    lengths = tuple(_lengths(lengths))
    _check_positions(lengths, positions)
    attention = _Attention(lengths)
    if isinstance(attention.original, _Attention):
        raise RuntimeError("documents_apart is running already: one row at a time, in one thread.")
    restarted = []
    hook = None
    if positions is not None:
        restart = functools.partial(_restart_positions, lengths, restarted)
        hook = positions.register_forward_pre_hook(restart, with_kwargs=True)
    # Replaced by name: a checkpoint attends again in backward, where no TorchFunctionMode is on.
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention.original
        if hook is not None:
            hook.remove()
    _check_what_ran(attention, positions is None or bool(restarted))


def _restart_positions(lengths: tuple[int, ...], restarted: list, module, args, kwargs):
    """Give a module positions that restart with each document, in the place of 0, 1, 2, ..."""
    count = sum(lengths)

    def restart(value):
        if not isinstance(value, Tensor) or value.is_floating_point() or not value.ndim:
            return value
        ascending = torch.arange(count, device=value.device)
        if value.shape[-1] != count or bool((value != ascending).any()):
            raise ValueError(
                f"positions must be the module that gets the positions 0 to {count - 1}, but it"
                " got other numbers. Give the model the row alone, without position_ids."
            )
        restarted.append(True)
        return _positions(lengths, value.device).to(value.dtype).expand(value.shape)

    return tuple(map(restart, args)), {name: restart(value) for name, value in kwargs.items()}


def _check_positions(lengths: tuple[int, ...], positions: nn.Module | None) -> None:
    if not lengths:
        raise ValueError("lengths must name at least one document, but it is empty.")
    if positions is not None and not isinstance(positions, nn.Module):
        raise TypeError(
            f"positions must be a module of the model or None, but it is {positions!r:.60}."
        )
    table = getattr(positions, "num_embeddings", None)
    if table is not None and max(lengths) > table:
        raise ValueError(
            f"A document has {max(lengths)} tokens, but the model knows {table} positions."
        )


def _check_what_ran(attention: _Attention, restarted: bool) -> None:
    if not attention.calls:
        raise ValueError(
            "scaled_dot_product_attention did not run: is attention written out, or compiled?"
        )
    if not restarted:
        raise ValueError(
            "The model did not give its positions to the module that was named as positions."
        )
    if attention.without_grad > attention.calls - attention.without_grad:
        raise RuntimeError(
            "Attention ran without gradients in a context that was entered with them. Is the model"
            " checkpointed? Then run backward within documents_apart too. To evaluate, enter the"
            " context under no_grad()."
        )


def _positions(lengths: Sequence[int], device) -> Tensor:
    return torch.cat([torch.arange(length, device=device) for length in lengths])


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


def _lengths(lengths: Sequence[int]) -> list[int]:
    lengths = [int(length) if isinstance(length, Tensor) else length for length in lengths]
    for number, length in enumerate(lengths):
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise ValueError(
                f"Lengths must be whole numbers of at least 1, but number {number} is {length!r}."
            )
    return lengths


def _count(name: str, size) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, but it is {size!r}.")


def _check(documents: Sequence[Tensor]) -> None:
    if not len(documents):
        raise ValueError("There must be at least one document, but there is none.")
    for number, document in enumerate(documents):
        if not isinstance(document, Tensor) or document.dtype != torch.int64:
            kind = getattr(document, "dtype", type(document).__name__)
            raise TypeError(f"Documents must be int64 tensors, but document {number} is {kind}.")
        if document.ndim != 1 or len(document) < 2:
            raise ValueError(
                "A document must be one row of at least 2 tokens, a token and its target, but"
                f" document {number} has the shape {tuple(document.shape)}."
            )
