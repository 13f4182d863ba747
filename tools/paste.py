"""Renew what the techniques have pasted from `_patch.py`: python tools/paste.py"""

import re
import sys
from pathlib import Path

TECHNIQUES = Path(__file__).resolve().parent.parent / "memlab" / "techniques"
PASTED = re.compile(
    r"^# --- pasted from _patch\.py: begin -+\n.*?^# --- pasted from _patch\.py: end -+\n",
    re.MULTILINE | re.DOTALL,
)


def pasted(text: str) -> str | None:
    """Return what stands between the markers, and the markers; None where there are none."""
    found = PASTED.search(text)
    return found and found.group()


def renewed(text: str, source: str) -> str:
    """Return a technique's text with its paste replaced by that of the source."""
    return PASTED.sub(lambda _: pasted(source), text)


def main() -> int:
    source = (TECHNIQUES / "_patch.py").read_text()
    for path in sorted(TECHNIQUES.glob("*.py")):
        before = path.read_text()
        after = renewed(before, source)
        if after != before:
            path.write_text(after)
            print(f"renewed {path.relative_to(TECHNIQUES.parent.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
