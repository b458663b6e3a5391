#!/usr/bin/env python3
"""Connect two network devices with a delay: `slow_link.py DEVICE DEVICE MILLISECONDS FILE`.

Frames arrive at the other device the given number of milliseconds after they were sent. FILE selects the TCP traffic
that passes: `all`, `only 2000-2199` (to or from these ports) or `without 2000-2199`; it is read again when it changes.
Not every kernel has the built-in alternative, `tc ... netem`. Needs root.
"""

import collections
import fcntl
import os
import struct
import sys
import threading
import time

TUNSETIFF = 0x400454CA
TAP_WITHOUT_HEADER = 0x0002 | 0x1000
IPV4, TCP = 0x0800, 6


def device(name):
    file = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH", name.encode(), TAP_WITHOUT_HEADER))
    return file


class Rule:
    """The TCP traffic that passes, as configured by the file."""

    def __init__(self, path):
        self.path, self.seen, self.words = path, 0, ["all"]

    def passes(self, frame):
        changed = os.stat(self.path).st_mtime_ns
        if changed != self.seen:
            self.seen, self.words = changed, open(self.path).read().split() or self.words
        (kind,) = struct.unpack("!H", frame[12:14])
        if self.words[0] == "all" or kind != IPV4 or frame[23] != TCP:
            return True
        begin = 14 + 4 * (frame[14] & 15)
        low, high = map(int, self.words[1].split("-"))
        named = any(low <= port <= high for port in struct.unpack("!HH", frame[begin : begin + 4]))
        return named == (self.words[0] == "only")


def carry(source, target, delay, rule):
    waiting = collections.deque()
    there_is = threading.Semaphore(0)

    def deliver():
        while True:
            there_is.acquire()
            due, frame = waiting.popleft()
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                os.write(target, frame)
            except OSError:
                pass  # The device is down: the cable is pulled out.

    threading.Thread(target=deliver, daemon=True).start()
    while True:
        try:
            frame = os.read(source, 1 << 17)
        except OSError:
            time.sleep(0.01)
            continue
        if rule.passes(frame):
            waiting.append((time.monotonic() + delay, frame))
            there_is.release()


first, second = (device(name) for name in sys.argv[1:3])
delay, rule = float(sys.argv[3]) / 1000, Rule(sys.argv[4])
threading.Thread(target=carry, args=(first, second, delay, rule), daemon=True).start()
print("ready", flush=True)
carry(second, first, delay, rule)
