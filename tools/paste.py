"""Renew what the techniques have pasted from `_patch.py` and `_blocks.py`: python tools/paste.py"""

import re
import sys
from pathlib import Path

TECHNIQUES = Path(__file__).resolve().parent.parent / "memlab" / "techniques"
SOURCES = ("_patch.py", "_blocks.py")


def pasted(text: str, source_name: str) -> str | None:
    """Return what stands between a source's markers, and the markers; None where there are none."""
    name = re.escape(source_name)
    found = re.search(
        rf"^# --- pasted from {name}: begin -+\n.*?^# --- pasted from {name}: end -+\n",
        text,
        re.MULTILINE | re.DOTALL,
    )
    return found and found.group()


def renewed(text: str, sources: dict[str, str]) -> str:
    """Return a technique's text with its pastes replaced by those of the sources."""
    for name, source in sources.items():
        if old := pasted(text, name):
            text = text.replace(old, pasted(source, name))
    return text


def main() -> int:
    sources = {name: (TECHNIQUES / name).read_text() for name in SOURCES}
    for path in sorted(TECHNIQUES.glob("*.py")):
        before = path.read_text()
        after = renewed(before, sources)
        if after != before:
            path.write_text(after)
            print(f"renewed {path.relative_to(TECHNIQUES.parent.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
