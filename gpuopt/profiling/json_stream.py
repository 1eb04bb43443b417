"""A JSON file, plain or gzip -> its values one at a time, within limits. Standard library: its C scanner over chunks beat the incremental parsers of the registry by three times.

Strict about structure, since what is read comes from strangers: one document, ended where the file ends. Names may hold control characters and broken UTF-8, which profilers write.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from gpuopt.core import units
from gpuopt.core.errors import BadInput

CHUNK_BYTES = 1 << 16
"""What is parsed at once, a few hundred events, stays in the cache until it is read."""
MAX_VALUE_CHARS = 16 * 2**20
"""One event, or one header: Kineto's are a few kilobytes."""
MAX_RATIO = 200
"""Traces deflate 10 to 40 times; a bomb a thousand times."""
_RATIO_FROM_BYTES = 64 * 2**20

_SPACE = re.compile(r"[ \t\n\r]*").match
_MAGIC = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}


@contextmanager
def opened(path: Path, *, max_bytes: int, export: str) -> Iterator[JsonStream]:
    """The file as a stream, inflated where its first bytes say gzip. `export`: what to do about a damaged file.

    Raises BadInput: not there, no regular file, empty, above `max_bytes`, or compressed by something else.
    """
    if not path.is_file():
        raise BadInput(
            f"{path} is no file" if path.exists() else f"{path} does not exist",
            fix="name the .json or .json.gz that export_chrome_trace wrote",
        )
    try:
        size = path.stat().st_size
        with path.open("rb") as raw:
            head = raw.read(8)
            raw.seek(0)
            form = next((form for magic, form in _MAGIC.items() if head.startswith(magic)), "json")
            if not head:
                raise BadInput(f"{path.name} is empty", fix=export)
            if form not in ("json", "gzip"):
                raise BadInput(f"{path.name} is a {form} file", fix="unpack it first; .json and .json.gz are read")
            if form == "json" and size > max_bytes:
                raise _too_large(path.name, size, max_bytes)
            if form == "json":
                yield JsonStream(path.name, raw, None, max_bytes, export)
            else:
                with gzip.GzipFile(fileobj=raw, mode="rb") as inflated:
                    yield JsonStream(path.name, inflated, raw, max_bytes, export)
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise BadInput(f"{path.name} is a damaged gzip file ({error})", fix=export) from error
        raise BadInput(f"{path.name} cannot be read: {error.strerror or error}", fix="check the file and its permissions") from error
    except (EOFError, zlib.error) as error:
        raise BadInput(f"{path.name} is a truncated or damaged gzip file ({error})", fix=export) from error


def _too_large(name: str, size: float, limit: int) -> BadInput:
    return BadInput(
        f"{name} holds {units.format_bytes(size)} of JSON or more; at most {units.format_bytes(limit)} are read",
        fix="record fewer steps (schedule(active=3)), or raise --trace-limit",
    )


class JsonStream:
    """Reads forward only. Errors say where: a count of characters from the start."""

    def __init__(self, name: str, source: BinaryIO | gzip.GzipFile, compressed: BinaryIO | None, max_bytes: int, export: str) -> None:
        self.name = name
        self._source = source
        self._compressed = compressed
        self._max_bytes = max_bytes
        self._export = export
        # utf-8-sig: some tools put a byte order mark in front.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        self._scan: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder(strict=False).raw_decode
        self._buffer = ""
        self._at = 0
        self._dropped = 0
        self._num_bytes = 0
        self._ended = False
        self._unbatched_until = 0

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            self._at = _SPACE(self._buffer, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        wanted = 1
        while True:
            try:
                found, end = self._scan(self._buffer, self._at)
            except RecursionError:
                raise BadInput(f"{self.name} is nested deeper than any trace, at character {self._place()}", fix=self._export) from None
            except json.JSONDecodeError as error:
                self._need_more(error.pos, wanted, error)
            except ValueError as error:  # a number of more digits than Python converts
                raise self._invalid(str(error)[:80]) from None
            else:
                # A number that ends with the buffer may go on in the next chunk.
                if end < len(self._buffer) or not self._more():
                    self._at = end
                    return found
            wanted *= 2

    def array(self) -> Iterator[list[dict[str, Any]]]:
        """The objects of the list that comes next, in batches. Raises BadInput where an element is something else."""
        self._take("[")
        if self.peek() == "]":
            self._take("]")
            return
        while True:
            if batch := self._batch():
                yield batch
            if self.peek() != "{":
                raise self._truncated() if self.peek() == "" else self._invalid("an element of the list is no object")
            yield [self.value()]
            if self.peek() != "]":
                self._take(",")
            if self.peek() == "]":  # after a comma too many, too: hand-made exporters leave one
                self._take("]")
                return

    def _batch(self) -> list[dict[str, Any]]:
        """All elements in the buffer but the last, by one call of the scanner: twice as fast as one by one, and they share the strings of their keys.

        Where elements meet is guessed from the text. A guess that is wrong is no JSON, and then there is no batch: value() takes one element, or says what is wrong.
        """
        if self._dropped + self._at < self._unbatched_until:
            return []
        seam = self._last_seam()
        if seam is None:
            return []
        end, start = seam
        text = f"[{self._buffer[self._at : end]}]"
        try:
            found, stop = self._scan(text, 0)
        except (ValueError, RecursionError):
            found, stop = [None], 0
        if stop != len(text) or set(map(type, found)) != {dict}:
            self._unbatched_until = self._dropped + start
            return []
        self._at = start
        batch: list[dict[str, Any]] = found
        return batch

    def _last_seam(self) -> tuple[int, int] | None:
        """(end of an element, start of the next) for the last `}, {` in the buffer."""
        brace = len(self._buffer)
        for _ in range(64):
            brace = self._buffer.rfind("{", self._at, brace)
            if brace < 0:
                return None
            before = self._buffer[max(self._at, brace - 64) : brace].rstrip()
            if before.endswith(",") and (before := before[:-1].rstrip()).endswith("}"):
                return max(self._at, brace - 64) + len(before), brace
        return None

    def keys(self) -> Iterator[str]:
        """The keys of the object that comes next; read each one's value before asking for the next key."""
        self._take("{")
        if self.peek() == "}":
            self._take("}")
            return
        while True:
            if self.peek() != '"':
                raise self._invalid("a key was expected")
            key = self.value()
            self._take(":")
            yield str(key)
            if self.peek() == "}":
                self._take("}")
                return
            self._take(",")

    def end(self) -> None:
        """Nothing but white space may follow. Raises BadInput."""
        if self.peek():
            raise BadInput(
                f"{self.name} holds something after its end, at character {self._place()}: two files in one?",
                fix="split it: one document a file",
            )

    def _take(self, character: str) -> None:
        found = self.peek()
        if found != character:
            raise self._truncated() if found == "" else self._invalid(f"{character!r} was expected, not {found!r}")
        self._at += 1

    def _need_more(self, error_at: int, wanted: int, error: json.JSONDecodeError | None) -> None:
        """Read on where the value may only be cut off by the buffer's end; else say what is wrong with it."""
        is_cut = error_at >= len(self._buffer) - 16 or (error is not None and error.msg.startswith("Unterminated string"))
        if not is_cut:
            raise self._invalid(error.msg if error is not None else "a value was expected", at=error_at)
        if len(self._buffer) - self._at > MAX_VALUE_CHARS:
            raise self._invalid(f"one value of more than {MAX_VALUE_CHARS} characters")
        got = False
        for _ in range(wanted):
            got = self._more() or got
        if not got:
            raise self._truncated()

    def _more(self) -> bool:
        """Another chunk behind what is left; False at the end of the file."""
        if self._ended:
            return False
        chunk = self._source.read(CHUNK_BYTES)
        self._num_bytes += len(chunk)
        if self._num_bytes > self._max_bytes:
            raise _too_large(self.name, self._num_bytes, self._max_bytes)
        if self._compressed is not None and self._num_bytes > _RATIO_FROM_BYTES and self._num_bytes > MAX_RATIO * self._compressed.tell():
            raise BadInput(
                f"{self.name} inflates more than {MAX_RATIO} times: no trace does, a decompression bomb would", fix="do not use this file"
            )
        self._ended = not chunk
        self._dropped += self._at
        self._buffer = self._buffer[self._at :] + self._decoder.decode(chunk, final=self._ended)
        self._at = 0
        return bool(chunk)

    def _place(self) -> int:
        return self._dropped + self._at

    def _truncated(self) -> BadInput:
        return BadInput(f"{self.name} is truncated: it ends after {self._num_bytes} bytes, in the middle of a value", fix=self._export)

    def _invalid(self, why: str, *, at: int | None = None) -> BadInput:
        place = self._dropped + (self._at if at is None else at)
        return BadInput(f"{self.name} is not valid JSON at character {place}: {why}", fix=self._export)
