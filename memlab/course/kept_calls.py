"""What was predicted of a notebook's calls of `measure`, kept from one start to the next."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from memlab import results
from memlab.course.rerun import Call

# What makes a prediction: rules, techniques, models, the notebook.
_SOURCES = ("predict.py", "ledger", "meters", "recipe", "techniques", "workloads")


class Kept:
    """What was predicted of a notebook's calls, by their number; written after each."""

    def __init__(self, root: Path, path: Path, file: str, on_disk: bool):
        self.file = root / "build" / "validate" / f"{path.stem}-{Path(file).stem}.json"
        self.on_disk = on_disk
        self._hash = _hash_of(root, path)
        self.found: dict[int, dict] = {}
        if on_disk and self.file.is_file():
            data = json.loads(self.file.read_text(encoding="utf-8"))
            if data["hash"] == self._hash:
                self.found = {int(number): each for number, each in data["calls"].items()}

    def add(self, call: Call) -> None:
        """Predict a call and keep what was found."""
        began = time.perf_counter()
        try:
            prediction = call.prediction or call.predict()
        except Exception as error:  # the other variants go on
            found = {"error": f"{type(error).__name__}: {error}"}
        else:
            found = {
                "allocated": prediction.allocated_bytes,
                "reserved": prediction.reserved_bytes,
                "beside": call.beside,
                "notes": list(prediction.notes),
            }
        self.found[call.number] = found
        seconds = time.perf_counter() - began
        if self.on_disk:
            print(f"    run {call.number}: {seconds:.1f} s {found.get('error', '')}", flush=True)
            text = json.dumps({"hash": self._hash, "calls": self.found}, indent=1)
            results.replace(self.file, text)


def _hash_of(root: Path, path: Path) -> str:
    digest = hashlib.sha256(path.read_bytes())
    for name in _SOURCES:
        source = root / "memlab" / name
        for file in [source] if source.is_file() else sorted(source.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
