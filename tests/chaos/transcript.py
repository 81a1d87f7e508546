"""What was typed and what came back, fit for the docs: no name of a host, no path of this machine."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

WIDTH = 160
_NOISE = re.compile(
    r"cli\.py:(?!67)|Next steps|job_manager\.py|sdk\.py|Running entrypoint|^\s*\(2\) raylet|^ +\["
)
_PROGRESS = re.compile(r"(ingest|pretrain|dedupe[^:]*): [^:]*\d+/\d+ \w+, \d+:\d\d passed")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Transcript:
    """Sections of a log. `names`: what stands for a path, longest paths first."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = dict(sorted(names.items(), key=lambda item: -len(item[0])))
        self._lines: list[str] = []

    def plain(self, text: str) -> str:
        text = _COLOURS.sub("", text)
        for path, name in self._names.items():
            text = text.replace(path, name)
        return text

    def section(self, title: str, *words: str) -> None:
        self._lines += ["", f"## {title}", "", *words]

    def block(self, where: str, command: Sequence[str], log: Path) -> None:
        """A command on a machine with all that it printed, notes in between included."""
        typed = " ".join(self.plain(part) for part in command)
        self._lines += ["", "```", *wrapped(f"{where}$ {typed}"), *brief(self.plain(log.read_text())), "```"]

    def write(self, path: Path) -> None:
        path.write_text("\n".join(self._lines).strip() + "\n")


def brief(text: str) -> list[str]:
    """The lines of a log without Ray's advice, long ones cut, and of progress the first and the last before
    something else is said."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip() and not _NOISE.search(line)]
    kept = []
    for before, line, after in zip(["", *lines], lines, [*lines[1:], ""], strict=False):
        if _PROGRESS.match(line) and _PROGRESS.match(before) and _PROGRESS.match(after):
            continue
        kept.append(line if len(line) <= WIDTH else f"{line[: WIDTH - 4]} ...")
    return kept


def wrapped(command: str, width: int = 118) -> list[str]:
    """A long command over several lines, with backslashes."""
    lines, line = [], ""
    for word in command.split(" "):
        if line and len(line) + len(word) + 3 > width:
            lines.append(f"{line} \\")
            line = f"      {word}"
        else:
            line = f"{line} {word}" if line else word
    return [*lines, line]


def note(log: Path, text: str) -> None:
    """A line of ours in the log of a command that is running (it appends, too)."""
    with open(log, "a") as stream:
        stream.write(f"--- {text} ---\n")
