"""Text files as a stream of pieces: UTF-8, newlines as LF, and a clear word where a file is something else."""

import codecs
import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from onecard.errors import DataError

# A batch then has enough pieces for 16 cores; throughput on two cores is the same from 32 KiB to 1 MiB.
PIECE_BYTES = 128 * 1024
_SAMPLE_BYTES = 64 * 1024
# So many characters of several bytes are no accident in another encoding.
_LEADS_OF_UTF8 = 8


def read_text_pieces(path: Path, on_bytes: Callable[[bytes], object] | None = None) -> Iterator[str]:
    """Streams a text file in pieces of about 128 KiB that end at a newline where there is one.

    A byte order mark is dropped, CRLF becomes LF, `.gz` is unpacked; `on_bytes` sees the raw bytes on their way.
    Raises DataError for a file that vanished, is binary or is not UTF-8 (with the byte offset).
    """
    try:
        with open_bytes(path) as stream:
            yield from _cut_at_newlines(_decode(path, stream, on_bytes))
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: damaged gzip file ({error}). Fetch or pack it again.") from error
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: object, error: OSError) -> DataError:
    """Says why a file or folder cannot be read, and what to look at."""
    remedy = (
        "Check who may read it."
        if isinstance(error, PermissionError)
        else "Is it whole and still there? If not, fetch it again."
    )
    return DataError(f"{path}: cannot be read ({error.strerror or error}). {remedy}")


def cut_text(text: str) -> Iterator[str]:
    """Cuts a text in memory into pieces as a file is cut, so that no piece is much larger than the others."""
    chunks = (text[start : start + PIECE_BYTES] for start in range(0, len(text), PIECE_BYTES))
    return _cut_at_newlines(chunks)


def open_bytes(path: Path) -> BinaryIO:
    """Opens a file for reading, unpacking `.gz` on the way."""
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def _decode(path: Path, stream: BinaryIO, on_bytes: Callable[[bytes], object] | None) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    offset = 0
    held_back = ""
    while True:
        chunk = stream.read(PIECE_BYTES)
        if on_bytes is not None:
            on_bytes(chunk)
        body = chunk.removeprefix(codecs.BOM_UTF8) if offset == 0 else chunk
        pending = len(decoder.getstate()[0])
        try:
            text = held_back + decoder.decode(body, final=not chunk)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, offset + len(chunk) - len(body) - pending + error.start) from error
        if "\0" in text:
            raise binary_file(path, offset + chunk.find(b"\0"))
        # A CR at the very end may be the first half of a CRLF.
        held_back = "\r" if chunk and text.endswith("\r") else ""
        text = text.removesuffix(held_back).replace("\r\n", "\n")
        if text:
            yield text
        if not chunk:
            return
        offset += len(chunk)


def _cut_at_newlines(chunks: Iterator[str]) -> Iterator[str]:
    rest = ""
    for chunk in chunks:
        text = rest + chunk
        cut = text.rfind("\n") + 1
        if cut == 0 and len(text) >= PIECE_BYTES:
            cut = len(text)
        if cut:
            yield text[:cut]
        rest = text[cut:]
    if rest:
        yield rest


def _not_utf8(path: Path, offset: int) -> DataError:
    before, after = _sample_around(path, offset)
    shown = f"byte 0x{after[0]:02X}" if after else "the end of the file"
    # A sample from the middle begins with a whole line, for no character may be cut in two.
    whole = before if len(before) == offset else before.partition(b"\n")[2]
    wide, encoding = _guess_wide(before + after), _guess_encoding(whole + after)
    if wide is not None:
        remedy = f"It is {wide} by its first bytes or its NUL bytes: save it again as UTF-8."
    elif sum(byte >= 0xC2 for byte in whole) >= _LEADS_OF_UTF8:
        remedy = "The text before it is UTF-8: mend the file there."
    elif encoding is None:
        remedy = "It looks like no text at all: leave it out of the corpus, or extract its text first."
    else:
        remedy = f"It may be {encoding}: save it again as UTF-8."
    return DataError(f"{path}: not UTF-8: {shown} at offset {offset:,} cannot be decoded. {remedy}")


def binary_file(path: Path, offset: int) -> DataError:
    """Says of a file with a NUL byte at `offset` that it is UTF-16 or no text at all."""
    encoding = _guess_wide(b"".join(_sample_around(path, offset)))
    if encoding is not None:
        return DataError(f"{path}: not UTF-8 but {encoding}, by its NUL bytes. Save it again as UTF-8.")
    return DataError(
        f"{path}: a binary file (NUL byte at offset {offset:,}), not text. Leave it out of the corpus, or extract its"
        " text first."
    )


def _sample_around(path: Path, offset: int) -> tuple[bytes, bytes]:
    """Reads what stands before an offset, from an even one on as pairs of bytes need it, and what follows."""
    start = max(0, offset - _SAMPLE_BYTES // 2) // 2 * 2
    with open_bytes(path) as stream:
        stream.seek(start)
        return stream.read(offset - start), stream.read(_SAMPLE_BYTES // 2)


def _guess_wide(sample: bytes) -> str | None:
    """Names the encoding of two bytes per character that a sample has by its mark or its NUL bytes."""
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    even, odd = sample[0::2].count(0), sample[1::2].count(0)
    if max(even, odd) > len(sample) // 8 and min(even, odd) < max(even, odd) // 50 + 1:
        return "UTF-16LE" if odd > even else "UTF-16BE"
    return None


def _guess_encoding(sample: bytes) -> str | None:
    """Names the encoding a sample decodes as; None for something that looks binary."""
    if b"\0" in sample:
        return None
    for encoding in ("gb18030", "shift_jis", "cp1252"):
        try:
            text = codecs.getincrementaldecoder(encoding)("strict").decode(sample)
        except UnicodeDecodeError:
            continue
        controls = sum(character < " " and character not in "\t\n\r\f" for character in text)
        if controls <= len(text) // 1000:
            return encoding.upper()
    return None
