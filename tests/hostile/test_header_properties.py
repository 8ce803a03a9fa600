"""Generated safetensors headers: whatever a file says of itself, it is read as the safetensors library reads it, or
refused with exit code 3 or 4.

The oracle is the library. It reads some files that are refused here; each such refusal is for one of the reasons in
`STRICTER`. SDRT_MUTATIONS=10000 pytest tests/hostile/test_header_properties.py generates as many; the test takes the
first of them.
"""

from __future__ import annotations

import json
import math
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from sdrt.errors import InputFileError, UnsafeError
from sdrt.export.read.tensor_entry import ITEM_BYTES
from sdrt.export.read.tensor_file import MAX_HEADER_BYTES, MAX_SEPARATORS, open_tensor_file

STRICTER = re.compile(
    r"holds this name twice|unknown type|at most 8 sizes|more than the limit|empty or truncated download|expected"
    r" dtype, shape and|is not JSON|surrogate"
)

EXAMPLES = int(os.environ.get("SDRT_MUTATIONS", "1200"))
NAMES = st.one_of(
    st.sampled_from(
        [
            "a",
            "b",
            "layer.weight",
            "",
            "__metadata__",
            "é",
            "\U0001f34e",
            "\x1b[31m",
            "a\0b",
            '"',
            "\\",
            "\ud800",
            "x" * 300,
        ]
    ),
    st.text(max_size=8),
)
SIZES = st.one_of(
    st.integers(0, 4),
    st.sampled_from([-1, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30]),
    st.sampled_from([1.0, True, None, "2", [2]]),
)
TYPES = st.one_of(
    st.sampled_from([*ITEM_BYTES, "F32", "F16", "F4", "C64", "F8_E8M0", "f32", "F13", ""]),
    st.sampled_from([None, 4, ["F32"], {}]),
)
LIES = st.one_of(st.just(0), st.integers(-9, 9), st.sampled_from([1 << 20, 1 << 62, 1 << 63, 1 << 64]))


@st.composite
def tensors(draw: st.DrawFn) -> tuple[list[tuple[str, Any]], int]:
    """Names with their records, in the header's order, and how many bytes of data there are. Most fields are as they
    should be, some lie.
    """
    records: list[tuple[str, Any]] = []
    end = 0
    for _ in range(draw(st.integers(0, 4))):
        good = draw(st.integers(0, 5))
        dtype = draw(TYPES) if good == 0 else draw(st.sampled_from(["F32", "F16", "BF16", "U8", "I64", "F8_E4M3"]))
        shape = draw(st.lists(SIZES, max_size=10)) if good == 1 else draw(st.lists(st.integers(0, 3), max_size=3))
        size = ITEM_BYTES.get(dtype, 1) if isinstance(dtype, str) else 1
        counts = [n for n in shape if type(n) is int and n >= 0]
        length = min(math.prod(counts) * size, 1 << 80)
        start = end + (draw(LIES) if good == 2 else 0)
        stop = start + length + (draw(LIES) if good == 3 else 0)
        offsets: Any = (
            draw(st.sampled_from([[start], [], [stop, start], [start, stop, stop], {"0": start}, [float(start), stop]]))
            if good == 4
            else [start, stop]
        )
        record: Any = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        if draw(st.integers(0, 12)) == 0:
            record = draw(st.sampled_from([{}, [], None, 1, "x", {"dtype": dtype}, record | {"more": 1}]))
        records.append((draw(NAMES), record))
        end = stop if 0 <= stop < 4096 else end
    records = draw(st.permutations(records))
    return records, end


def text_of(records: list[tuple[str, Any]]) -> str:
    """The header as JSON, names that come twice included."""
    return "{" + ",".join(f"{json.dumps(name)}:{json.dumps(record)}" for name, record in records) + "}"


def check(path: Path, data: bytes) -> str:
    """What became of a file: `read` or `refused`."""
    path.write_bytes(data)
    expected: dict[str, Any] | None
    try:
        expected = {
            name: (found["dtype"], found["shape"], bytes(found["data"]))
            for name, found in safetensors.deserialize(data)
        }
    except (safetensors.SafetensorError, UnicodeError):
        expected = None
    try:
        opened = open_tensor_file(path)
    except (InputFileError, UnsafeError) as error:
        assert error.exit_code in (3, 4) and error.message.startswith(str(path)) and error.message.isprintable(), error
        assert len(error.message) < 1000
        assert expected is None or STRICTER.search(error.message), error
        return "refused"
    with opened:
        found = {
            name: (entry.dtype, list(entry.shape), bytes(opened.read_bytes(entry)))
            for name, entry in opened.entries.items()
        }
    assert found == expected
    return "read"


@given(
    made=tensors(),
    data_lie=st.sampled_from([0, 0, 0, 0, 1, -1, 40]),
    length_lie=st.one_of(*[st.just(0)] * 4, LIES),
    metadata=st.sampled_from([None, None, None, {}, {"format": "pt"}, {"a": 1}, [], {"a": "\ud800"}]),
    padding=st.sampled_from(["", "", " ", "        ", "\n", "\0", "}", ","]),
    encoding=st.sampled_from(["utf-8"] * 8 + ["utf-16-le", "utf-8-sig"]),
)
@example(made=([], 0), data_lie=0, length_lie=0, metadata=None, padding="", encoding="utf-8")
@example(
    made=([("a", {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 0]})], 0),
    data_lie=0,
    length_lie=0,
    metadata=None,
    padding="",
    encoding="utf-8",
)
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
def test_c_c7_c10_c13_generated_headers(
    tmp_path_factory: pytest.TempPathFactory,
    made: tuple[list[tuple[str, Any]], int],
    data_lie: int,
    length_lie: int,
    metadata: Any,
    padding: str,
    encoding: str,
) -> None:
    records, end = made
    if metadata is not None:
        records = [("__metadata__", metadata), *records]
    raw = (text_of(records) + padding).encode(encoding)
    length = (len(raw) + length_lie) % (1 << 64)
    event(
        check(
            tmp_path_factory.getbasetemp() / "header.safetensors",
            length.to_bytes(8, "little") + raw + bytes(max(0, end + data_lie)),
        )
    )


@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=4)),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner),
    )
)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_c_c13_any_json_for_a_header(tmp_path_factory: pytest.TempPathFactory, document: Any) -> None:
    raw = json.dumps(document).encode()
    check(tmp_path_factory.getbasetemp() / "json.safetensors", len(raw).to_bytes(8, "little") + raw)


LARGE = {
    "tiny tensors": lambda size: (
        b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(size // 60)) + b"}"
    ),
    "empty objects": lambda size: b"{" + b'"":{},' * (size // 6) + b'"":{}}',
    "empty lists": lambda size: b'{"a":[' + b"[]," * (size // 3) + b"[]]}",
    "deep": lambda size: b'{"a":' + b"[" * size,
    "numbers": lambda size: b'{"a":{"dtype":"U8","shape":[' + b"9999999," * (size // 8) + b'0],"data_offsets":[0,0]}}',
    "names of one letter": lambda size: b"{" + b'"a":1,' * (size // 6) + b'"a":1}',
}


@pytest.mark.parametrize("kind", LARGE)
def test_c8_memory_is_bounded_by_the_header(tmp_path: Path, kind: str) -> None:
    """A dense header of 2 MB costs at most 32 times as much, and the number of separators bounds what a larger one can
    cost.
    """
    size = 2_000_000
    raw = LARGE[kind](size)
    (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    tracemalloc.start()
    try:
        try:
            open_tensor_file(tmp_path / "x.safetensors").close()
            assert kind == "tiny tensors"  # a good file
        except InputFileError as error:
            assert error.message.isprintable() and len(error.message) < 1000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 * size, f"{peak:,} bytes"


def test_c8_separators_are_counted_before_the_header_is_parsed(tmp_path: Path) -> None:
    raw = b'{"a":[' + b"0," * MAX_SEPARATORS + b"0]}"
    assert len(raw) < MAX_HEADER_BYTES
    (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    tracemalloc.start()
    try:
        with pytest.raises(
            InputFileError, match="4,000,003 brackets, colons and commas, more than the limit of 4,000,000"
        ):
            open_tensor_file(tmp_path / "x.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 3 * len(raw)
    finally:
        tracemalloc.stop()
