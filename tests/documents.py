"""The documents of this repository, and the fenced blocks in them."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import attrs

ROOT = Path(__file__).resolve().parents[1]
_GENERATED = {"_build", "results"}
_FENCE = re.compile(r"^( *)```(\S*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"(?:# (\w+\.py)|/\* (\w+\.c) \*/)\n")
_OUTPUT = re.compile(r"^\s*print\(.*\)\s+# (.*)$", re.MULTILINE)
_DRAWN = re.compile(r"\|.*\||\+--|\].*\[")


@attrs.frozen
class Block:
    """A fenced block. ``kind`` is what stands behind the fence."""

    document: str
    kind: str
    text: str

    @property
    def file(self) -> str | None:
        """The name of the file that it is, to be run by blocks after it: its first line has it as a comment."""
        found = _FILE.match(self.text)
        return (found[1] or found[2]) if found else None

    @property
    def printed(self) -> list[str]:
        """What its lines say they print: the comments behind ``print(...)``."""
        return _OUTPUT.findall(self.text)

    @property
    def is_drawing(self) -> bool:
        """Whether it is made of lines and boxes, rather than of words."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        return 3 * sum(bool(_DRAWN.search(line)) for line in lines) >= len(lines)

    def shows(self, output: str) -> bool:
        """Whether it is that output; ``...`` stands for anything in a line, and alone on a line for any lines."""
        patterns = []
        for line in self.text.splitlines():
            any_lines = line.strip() == "..."
            patterns.append(r"(?:.*\n)*" if any_lines else ".*".join(map(re.escape, line.split("..."))) + r" *\n")
        return re.fullmatch("".join(patterns), output) is not None


def documents() -> list[str]:
    """Every document that somebody wrote, by its path from the root."""
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*.md"))
    return sorted(str(path) for path in found if not any(_is_foreign(part) for part in path.parts))


def blocks(document: str) -> list[Block]:
    """The fenced blocks of a document, in order."""
    found = _FENCE.findall((ROOT / document).read_text())
    return [Block(document, kind, textwrap.dedent(text)) for _, kind, text in found]


def _is_foreign(part: str) -> bool:
    return part.startswith(".") or part in _GENERATED
