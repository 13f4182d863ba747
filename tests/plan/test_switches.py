"""What a switch costs in time is what the record says."""

import json
from pathlib import Path

import pytest

from memlab.plan import switches
from memlab.plan.switches import SWITCHES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.name)
def test_the_seconds_are_those_of_the_record(switch):
    records = json.loads((ROOT / switches.RECORDS).read_text())["records"]
    ladder = next(record for record in records if record["notebook"] == switches.NOTEBOOK)
    measured = {variant["name"]: variant["seconds"]["median"] for variant in ladder["variants"]}
    assert switch.seconds == tuple(measured[name] for name in switch.record)
    assert (ROOT / "memlab/techniques" / f"{switch.technique}.py").is_file() or not switch.technique
