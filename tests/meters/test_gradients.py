"""Parameters that need a gradient and got none."""

import torch
from torch import nn

from memlab.meters.gradients import Gradients


def missing(gets, frozen=(), changed=()):
    """What is missing of four parameters of 12 bytes each, of which these get a gradient."""
    parameters = [nn.Parameter(torch.ones(3), requires_grad=i not in frozen) for i in range(4)]
    gradients = Gradients()
    for number, parameter in enumerate(parameters):
        gradients.note_parameter(parameter)
        if number in gets:
            gradients.note(parameter)
        if number in changed:
            with torch.no_grad():
                parameter.add_(1)
    return gradients.missing()


def test_what_got_none_is_counted_among_what_needs_one():
    assert missing(gets=[0]) == (3, 4, 36, 48)
    assert missing(gets=[0], frozen=[1, 2]) == (1, 2, 12, 24)
    text = str(missing(gets=[0]))
    assert text == "3 of 4 parameters that need a gradient got none (36 B of 48 B)"


def test_nothing_is_missing_where_all_or_none_got_one_or_the_others_are_frozen():
    assert missing(gets=range(4)) is None
    assert missing(gets=[]) is None
    assert missing(gets=[0, 1], frozen=[2, 3]) is None


def test_a_parameter_that_was_changed_has_had_a_gradient():
    assert missing(gets=[0], changed=[1, 2, 3]) is None
    assert missing(gets=[0], changed=[1]) == (2, 4, 24, 48)
