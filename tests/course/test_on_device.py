"""What a notebook keeps on the device while it measures."""

from memlab.course.on_device import leaves_on_device


def notebook(*cells):
    return {"cells": [{"cell_type": "code", "source": [cell]} for cell in cells]}


def test_what_lives_on_the_device_between_which_lines():
    found = leaves_on_device(
        notebook(
            "x = torch.ones(3, device=here.device)\nname = here.device.type",
            "def build():\n    inside = torch.ones(3, device=here.device)",
            "del x\nstep = proof.first_step(build)\ngap = proof.gradient_difference(step, step)",
        )
    )
    assert found == [("x", 1, 5), ("step", 6, float("inf"))]
