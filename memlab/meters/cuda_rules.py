"""Where CUDA chooses otherwise than a build of PyTorch without CUDA does.

Most choices need no rule: on tensors that say `cuda`, PyTorch's own dispatcher takes CUDA's lists
for autocast, its dropout with a mask of one byte, its foreach optimizers. A rule stands here where
a kernel or a library that only a CUDA build has decides what is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch

from memlab.meters.attention_choice import CUDNN_VERSION
from memlab.meters.cuda_attention import attend
from memlab.meters.gpus import GPU
from memlab.meters.scratch import HALVES

aten = torch.ops.aten

# cuDNN decides itself, at run time, what these take beside their results.
_UNKNOWN = {
    aten.convolution.default: "a convolution: what cuDNN takes for itself meanwhile is not known,"
    " and counts as nothing (with torch.backends.cudnn.benchmark it may try large ones)",
    aten.native_batch_norm.default: "batch norm: what cuDNN keeps for backward beside the batch's"
    " mean and deviation is not known, and counts as nothing",
    aten._thnn_fused_lstm_cell.default: "an LSTM: predicted as PyTorch's own cells. cuDNN's keep"
    " about as much, in one piece whose size is not known",
    aten._thnn_fused_gru_cell.default: "a GRU: predicted as PyTorch's own cells. cuDNN's keep about"
    " as much, in one piece whose size is not known",
}


@contextlib.contextmanager
def cuda_rules(
    gpu: GPU, note: Callable[[str], None], *, cudnn_version: int = CUDNN_VERSION
) -> Iterator[dict[object, Callable]]:
    """Have PyTorch's dispatcher choose as it does on a CUDA GPU, for the time of a prediction.

    Args:
        gpu: the GPU.
        note: called with a sentence for each thing that has to be assumed, each only once.
        cudnn_version: as `torch.backends.cudnn.version()` would say it.

    Yields:
        What stands in for PyTorch's fake kernels: a function for each operator.
    """
    said = set()

    def once(sentence: str) -> None:
        if sentence not in said:
            said.add(sentence)
            note(sentence)

    if gpu.architecture is None:
        once(f"{gpu.name} is a size alone: its kernels are taken to be an H100's")

    attention = partial(attend, gpu=gpu, cudnn_version=cudnn_version, note=once)
    kernels = {**_KERNELS, aten.scaled_dot_product_attention.default: attention}
    for operator, sentence in _UNKNOWN.items():
        kernels[operator] = _with_a_note(kernels.get(operator, operator), sentence, once)
    library = torch.library.Library("aten", "IMPL")
    try:
        for key in ("AutogradCUDA", "CUDA"):
            library.impl("scaled_dot_product_attention", attention, key)
        # With a kernel of its own for CUDA an operator is one: autograd takes its formula, and not
        # the formulas of what it is composed of elsewhere.
        library.impl("_fused_rms_norm", _rms_norm, "CUDA")
        yield kernels
    finally:
        library._destroy()


def _with_a_note(kernel: Callable, sentence: str, note: Callable[[str], None]) -> Callable:
    def call(*arguments: object, **keywords: object) -> object:
        note(sentence)
        return kernel(*arguments, **keywords)

    return call


# Kernels: shapes alone


def _efficient_forward(*arguments: object, **keywords: object) -> tuple:
    """The random state stands on the host, except while a graph is captured (attention.cu)."""
    out, logsumexp, *_ = aten._scaled_dot_product_efficient_attention(*arguments, **keywords)
    seed, offset = (torch.empty((), dtype=torch.int64, device="cpu") for _ in range(2))
    return out, logsumexp, seed, offset


def _softmax(tensor: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    """16 bits in, FP32 out, without an FP32 copy of the input between (cuda/SoftMax.cu). The fake
    kernel knows it for FP16 only.
    """
    return torch.empty_like(tensor, dtype=torch.float32 if half_to_float else tensor.dtype)


def _rms_norm(
    tensor: torch.Tensor, shape: list[int], weight: torch.Tensor | None, epsilon: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and a deviation for each row, in FP32 for 16 bits (cuda/layer_norm_kernel.cu)."""
    rows = (*tensor.shape[: tensor.dim() - len(shape)], *[1] * len(shape))
    dtype = torch.float32 if tensor.dtype in HALVES else tensor.dtype
    output = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    return output, tensor.new_empty(rows, dtype=dtype)


def _rms_norm_backward(
    gradient: torch.Tensor,
    tensor: torch.Tensor,
    shape: list[int],
    deviation: torch.Tensor,
    weight: torch.Tensor | None,
    wished: list[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    for_weight = wished[1] and weight is not None
    return (
        torch.empty_like(tensor) if wished[0] else None,
        torch.empty_like(weight) if for_weight else None,
    )


def _gru_cell(
    input_gates: torch.Tensor, hidden_gates: torch.Tensor, hidden: torch.Tensor, *biases: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """The new state, and five numbers a unit for backward (`_thnn_fused_gru_cell`, RNN.cu)."""
    batch, width = hidden.shape
    return torch.empty_like(hidden), hidden.new_empty((batch, 5 * width))


def _gru_cell_backward(
    gradient: torch.Tensor, workspace: torch.Tensor, has_bias: bool
) -> tuple[torch.Tensor | None, ...]:
    batch, width = gradient.shape
    gates = [workspace.new_empty((batch, 3 * width)) for _ in range(2)]
    biases = [workspace.new_empty((3 * width,)) if has_bias else None for _ in range(2)]
    return gates[0], gates[1], torch.empty_like(gradient), biases[0], biases[1]


_KERNELS: dict[object, Callable] = {
    aten._scaled_dot_product_efficient_attention.default: _efficient_forward,
    aten._softmax.default: _softmax,
    aten._log_softmax.default: _softmax,
    aten._fused_rms_norm.default: _rms_norm,
    aten._fused_rms_norm_backward.default: _rms_norm_backward,
    aten._thnn_fused_gru_cell.default: _gru_cell,
    aten._thnn_fused_gru_cell_backward.default: _gru_cell_backward,
}
