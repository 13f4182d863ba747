"""The lines of the user's code that call PyTorch."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memlab import measure, watch
from memlab.meters.lines import Lines
from memlab.workloads import gpt
from tests.helpers import global_hooks

pytestmark = pytest.mark.usefixtures("objects_frozen")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand = nn.Linear(16, 64)
        self.weight = nn.Parameter(torch.randn(64, 16))

    def forward(self, x):
        hidden = self.expand(x)  # + 1
        hidden = hidden.relu()  # + 2
        gate = hidden.sigmoid() * hidden  # + 3
        return nn.functional.dropout(gate @ self.weight)  # + 4


FORWARD = Net.forward.__code__.co_firstlineno


def line(offset, code=None):
    first = FORWARD if code is None else code.co_firstlineno
    return f"test_lines.py:{first + offset}"


def train(recompute=False):
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9)
    while True:
        x = torch.randn(256, 16, requires_grad=True)
        y = checkpoint(net, x, use_reentrant=False) if recompute else net(x)
        loss = y.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def lines_of(measurement, size):
    """The lines of the blocks of a size, in the first step, in the order of their birth."""
    blocks = [block for block in measurement.ledger.blocks if block.bytes == size]
    return [block.line for block in sorted(blocks, key=lambda block: block.born)]


def test_each_block_has_its_line():
    lines = lines_of(measure(train, steps=1, lines=True), 256 * 64 * 4)
    forward = [line(1), line(2), line(3), line(3)]
    assert lines[:4] == forward
    # Backward: of the product with the weight, of gate, of relu.
    assert lines[4] == f"{line(4)} (backward)"
    assert set(lines[4:]) == {f"{line(n)} (backward)" for n in (2, 3, 4)}


def test_a_recomputation_has_the_lines_that_run_again():
    lines = lines_of(measure(train, steps=1, lines=True, recompute=True), 256 * 64 * 4)
    assert lines[:8] == [line(1), line(2), line(3), line(3)] * 2


def test_the_line_is_in_the_words_of_a_block_and_without_it_there_is_none():
    [largest] = measure(train, lines=True).largest(1)
    assert str(largest).endswith(largest.line) and largest.line.startswith("test_lines.py:")
    assert {block.line for block in measure(train).ledger.blocks} == {""}


def other_blocks():
    """A weight that is used twice, in a list and in place."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 64) * 0.05)
    while True:
        hidden = torch.ones(32, 64)
        for _ in range(3):
            hidden = (hidden @ weight).relu()
            hidden = hidden.masked_fill(hidden > 1, 0)
        loss = hidden.prod(1).sum() + hidden.cumsum(1).mean()
        loss.backward()
        weight.grad = None
        yield loss


def train_gpt():
    torch.manual_seed(0)
    model = gpt.GPT(gpt.tiny(layers=2))
    optimizer = torch.optim.AdamW(model.parameters())
    while True:
        tokens, targets = torch.randint(60, (2, 2, 32))
        loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss


@pytest.mark.parametrize("run", [train, other_blocks, train_gpt])
def test_no_byte_is_another(run):
    plain, with_lines = measure(run), measure(run, lines=True)
    assert with_lines.losses == plain.losses
    assert with_lines.peak_bytes == plain.peak_bytes
    assert with_lines.columns == plain.columns

    def blocks(measurement):
        return [(block.bytes, block.column, block.phase) for block in measurement.ledger.blocks]

    assert blocks(with_lines) == blocks(plain)


def test_code_of_memlab_and_torch_is_not_the_users():
    measured = measure(train_gpt, steps=1, lines=True)
    called = line(6, train_gpt.__code__)  # model(tokens, targets)
    made = {block.line for block in measured.ledger.blocks if block.module.startswith("blocks.0")}
    assert made == {called, f"{called} (backward)"}


def test_watch_has_lines_too():
    run = train()
    next(run)
    with watch(lines=True) as watched:
        next(run)
    assert line(1) in lines_of(watched.measurement, 256 * 64 * 4)


def test_afterwards_nothing_is_left_switched_on():
    before = global_hooks()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        measure(lambda: lambda: Net()(torch.ones(1, 3)), lines=True)
    assert global_hooks() == before
    lines = Lines()
    with lines:
        torch.ones(1)
    noted = len(lines.spans)
    torch.ones(1)
    assert len(lines.spans) == noted == 1


def test_many_calls_of_one_line_are_one_span():
    with Lines() as lines:
        total = sum(torch.ones(1) for _ in range(100))
        total.sum()
    assert [span.name.rpartition(":")[0] for span in lines.spans] == ["test_lines.py"] * 2


def test_a_compiled_model_is_not_broken_off_at():
    torch.compiler.reset()
    net = torch.compile(Net(), backend="eager", fullgraph=True)
    with Lines() as lines:
        net(torch.ones(4, 16))
    assert lines.spans
    torch.compiler.reset()
