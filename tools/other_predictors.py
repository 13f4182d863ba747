"""What other tools say of the runs of the H100's records: writes results/other_predictors.md.

    pip install torch-kitsune accelerate        (in an environment of its own)
    python tools/other_predictors.py

A tool that is not installed has a column of dashes. Each is used as its own documentation shows it:

- torch-kitsune: `predict_memory` with the model, the shape of its input, and AdamW.
- accelerate: what `accelerate estimate-memory` prints for training with Adam, from the model itself
  instead of the Hub. It asks for no batch.
- MemTracker (part of PyTorch): two steps under fake tensors. It runs on the host's device, so it
  sees the operators that a CPU chooses.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from memlab import results
from memlab.show import Table
from memlab.units import format_bytes
from memlab.workloads import gpt

ROOT = Path(__file__).resolve().parents[1]
SMALL, LARGE = "nvidia-h100-80gb-hbm3.json", "nvidia-h100-80gb-hbm3-large.json"

#: File, number of the record, variant → the model, its sequences of 1,024 tokens, BF16 autocast.
ROWS = {
    (SMALL, 1, "batch 1"): (gpt.gpt2_124m(), 1, False),
    (SMALL, 1, "batch 2"): (gpt.gpt2_124m(), 2, False),
    (SMALL, 1, "batch 4"): (gpt.gpt2_124m(), 4, False),
    (LARGE, 0, "naive"): (gpt.gpt2_124m(attention="naive"), 8, False),
    (LARGE, 0, "SDPA"): (gpt.gpt2_124m(attention="sdpa"), 8, False),
    (LARGE, 0, "BF16 autocast"): (gpt.gpt2_124m(attention="sdpa"), 8, True),
    (LARGE, 3, "naive"): (gpt.gpt2_124m(attention="naive"), 16, False),
    (LARGE, 4, "naive"): (gpt.gpt2_350m(attention="naive"), 8, False),
}


def kitsune(config: gpt.GPTConfig, sequences: int, autocast: bool) -> int | None:
    """torch-kitsune's total. It has no mixed precision."""
    with contextlib.suppress(ImportError):
        from kitsune.predict import predict_memory

        if autocast:
            return None
        with torch.device("meta"):
            model = gpt.GPT(config)
        shape = (config.context_length,)
        return predict_memory(model, shape, sequences, optimizer="adamw").total_bytes
    return None


def accelerate(config: gpt.GPTConfig, sequences: int, autocast: bool) -> int | None:
    """accelerate's "Training using Adam"."""
    with contextlib.suppress(ImportError):
        from accelerate.commands.estimate import estimate_training_usage
        from accelerate.utils import calculate_maximum_sizes

        with torch.device("meta"):
            model = gpt.GPT(config)
        total, _ = calculate_maximum_sizes(model)
        return int(
            max(estimate_training_usage(total, "float16" if autocast else "float32").values())
        )
    return None


def mem_tracker(config: gpt.GPTConfig, sequences: int, autocast: bool) -> int:
    """The peak that MemTracker finds in two steps on fake tensors."""
    with FakeTensorMode():
        model = gpt.GPT(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
        shape = (sequences, config.context_length)
        tokens, targets = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
        tracker = MemTracker()
        tracker.track_external(model, optimizer, tokens, targets)
        for step in range(2):
            with tracker:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    loss = model(tokens, targets)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            if step == 0:
                tracker.reset_mod_stats()
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def version(package: str) -> str:
    """A package's version; that it is missing, else."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package}, not installed"


def main() -> None:
    """Ask every tool about every row, and write the table."""
    ours = results.load_predictions(ROOT)
    tools = {
        "memlab.predict": None,
        version("torch-kitsune"): kitsune,
        version("accelerate"): accelerate,
        f"MemTracker of torch {torch.__version__}": mem_tracker,
    }
    rows = []
    for (file, number, name), run in ROWS.items():
        record = results.load(ROOT / "results" / file).records[number]
        measured = next(each.peak_bytes for each in record.variants if each.name == name)
        config, sequences, _ = run
        size = f"GPT-2 {config.parameter_count / 1e6:.0f}M"
        row = {"run": f"{size}, {sequences} × 1,024 tokens, {name}"}
        row["measured"] = format_bytes(measured)
        for tool, ask in tools.items():
            if ask is None:
                found = next(
                    each.allocated.predicted
                    for each in ours.rows
                    if (each.file, each.record, each.variant) == (file, number, name)
                )
            else:
                found = ask(*run)
            row[tool] = "-" if found is None else f"{format_bytes(found)} ({_off(found, measured)})"
        rows.append(row)
        print(row, flush=True)
    table = Table(rows, {*tools, "measured"}).to_markdown()
    text = "\n\n".join((_HEAD, table)) + "\n"
    results.replace(ROOT / "results" / "other_predictors.md", text)


def _off(predicted: int, measured: int) -> str:
    return f"{100 * (predicted / measured - 1):+.2f} %"


_HEAD = """# What other tools predict for the same runs

Written by `tools/other_predictors.py`, which says how each tool was asked. The runs are training
steps with AdamW, as the H100 measured them: allocated bytes at the peak. In brackets: how far the
prediction is from the measurement. A dash: the tool has no word for this run."""


if __name__ == "__main__":
    main()
