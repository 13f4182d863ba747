"""The peak that a run of the ladder should have, by arithmetic.

At each rung some moment of a step holds the peak, and a line that shrinks another moment does
nothing yet. So the prediction is a list of moments, each a sum of what is there then.

The letters are those of the capstone notebook. p: parameters; h: hidden size; V: vocabulary; L:
layers; T: tokens of a step; w: bytes of a weight; W and S: bytes of weights and optimizer state on
the device.
"""

import dataclasses
from collections.abc import Iterable
from types import SimpleNamespace

from ..meters.device import has_own_memory
from ..workloads import gpt
from .ladder import Setting, check_lines, steps_in_backward

#: Tokens whose logits the fused loss makes at once.
CHUNK_TOKENS = 128


def predict(on: Iterable[str], setting: Setting | None = None) -> tuple[str, int]:
    """Return the moment that should hold the peak, and the peak in bytes.

    Args:
        on: the lines that are switched on.
        setting: what is trained, and on how much.

    Raises:
        ValueError: a name is not in `LADDER`.
    """
    found = moments(on, setting)
    if not checkpointed(on):
        # What autograd saves is still there: no later moment comes near.
        found = {name: found[name] for name in ("start", "loss") if name in found}
    moment = max(found, key=found.get)
    return moment, int(found[moment])


def moments(on: Iterable[str], setting: Setting | None = None) -> dict[str, int]:
    """Return the moments of a step that can hold the peak, and their bytes.

    Arguments and errors are those of `predict`.
    """
    check_lines(on)
    setting = setting or Setting()
    sizes = _sizes(on, setting)
    p = sizes.p
    w = sizes.w
    on_gpu = sizes.on_gpu
    embedding = sizes.V * sizes.h

    found = {}
    if "lean start" not in on:
        # A GPU's model is tied before it is moved there; then one weight after the other is cast.
        found["start"] = 4 * p + (2 if on_gpu else 4) * embedding

    found["loss"] = sizes.base + sizes.kept + _loss(on, setting, sizes)
    if "fused loss" in on and "tied, in tiles" not in on and w == 2:
        found["head"] = sizes.base + sizes.kept + 6 * embedding + sizes.x

    if checkpointed(on):
        found["block"] = sizes.base + _block(on, setting, sizes)

    if not steps_in_backward(on):
        if w == 2:
            makes = sizes.slice_bytes * min(setting.slice_size, max(embedding, 4 * sizes.h**2))
        else:
            makes = 0 if "fused AdamW" in on else w * p
        # The gradients lie where the weights lie.
        found["step"] = sizes.base + sizes.W + makes

    if "tied, in tiles" not in on:
        gradients = sizes.head if steps_in_backward(on) else w * p
        found["embedding"] = sizes.base + gradients + w * embedding + sizes.x
    return found


def checkpointed(on: Iterable[str]) -> bool:
    """Whether blocks keep their inputs only: micro-batches are each checkpointed."""
    return "checkpoints" in on or "micro-batches" in on


def _sizes(on: Iterable[str], setting: Setting) -> SimpleNamespace:
    """What the moments are made of."""
    c = setting.config
    on_gpu = has_own_memory(setting.device)
    p, h, V, L = c.parameter_count, c.hidden, c.vocabulary_size, c.layers
    T = setting.batch_size * setting.sequence_length
    w = 2 if "BF16 weights" in on else 4
    mixed = "BF16 autocast" in on and w == 4

    # The matrices of a block, in numbers; and the biases and norms of the whole model.
    matrices = 12 * h * h
    vectors = L * 13 * h + 2 * h
    far = L * matrices * ("blocks far" in on) + V * h * ("embedding far" in on)
    W = w * (p - far)

    S = 2 * w * p
    if "8-bit AdamW" in on:
        # A byte for each of two moments and a scale for each 256. Those of vectors stay in FP32.
        S = 8 * vectors + ("state far" not in on) * int((2 + 8 / 256) * (p - vectors))

    return SimpleNamespace(
        p=p,
        h=h,
        V=V,
        T=T,
        w=w,
        W=W,
        base=W + S + 16 * T,
        mixed=mixed,
        on_gpu=on_gpu,
        # Bytes of a number inside a block, and of what a block hands to the next.
        number=2 if mixed or w == 2 else 4,
        x=w * T * h,
        kept=_kept(on, setting, w, mixed),
        matrices=matrices,
        # The tied gradient, if it is near.
        head=w * V * h * ("embedding far" not in on),
        # A slice of the optimizer. For each number two moments, the weight and its random bits in
        # FP32, the rounded weight, and whether it is a NaN; with 16-bit state a gradient more and
        # no rounding yet. On a GPU also what of it has to come near.
        slice_bytes=(19 if "8-bit AdamW" in on else 20)
        + on_gpu * (2 * ("state far" in on) + 4 * ("embedding far" in on)),
        # What moves beside the computation on a GPU: two storages (offload_activations' `ahead`).
        under_way=2 * w * T * h * on_gpu * ("activations far" in on),
    )


def _kept(on: Iterable[str], setting: Setting, w: int, mixed: bool) -> int:
    """Bytes that autograd keeps from forward for backward."""
    c, rows = setting.config, setting.batch_size
    T = rows * setting.sequence_length
    x, log_softmax = w * T * c.hidden, w * T * c.vocabulary_size

    if checkpointed(on):
        kept = log_softmax + (c.layers + 1) * x * ("activations far" not in on)
    else:
        attention = "sdpa" if "SDPA" in on else "naive"
        config = dataclasses.replace(c, attention=attention)
        kept = gpt.activation_bytes(config, rows, setting.sequence_length, mixed_precision=mixed)
        if w == 2:
            kept //= 2

    if "fused loss" in on or "tied, in tiles" in on:
        kept -= log_softmax
        if not checkpointed(on):
            # The last hidden states are counted with the loss; there is no BF16 copy of the head.
            kept -= x + 2 * c.vocabulary_size * c.hidden * mixed
    if "micro-batches" in on:
        # Each checkpoint keeps the state of the random numbers.
        kept += 5056 * c.layers * rows // setting.micro_batch_size
    return kept


def _loss(on: Iterable[str], setting: Setting, sizes: SimpleNamespace) -> int:
    """Bytes of the loss, beside what is kept."""
    h, V, T, x, number = sizes.h, sizes.V, sizes.T, sizes.x, sizes.number

    if "tied, in tiles" in on:
        # The gradient of the hidden states is FP32. A tile has its logits and a 16-bit copy.
        states = x + sizes.under_way + 4 * T * h
        tile = (4 + number) * T * setting.tile_words + 2 * number * T * (number == 4)
        return sizes.head + states + tile

    if "fused loss" in on:
        products = 4 * CHUNK_TOKENS * V
        if number == 2:
            # The chunk's BF16 gradient, and a product's result before it is added in FP32. A GPU's
            # kernel converts as it adds.
            result = (2 if sizes.on_gpu else 6) * min(V, CHUNK_TOKENS * V // h) * h
            products = 2 * CHUNK_TOKENS * V + max(products, result)
        return 4 * V * h + 2 * x + 2 * V * h * sizes.mixed + products

    # Two tensors of the logits' size beside the saved one. A GPU writes the second in their type.
    return (sizes.w + (number if sizes.on_gpu else sizes.w)) * T * V


def _block(on: Iterable[str], setting: Setting, sizes: SimpleNamespace) -> int:
    """Bytes of one block's backward, with what is kept and the gradients so far."""
    h, T, w, x, number = sizes.h, sizes.T, sizes.w, sizes.x, sizes.number
    mixed, matrices = sizes.mixed, sizes.matrices
    blocks_far, in_backward = "blocks far" in on, steps_in_backward(on)
    # The largest matrix of a block, in numbers.
    largest = 4 * h * h

    if "micro-batches" in on:
        t = setting.micro_batch_size * setting.sequence_length
        # The gradients that the micro-batches before this one have left of the block's weights. A
        # CPU adds up far gradients before they go; the first and only micro-batch finds none.
        alone = setting.micro_batch_size == setting.batch_size
        far_at_once = blocks_far and sizes.on_gpu
        added_up = 0 if alone or far_at_once else w * matrices

        # The MLP's second weight gets its gradient, beside that of GELU's output; or GELU's output
        # has gone (and the weight, if it is far), and the gradient is added to what is there; or
        # the optimizer steps this weight.
        product = number * 4 * t * h + w * largest + added_up
        addition = w * largest * (1 if blocks_far else 2) + added_up if added_up else 0
        slices = sizes.slice_bytes * min(setting.slice_size, largest) * in_backward
        step = max(added_up, w * largest) + slices
        own = number * 15 * t * h + max(product, addition, step)

        # The block's weights while they are near, and the gradient of what the others were given.
        own += w * matrices * blocks_far + x - w * t * h
    elif mixed:
        own = 2 * 25 * T * h + 2 * largest + 2 * matrices
    else:
        own = number * 19 * T * h + w * largest * (w == 2)

    if in_backward or blocks_far:
        if "activations far" in on:
            return sizes.kept + sizes.head + 2 * x + sizes.under_way + own
        return sizes.kept + sizes.head + own

    # In the last block all that is kept is there, in the first one all gradients but this block's
    # and the position embedding's.
    gradients = w * (sizes.p - matrices - 13 * h - setting.config.context_length * h)
    if mixed:
        return gradients + own
    return max(sizes.kept + sizes.head, gradients + 2 * x) + own
