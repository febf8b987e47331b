"""What a command says that refuses its words."""

from collections.abc import Callable
from typing import Any


def one_sentence(call: Callable[..., int], capsys: Any, *words: Any) -> str:
    """The single line on stderr of a call that ends with exit code 2, returned or by SystemExit."""
    try:
        code = call(*words)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2, said
    assert said.count("\n") == 1
    return said
