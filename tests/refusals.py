"""How the tests read a refusal."""

import pytest

from ddpm_jax.runtime.errors import UserError


def sentence(call, *args, **kwargs):
    """The message of a UserError, which must be one line."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text
