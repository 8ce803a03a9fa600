"""Reads a pickle as data. Its opcodes are interpreted here, and its names are looked up in an exact table of inert
builders.

Nothing is imported, called or instantiated for a pickle. A name outside the table makes sdrt refuse the file. Written
from the opcode documentation of Python's `pickletools`, whose tokenizer it uses. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pickletools import genops
from typing import Any, BinaryIO

from sdrt.errors import InputFileError, UnsafeError, printable
from sdrt.export.read.pickle_names import (
    NAMES,
    STORAGE_TYPES,
    Baggage,
    MalformedPickle,
    Name,
    NumpyType,
    Parameters,
    StorageReference,
    is_count,
    kind,
    pairs,
)

MAX_PICKLE_BYTES = 100_000_000
MAX_OPCODES = 1_000_000
MAX_MEMO = 1_000_000
MAX_DEPTH = 200
MAX_LINE_BYTES = 1 << 20
MAX_KEY_LENGTH = 100
MAX_COPIED = 100_000_000
"""How many characters builders may copy in all, where a value counts as 100. A pickle can refer to one long list once
per opcode.
"""


class PickleBytes:
    """A pickle's bytes within a stream, for `genops`. Every read is bounded before it happens."""

    def __init__(self, stream: BinaryIO, end: int) -> None:
        self._stream = stream
        self._start = stream.tell()
        self.end = end

    def tell(self) -> int:
        return self._stream.tell()

    def read(self, count: int) -> bytes:
        self._check(count)
        return self._stream.read(count)

    def readline(self) -> bytes:
        line = self._stream.readline(min(MAX_LINE_BYTES, self.end - self.tell()))
        if len(line) == MAX_LINE_BYTES:
            raise MalformedPickle(f"a line of more than {MAX_LINE_BYTES:,} bytes")
        self._check(0)
        return line

    def _check(self, count: int) -> None:
        if not 0 <= count <= self.end - self.tell():
            raise MalformedPickle(f"truncated: {count:,} bytes wanted, {self.end - self.tell():,} are left")
        if self.tell() + count - self._start > MAX_PICKLE_BYTES:
            raise MalformedPickle(f"longer than the limit of {MAX_PICKLE_BYTES:,} bytes")


def read_pickle(source: PickleBytes, where: str, storages: dict[str, StorageReference] | None = None) -> Any:
    """The value that a pickle describes: plain Python values and `TensorReference`s, and `Baggage` and `Name`s where
    the pickle holds those.

    `where` names the file in messages. The source is left just after the pickle's STOP. `storages` collects every
    storage that is referred to, by its key.

    Raises:
        InputFileError: the pickle is malformed or passes a limit.
        UnsafeError: the pickle names something outside the table, or asks for code.
    """
    try:
        return _Interpreter(where, {} if storages is None else storages).run(source)
    except (ValueError, IndexError, OverflowError, DeprecationWarning) as error:
        # genops and the stack raise these for bytes that are no pickle. A bad escape in a text gives a warning, which
        # may be an error.
        message = str(error) if not isinstance(error, IndexError) else "it takes more from its stack than is there"
        raise InputFileError(
            f"{where}: malformed pickle: {printable(message[:200])}", "Download the file again."
        ) from error


class _Interpreter:
    """The pickle machine: a stack, the stacks below its marks, and a memo."""

    def __init__(self, where: str, storages: dict[str, StorageReference]) -> None:
        self.where = where
        self.storages = storages
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0
        self.frame_end = 0

    def run(self, source: PickleBytes) -> Any:
        for count, (opcode, argument, position) in enumerate(genops(source)):  # type: ignore[arg-type]
            if count >= MAX_OPCODES:
                raise MalformedPickle(f"more opcodes than the limit of {MAX_OPCODES:,}")
            name = opcode.name
            self.check_frame(name, argument, position or 0, source)
            if name in _PUSHED:
                self.stack.append(argument)
            elif name == "STOP":
                if self.below or len(self.stack) != 1:
                    raise MalformedPickle(
                        f"STOP at byte {position} with {len(self.stack)} values on the stack, expected 1"
                    )
                return self.stack.pop()
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name in _ACTIONS:
                _ACTIONS[name](self, argument)
            else:
                raise self._unsafe(
                    f"the opcode {name} at byte {position}, which stands for code or objects outside the file"
                )
        raise MalformedPickle("it does not end")

    def check_frame(self, name: str, argument: Any, position: int, source: PickleBytes) -> None:
        """Frames must hold whole opcodes and follow each other, and the last must end with the pickle. Readers disagree
        about any other frames.
        """
        end = source.tell()
        if position < self.frame_end < end:
            raise MalformedPickle(f"{name} at byte {position} goes on behind the end of its frame")
        if name == "FRAME":
            if position < self.frame_end:
                raise MalformedPickle(f"a frame at byte {position}, within another")
            if argument > source.end - end:
                raise MalformedPickle(f"a frame of {argument:,} bytes, {source.end - end:,} are left")
            self.frame_end = end + argument
        if name == "STOP" and end < self.frame_end:
            raise MalformedPickle(
                f"STOP at byte {position}, {self.frame_end - end:,} bytes before the end of its frame"
            )

    def _unsafe(self, what: str) -> UnsafeError:
        return UnsafeError(
            f"{self.where}: holds {what}; nothing of it was run",
            "Do not load this file with other programs; get the weights as .safetensors, or from a source you trust.",
        )

    def mark(self, _: object) -> None:
        if len(self.below) >= MAX_DEPTH:
            raise MalformedPickle(f"nested deeper than the limit of {MAX_DEPTH}")
        self.below.append(self.stack)
        self.stack = []

    def to_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.below.pop()
        return items

    def pop(self, _: object) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.to_mark()

    def put(self, index: int | None) -> None:
        key = len(self.memo) if index is None else index
        if len(self.memo) >= MAX_MEMO:
            raise MalformedPickle(f"more memo entries than the limit of {MAX_MEMO:,}")
        self.memo[key] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise MalformedPickle(f"memo entry {index} was never stored")
        self.stack.append(self.memo[index])

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Baggage):
            raise MalformedPickle(f"items appended to {kind(target)}, expected a list")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(pairs(items))
        elif not isinstance(target, Baggage):
            raise MalformedPickle(f"items set in {kind(target)}, expected a dictionary")

    def name(self, text: Any) -> None:
        if not isinstance(text, str) or text not in NAMES:
            found = printable(text[:200].replace(" ", ".", 1)) if isinstance(text, str) else kind(text)
            raise self._unsafe(f"the name {found}, which is not tensor data and could be code")
        self.stack.append(Name(text))

    def stack_name(self, _: object) -> None:
        attribute, module = self.stack.pop(), self.stack.pop()
        both = isinstance(module, str) and isinstance(attribute, str)
        self.name(f"{module} {attribute}" if both else None)

    def construct(self, target: Any, arguments: Any) -> None:
        """Stand in for a call of `target`. Only a name of the table can be built, by its own inert builder."""
        if not isinstance(target, Name):
            raise self._unsafe(f"a call of {kind(target)}, expected a name")
        if not isinstance(arguments, tuple):
            raise MalformedPickle(f"{target.text} is given {kind(arguments)}, expected a tuple")
        builder = NAMES[target.text]
        if builder is None:
            raise self._unsafe(f"a call of {target.text.replace(' ', '.')}, expected a mere reference to it")
        self.count_copies(*arguments)
        self.stack.append(builder(target.text, arguments))

    def count_copies(self, *values: Any) -> None:
        self.copied += sum(
            len(value) * (1 if isinstance(value, str | bytes) else 100)
            for value in values
            if isinstance(value, str | bytes | list | tuple | dict)
        )
        if self.copied > MAX_COPIED:
            raise MalformedPickle(f"it repeats itself beyond the limit of {MAX_COPIED // 100:,} values")

    def reduce(self, _: object) -> None:
        arguments, target = self.stack.pop(), self.stack.pop()
        self.construct(target, arguments)

    def new_with_keywords(self, _: object) -> None:
        keywords, arguments, target = self.stack.pop(), self.stack.pop(), self.stack.pop()
        if keywords != {}:
            raise self._unsafe("a call with keywords")
        self.construct(target, arguments)

    def instance(self, text: str) -> None:
        arguments = tuple(self.to_mark())
        self.name(text)
        self.construct(self.stack.pop(), arguments)

    def obj(self, _: object) -> None:
        target, *arguments = self.to_mark()
        self.construct(target, tuple(arguments))

    def build(self, _: object) -> None:
        """Set attributes on a built value. State dicts carry `_metadata` there. The attributes of a ParameterDict are
        its parameters.
        """
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Parameters):
            if isinstance(state, dict) and isinstance(state.get("_parameters"), dict):
                self.count_copies(state["_parameters"])
                target.update(state["_parameters"])
        elif isinstance(target, NumpyType):
            if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
                raise MalformedPickle("big-endian numbers")
        elif not isinstance(target, dict | Baggage):
            raise self._unsafe(f"a state given to {kind(target)}, which takes none")

    def persistent(self, _: object) -> None:
        """Resolve a storage, the only kind of value that torch keeps outside the pickle: ("storage", type, key, device,
        items[, view]).
        """
        key = self.stack.pop()
        if not isinstance(key, tuple) or not key or key[0] != "storage":
            what = (
                printable(repr(key[0][:80]))
                if isinstance(key, tuple) and key and isinstance(key[0], str)
                else kind(key)
            )
            raise self._unsafe(f"a reference to {what} outside the pickle, expected a storage")
        if (
            len(key) not in (5, 6)
            or not isinstance(key[1], Name)
            or not isinstance(key[2], str)
            or len(key[2]) > MAX_KEY_LENGTH
            or not is_count(key[4])
        ):
            raise MalformedPickle("a storage without its type, key and size")
        dtype = STORAGE_TYPES.get(key[1].text.rpartition(" ")[2])
        if dtype is None:
            raise MalformedPickle(f"a storage of type {key[1].text}")
        view = key[5] if len(key) == 6 else None
        first = 0
        if view is not None:
            if (
                not isinstance(view, tuple)
                or len(view) != 3
                or not is_count(view[1])
                or not is_count(view[2])
                or view[1] + view[2] > key[4]
            ):
                raise MalformedPickle("a view of a storage that does not lie within it")
            first = view[1]
        storage = self.storages.setdefault(key[2], StorageReference(key[2], dtype, key[4]))
        if (storage.dtype, storage.items) != (dtype, key[4]):
            raise MalformedPickle(f"two sizes or types for one storage, {key[2]!r}")
        self.stack.append(StorageReference(key[2], dtype, key[4], first))


_PUSHED = {
    "INT",
    "LONG",
    "LONG1",
    "LONG4",
    "BININT",
    "BININT1",
    "BININT2",
    "FLOAT",
    "BINFLOAT",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": lambda: Baggage("set"),
}


def _last(machine: _Interpreter, count: int) -> tuple[Any, ...]:
    if len(machine.stack) < count:
        raise IndexError
    items = tuple(machine.stack[-count:])
    del machine.stack[-count:]
    return items


def _push(machine: _Interpreter, value: object) -> None:
    machine.stack.append(value)


def _discard_to_mark(machine: _Interpreter, _: object) -> None:
    machine.to_mark()


def _frozen_set(machine: _Interpreter, _: object) -> None:
    machine.to_mark()
    machine.stack.append(Baggage("frozenset"))


def _protocol(machine: _Interpreter, version: int) -> None:
    if version > 5:
        raise MalformedPickle(f"pickle protocol {version}, expected at most 5")


_ACTIONS: dict[str, Callable[[_Interpreter, Any], None]] = {
    "PROTO": _protocol,
    "FRAME": lambda machine, _: None,
    "MARK": _Interpreter.mark,
    "POP": _Interpreter.pop,
    "POP_MARK": _discard_to_mark,
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "BYTEARRAY8": lambda machine, argument: machine.stack.append(bytes(argument)),
    "LIST": lambda machine, _: _push(machine, machine.to_mark()),
    "TUPLE": lambda machine, _: _push(machine, tuple(machine.to_mark())),
    "DICT": lambda machine, _: _push(machine, pairs(machine.to_mark())),
    "FROZENSET": _frozen_set,
    "TUPLE1": lambda machine, _: machine.stack.append(_last(machine, 1)),
    "TUPLE2": lambda machine, _: machine.stack.append(_last(machine, 2)),
    "TUPLE3": lambda machine, _: machine.stack.append(_last(machine, 3)),
    "APPEND": lambda machine, _: machine.append(list(_last(machine, 1))),
    "APPENDS": lambda machine, _: machine.append(machine.to_mark()),
    "ADDITEMS": lambda machine, _: machine.append(machine.to_mark()),
    "SETITEM": lambda machine, _: machine.set_items(list(_last(machine, 2))),
    "SETITEMS": lambda machine, _: machine.set_items(machine.to_mark()),
    "PUT": _Interpreter.put,
    "BINPUT": _Interpreter.put,
    "LONG_BINPUT": _Interpreter.put,
    "MEMOIZE": _Interpreter.put,
    "GET": _Interpreter.get,
    "BINGET": _Interpreter.get,
    "LONG_BINGET": _Interpreter.get,
    "GLOBAL": _Interpreter.name,
    "STACK_GLOBAL": _Interpreter.stack_name,
    "REDUCE": _Interpreter.reduce,
    "NEWOBJ": _Interpreter.reduce,
    "NEWOBJ_EX": _Interpreter.new_with_keywords,
    "INST": _Interpreter.instance,
    "OBJ": _Interpreter.obj,
    "BUILD": _Interpreter.build,
    "BINPERSID": _Interpreter.persistent,
}
