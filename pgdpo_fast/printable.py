"""Text from outside (prompts, paths, ids) as it may be shown: one line that does nothing to a terminal."""

from __future__ import annotations

import re

__all__ = ["printable"]

LONGEST = 1000
# controls, line and paragraph separators, lone surrogates, and the marks that turn the direction of what follows, by
# which one name could show as another
HARMFUL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str, longest: int = LONGEST) -> str:
    """`text` with control characters, line ends, direction marks and lone surrogates as escapes, its middle left out
    where it is longer than `longest`. Scripts and emoji of any kind stay as they are.
    """
    if len(text) > longest:
        half = longest // 2 - 10
        text = f"{text[:half]} […{len(text) - 2 * half}…] {text[-half:]}"
    return HARMFUL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
