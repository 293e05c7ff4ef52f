import pytest

from spt_jax.errors import summary


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "OSError"),
        (" \n", "OSError"),
        ("no room\nwhatever", "OSError: no room"),
        ("bad index. See full TensorStore details: {", "OSError: bad index."),
        ("0123456789", "OSError: 0123456789"),
        ("012 345 6789", "OSError: 012 345 …"),
        ("0123456789a", "OSError: 01234567 …"),
    ],
)
def test_an_error_in_a_line(text, expected):
    assert summary(OSError(text), limit=10) == expected
