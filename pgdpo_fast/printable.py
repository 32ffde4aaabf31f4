"""Text from outside (prompts, paths, ids) as it may be shown: one line that does nothing to a terminal."""

from __future__ import annotations

import unicodedata

__all__ = ["printable"]

LONGEST = 1000
# marks that turn the direction of the text after them: a name could show as another
TURNING = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str, longest: int = LONGEST) -> str:
    """`text` with control characters, line ends, direction marks and lone surrogates as escapes, its middle left out
    where it is longer than `longest`. Scripts and emoji of any kind stay as they are.
    """
    if len(text) > longest:
        half = longest // 2 - 10
        text = f"{text[:half]} […{len(text) - 2 * half}…] {text[-half:]}"
    return "".join(
        character.encode("unicode_escape").decode()
        if character in TURNING or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        else character
        for character in text
    )
