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
    memory_mib, seconds = int(sys.argv[1]), float(sys.argv[2])
    channel = os.dup(1)
    os.dup2(2, 1)  # a library that prints must not break the stream of messages
    cv2.setNumThreads(1)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The parent ends a late child. Should the parent be gone, the alarm does: 64 images a file and more.
    patience = max(1, int(seconds)) * 64
    while request := _receive():
        signal.alarm(patience)
        rules = ReadRules(**request["rules"])
        for item in read_file(request["path"], request["kind"], request["modality"], rules):
            _send(channel, item)
        _write(channel, _message({"end": True}, b""))
        signal.alarm(0)


def _receive() -> dict | None:
    head = sys.stdin.buffer.read(HEADER.size)
    if len(head) < HEADER.size:
        return None
    return json.loads(sys.stdin.buffer.read(HEADER.unpack(head)[0]))


def _send(channel: int, item: Item) -> None:
    header, pixels = to_message(item)
    _write(channel, _message(header, pixels))
    _write(channel, pixels)


def _message(header: dict, pixels: bytes) -> bytes:
    encoded = json.dumps(header).encode()
    return HEADER.pack(len(encoded), len(pixels)) + encoded


def _write(channel: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(channel, view) :]


if __name__ == "__main__":
    main()
