"""Write the repository's public address, as pyproject.toml has it, wherever it is named: `make
address`.

Badges, links and the notebooks' set-up cells name it, as github.com/…/memlab or, for Google Colab,
github/…/memlab. A notebook whose outputs are up to date stays so: nothing but the address changes
in it.
"""

import json
import re
import tomllib
from pathlib import Path

from memlab.course.notebook import source_hash

NAMED = re.compile(r"(github(?:\.com)?/)[\w.-]+/memlab\b")


def main(root):
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    slug = project["urls"]["Repository"].removeprefix("https://github.com/")
    for path in [*root.glob("*.md"), root / "CITATION.cff", *(root / "notebooks").rglob("*.ipynb")]:
        old = path.read_text(encoding="utf-8")
        new = NAMED.sub(rf"\g<1>{slug}", old)
        if path.suffix == ".cff":
            # A comment while the address is the placeholder: no link leads nowhere.
            comment = "# " if slug.startswith("OWNER/") else ""
            new = re.sub(r"^(# )?(?=repository-code:)", comment, new, flags=re.MULTILINE)
        if path.suffix == ".ipynb":
            new = new.replace(source_hash(json.loads(old)), source_hash(json.loads(new)))
        if new != old:
            path.write_text(new, encoding="utf-8")
            print("written:", path.relative_to(root))


if __name__ == "__main__":
    main(Path(__file__).resolve().parents[1])
