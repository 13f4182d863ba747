"""Targets lie beside a module's input."""

import types

import pytest
import torch

from memlab.meters.beside import targets_beside, variables_of

ROWS = 6


def pair():
    return torch.randn(ROWS, 3), torch.randint(5, (ROWS,))


def addresses(tensors):
    return {tensor.data_ptr() for tensor in tensors}


def in_a_tuple(inputs, targets):
    return inputs, targets


def in_a_dictionary(inputs, targets):
    return {"inputs": inputs, "labels": targets}


def in_an_object(inputs, targets):
    return types.SimpleNamespace(inputs=inputs, targets=targets)


def in_a_closure(inputs, targets):
    return lambda: (inputs, targets)


def in_a_generator(inputs, targets):
    def run():
        own_inputs, own_targets = inputs, targets
        yield
        del own_inputs, own_targets

    generator = run()
    next(generator)
    return generator


@pytest.mark.parametrize(
    "hold", [in_a_tuple, in_a_dictionary, in_an_object, in_a_closure, in_a_generator]
)
def test_targets_are_found_where_the_inputs_are(hold):
    inputs, targets = pair()
    holder = hold(inputs, targets)
    assert addresses(targets_beside([inputs])) == addresses([targets])
    del holder


def test_what_has_another_first_size_or_a_gradient_is_no_target():
    inputs = torch.randn(ROWS, 3)
    others = (inputs, torch.randn(3), torch.randn(ROWS, requires_grad=True), torch.tensor(1.0))
    assert targets_beside([inputs]) == []
    del others


def test_a_data_set_in_a_list_is_no_target():
    data = [torch.randn(ROWS, 3) for _ in range(10)]
    found = addresses(targets_beside([data[0]]))
    assert not found & addresses(data)


def test_without_inputs_there_are_none():
    assert targets_beside([]) == []


def test_the_variables_of_a_function_are_not_kept_alive():
    import sys
    import weakref

    class Thing:
        pass

    thing = Thing()
    seen = weakref.ref(thing)
    assert "thing" in variables_of(sys._getframe())
    del thing
    assert seen() is None
