"""A lesson's card: what its technique does here, on a GPU, and to a model that people fine-tune.

The card is made of records, so it cannot drift: a block in the lesson's first cell, filled by
`python -m memlab report`. What a lesson's card shows stands in its metadata, under "memlab":

    "card": {
        "gpu": {"file": "nvidia-h100-80gb-hbm3-large.json", "notebook": "11_capstone",
                "before": "fused loss", "after": "checkpoints", "what": "GPT-2 124M, ..."},
        "predicted": {"what": "Llama-3.1 8B, LoRA, 1 × 4,096 tokens",
                      "options": {"model": "Llama-3.1 8B", "lora": true, "sequence": 4096},
                      "before": {"fused_loss": true},
                      "after": {"fused_loss": true, "checkpoints": true}}
    }

`python -m memlab.course.cards 03` predicts the last row again, and keeps it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from memlab import predict, results
from memlab.course.notebook import Lesson, find_root, lesson, lessons
from memlab.course.tables import markdown
from memlab.course.words import times
from memlab.prediction import Prediction
from memlab.results import Record, Seconds, Variant
from memlab.results.lessons import LESSONS, PredictedCard, PredictedRun, keep_card, load_cards
from memlab.units import format_bytes
from memlab.workloads.fine_tuning import fine_tune

#: The two cards that most people have, by the size on the box.
GPUS = {"24 GB": "RTX 4090", "80 GB": "H100 80GB"}


def card(of: Lesson, root: Path) -> str:
    """Return a lesson's card as a Markdown table; what has no record yet has no row."""
    about = of.about.get("card", {})
    rows = []
    if found := measured_here(of.name, root):
        rows.append(_measured("**measured** here", _what(found), found, *_ends(found)))
    if "gpu" in about:
        record, before, after = on_gpu(about["gpu"], root)
        rows.append(_measured("**measured** on a GPU", about["gpu"]["what"], record, before, after))
    if predicted := load_cards(root).get(of.name):
        rows.append(_predicted(predicted))
    return markdown(rows)


def three_numbers(of: Lesson, root: Path) -> str:
    """Return what three meters say of the same runs on a GPU, as a Markdown table.

    The lesson's metadata name the file, the notebook and the variants: `"three_numbers": {"file":
    ..., "notebook": ..., "variants": [...]}`.
    """
    about = of.about["three_numbers"]
    first, *_, last = about["variants"]
    record, _, _ = on_gpu(about | {"before": first, "after": last}, root)
    rows = [
        {
            record.environment.gpu: variant.name,
            "allocated": format_bytes(variant.peak_bytes),
            "reserved": format_bytes(variant.reserved_bytes),
            "nvidia-smi": format_bytes(variant.device_bytes),
        }
        for variant in record.variants
        if variant.name in about["variants"]
    ]
    return markdown(rows)


def _measured(how: str, what: str, record: Record, before: Variant, after: Variant) -> dict:
    where = record.environment.gpu or "CPU"
    return {
        "": f"{how} ({where}, {record.environment.date})",
        "what is trained": what,
        "peak before": format_bytes(before.peak_bytes),
        "peak after": format_bytes(after.peak_bytes),
        "× less": times(after.times_less(before), digits=1),
        # How long a step takes on a CPU says nothing of a GPU.
        "a step, or whether it fits": _seconds(record, before.seconds, after.seconds),
    }


def _seconds(record: Record, before: Seconds | None, after: Seconds | None) -> str:
    if record.environment.gpu is None or before is None or after is None:
        return "-"

    def said(seconds: Seconds) -> str:
        return f"{seconds.median:.2g} s (± {seconds.spread:.1g})"

    return f"{said(before)} → {said(after)}"


def _predicted(kept: PredictedCard) -> dict[str, str]:
    def fits(gpu: str) -> str:
        both = ["fits" if kept.fits(run, gpu) else "too large" for run in (kept.before, kept.after)]
        return " → ".join(both)

    return {
        "": f"**predicted** (no GPU used, {kept.date})",
        "what is trained": kept.what,
        "peak before": format_bytes(kept.before.peak_bytes),
        "peak after": format_bytes(kept.after.peak_bytes),
        "× less": times(kept.before.peak_bytes / kept.after.peak_bytes, digits=1),
        "a step, or whether it fits": "; ".join(
            f"{size}: {fits(size)}" for size in kept.free_bytes
        ),
    }


def _what(record: Record) -> str:
    sizes = record.sizes
    return f"{sizes['model']}, {sizes['batch']} × {sizes['sequence']:,} tokens"


def _ends(record: Record) -> tuple[Variant, Variant]:
    return record.variants[0], record.variants[-1]


def measured_here(name: str, root: Path) -> Record | None:
    """The lesson's first record, from the largest device that has run it."""
    files = sorted(path for path in (root / LESSONS).glob("*.json") if path.stem != "predicted")
    data = [results.load(path) for path in files]
    data.sort(key=lambda each: each.environment.gpu_bytes or 0, reverse=True)
    found = [record for each in data for record in each.records if record.notebook == name]
    return found[0] if found else None


def on_gpu(about: Mapping[str, str], root: Path) -> tuple[Record, Variant, Variant]:
    """The record that is meant, and its two variants.

    Args:
        about: its `file`, its `notebook`, and the variants' names, `before` and `after`.
        root: the checkout.

    Raises:
        ValueError: no record of this notebook has both.
    """
    data = results.load(root / "results" / about["file"])
    for record in data.records:
        by_name = {variant.name: variant for variant in record.variants}
        if record.notebook == about["notebook"] and {about["before"], about["after"]} <= set(
            by_name
        ):
            return record, by_name[about["before"]], by_name[about["after"]]
    raise ValueError(
        f"{about['file']} has no record of {about['notebook']} with {about['before']!r} and"
        f" {about['after']!r}, which the card is to show"
    )


# The prediction -----------------------------------------------------------------------------------


def predict_card(of: Lesson, **changes: object) -> PredictedCard:
    """Predict what a lesson's card says of a large model.

    Args:
        of: the lesson; its metadata say which run (`fine_tune`'s options).
        **changes: other options for both runs: `layers=2`, to have it sooner.
    """
    about = of.about["card"]["predicted"]
    runs: list[PredictedRun] = []
    free = {}
    for options in (about["before"], about["after"]):
        chosen = about["options"] | options | changes
        found = predict(fine_tune, gpu=GPUS["80 GB"], progress=False, **chosen)
        fits = {size: found.fits(gpu) for size, gpu in GPUS.items()}
        free = {size: fit.free_bytes for size, fit in fits.items()}
        runs.append(_run(found, {size: fit.needed_bytes for size, fit in fits.items()}))
    return PredictedCard(
        notebook=of.name,
        what=about["what"],
        before=runs[0],
        after=runs[1],
        free_bytes=free,
        torch=torch.__version__,
        date=datetime.now(UTC).date().isoformat(),
    )


def _run(found: Prediction, needed: dict[str, int]) -> PredictedRun:
    return PredictedRun(
        peak_bytes=found.peak_bytes,
        needed_bytes=needed,
        columns=dict(found.columns),
        phase=found.phase,
    )


def main(numbers: list[str]) -> None:
    """Predict the cards of the lessons with these numbers, or of all."""
    root = find_root()
    for each in map(lesson, lessons(root)):
        if "predicted" in each.about.get("card", {}) and (not numbers or each.number in numbers):
            print(each.name, flush=True)
            print("written:", keep_card(root, predict_card(each)).relative_to(root), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
