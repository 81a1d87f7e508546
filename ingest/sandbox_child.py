"""The decoder process of ingest.sandbox: reads requests on stdin, writes items on stdout, until EOF."""

import json
import os
import resource
import signal
import sys

import cv2

from ingest.config import ReadRules
from ingest.frames import Item, to_message
from ingest.read import read_file
from ingest.sandbox import HEADER


def main() -> None:
    rules = ReadRules.model_validate_json(sys.argv[1])
    seconds, memory_mib = float(sys.argv[2]), int(sys.argv[3])
    channel = os.dup(1)
    os.dup2(2, 1)  # a library that prints must not break the stream of messages
    cv2.setNumThreads(1)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while request := _receive():
        _serve(channel, request, rules, seconds)


def _serve(channel: int, request: dict[str, str], rules: ReadRules, seconds: float) -> None:
    """Send the items of one file, each with the mark whether it is the last."""
    pending: Item | None = None
    # The parent ends a late child; should the parent be gone, the alarm does.
    signal.alarm(2 * max(1, round(seconds)))
    for item in read_file(rules=rules, **request):
        if pending is not None:
            _send(channel, pending, last=False)
        pending = item
        signal.alarm(2 * max(1, round(seconds)))
    assert pending is not None
    _send(channel, pending, last=True)
    signal.alarm(0)


def _receive() -> dict[str, str] | None:
    head = sys.stdin.buffer.read(HEADER.size)
    if len(head) < HEADER.size:
        return None
    return json.loads(sys.stdin.buffer.read(HEADER.unpack(head)[0]))


def _send(channel: int, item: Item, last: bool) -> None:
    header, pixels = to_message(item)
    encoded = json.dumps(header | {"last": last}).encode()
    parts = [memoryview(HEADER.pack(len(encoded), len(pixels)) + encoded), pixels]
    while parts:
        sent = os.writev(channel, parts)
        while parts and sent >= len(parts[0]):
            sent -= len(parts.pop(0))
        if parts:
            parts[0] = parts[0][sent:]


if __name__ == "__main__":
    main()
