"""Who holds what steps leave behind is asked while the loop runs."""

import pytest
import torch

from memlab.leftovers import Leftovers


def train(keep, steps=6):
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    outputs = []
    for batch in torch.randn(steps, 4, 8):
        output = model(batch)
        output.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if keep:
            outputs.append(output)


@pytest.mark.parametrize("keep", [True, False])
def test_what_a_function_held_is_known_after_it(keep):
    with Leftovers(torch.device("cpu")) as leftovers:
        train(keep)
    paths = [holder.path for holder in leftovers.holders]
    assert any("list `outputs`" in path and "in train()" in path for path in paths) == keep
    assert bool(paths) == keep
    # How many entries there are is said of the step at which it was seen.
    assert all("(4 entries after step 5)" in path for path in paths)


def test_a_training_afterwards_is_not_looked_at():
    with Leftovers(torch.device("cpu")) as leftovers:
        pass
    train(keep=True)
    assert leftovers.holders == []
