"""What libraries say is heard again afterwards, also where something went wrong inside."""

import logging
import warnings

import pytest

from memlab.workloads.quiet import quiet_libraries


@pytest.mark.parametrize("error", [None, ValueError])
def test_afterwards_all_is_heard_again(error, caplog):
    library = logging.getLogger("a library")
    with pytest.raises(error) if error else warnings.catch_warnings(), quiet_libraries():
        library.warning("not heard")
        warnings.warn("not heard", stacklevel=1)
        library.error("an error is")
        if error:
            raise error
    library.warning("heard")
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)
    assert caplog.messages == ["an error is", "heard"]
