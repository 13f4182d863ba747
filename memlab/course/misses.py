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

#: Why a prediction is off: (notebook, technique, variant) → one or two sentences.
REASONS: dict[tuple[str, str, str], str] = {}
