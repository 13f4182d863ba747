"""What `make validate` cannot compare, and why some predictions are off: in words, by hand."""

from __future__ import annotations

#: Names of a few KiB that a notebook leaves on the device while it measures. They hold one segment
#: of the allocator's, 2 MiB; the reserved bytes are compared all the same.
SMALL = {
    "01_mixed_precision": ("layer", "norm", "x"),
    "09_lean_optimizers": ("signed", "unsigned"),
}

_OTHER_TEXT = (
    "its documents come from the text that a Python carries, and are other ones in the Python that"
    " measured (3.12)"
)

#: Notebooks whose batches depend on the machine's text: the variants for which that changes bytes.
NEEDS_OTHER_TEXT: dict[str, dict[str, str]] = {
    "e3_dynamic_length": {
        "pad to the longest": _OTHER_TEXT,
        "buckets": _OTHER_TEXT,
        "token budget": _OTHER_TEXT,
        "packed": _OTHER_TEXT,
        "packed, worst": _OTHER_TEXT,
    }
}

_ONE_SEGMENT_MORE = (
    "The H100's allocator held one segment more, of the logits' size, where the simulated one found"
    " a free block. Probably by the choice between blocks of one size: it goes by the address, and"
    " the driver's addresses are not known."
)

_CONVOLUTION = (
    "What cuDNN takes for itself in a convolution's backward is not predicted: in the record, what"
    " is missing are temporaries, at the backward of a convolution."
)

#: Why a prediction is off: (notebook, number of the record in its file, variant) → the reason.
REASONS: dict[tuple[str, int, str], str] = {
    ("07_in_place", 10, "denoiser, LeakyReLU"): _CONVOLUTION,
    ("07_in_place", 10, "denoiser, LeakyReLU in place"): _CONVOLUTION,
    ("11_capstone", 4, "naive"): _ONE_SEGMENT_MORE,
}
