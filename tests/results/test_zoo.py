"""The zoo's file."""

import pytest

from memlab.results.zoo import ZOO, load_zoo


def test_what_is_no_zoo_is_refused_with_its_place(tmp_path):
    path = tmp_path / ZOO
    path.write_text('{"torch": "2.13.0", "transformers": "5", "models": 0, "rows": []}')
    with pytest.raises(ValueError, match="models: .* not 0"):
        load_zoo(path)
    with pytest.raises(FileNotFoundError):
        load_zoo(tmp_path / "other.json")
