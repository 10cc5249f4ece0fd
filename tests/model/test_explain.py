"""What transformers stumbles over is told in words for people."""

import pytest

from onecard.model.explain import explain_error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyError("siluu"), "'siluu' is missing, or unknown"),
        (AttributeError("'list' object has no attribute 'get'"), "a value in it is of another kind than is expected"),
        (ValueError("TypeError: Field 'a' expected int, got NoneType."), "Field 'a' expected int, got null"),
        (ValueError("none of (<class 'int'>, <class 'str'>)"), "none of (int, str)"),
        (ValueError("\x1b[31mred\n  and on"), "red and on"),
        (ValueError(), "ValueError"),
    ],
)
def test_an_error_is_told_without_words_of_the_program(error: Exception, text: str) -> None:
    assert explain_error(error).startswith(text)
    assert "TypeError" not in explain_error(error)
