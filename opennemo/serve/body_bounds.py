"""A bound on the number of values in a JSON body, counted while it is received.

Parsing JSON holds the interpreter lock, so no other request is answered then, and its time
follows the number of values, not bytes: 16 MB of text are read in milliseconds, 16 MB of `[],` in
seconds. Values outside strings are counted by numpy, chunk by chunk, before any is built.
"""

import numpy as np

MAX_VALUES = 150_000  # of a body: a prompt of NeMo's full context as ids, and more
QUOTE, COMMA, LIST, OBJECT = b'",[{'


class ValueCounter:
    """Counts the values of a JSON text that comes in chunks; it does not validate the text.

    `has_nul` says whether it holds a NUL byte, as UTF-16 and UTF-32 do.
    """

    def __init__(self) -> None:
        self.n_values, self.has_nul = 0, False
        self._in_string, self._rest = False, b""

    def feed(self, chunk: bytes) -> None:
        self.has_nul |= b"\0" in chunk
        data, self._rest = self._rest + chunk, b""
        n_escapes = len(data) - len(data.rstrip(b"\\"))
        if n_escapes % 2:  # the escaped character comes with the next chunk
            data, self._rest = data[:-1], data[-1:]
        if b"\\" in data:
            data = data.replace(b"\\\\", b"  ").replace(b'\\"', b"  ")
        bytes_ = np.frombuffer(data, np.uint8)
        quotes = bytes_ == QUOTE
        inside = np.logical_xor.accumulate(quotes) ^ self._in_string if len(quotes) else quotes
        values = (bytes_ == COMMA) | (bytes_ == LIST) | (bytes_ == OBJECT)
        self.n_values += int(np.count_nonzero(values & ~inside))
        self._in_string ^= bool(np.count_nonzero(quotes) % 2)
