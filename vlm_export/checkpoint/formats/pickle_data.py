"""A pickle as data: an interpreter of the opcodes that torch writes, which calls and imports nothing.

A global becomes its name, an object the record of its class's name and state, a call the record of its arguments: time
and memory stay within a constant times the number of opcodes.
Source of the opcode set: torch/csrc/jit/serialization/pickler.cpp (torch 2.10), and protocol 2, which torch.save uses;
the opcodes' meaning: pickletools.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, NoReturn

from vlm_export.errors import InputError

MAX_PICKLE_BYTES = 16 << 20
# A tensor takes some 35 opcodes, and up to 100 more with an optimizer's state; CLIP's largest has 1353 tensors.
MAX_OPCODES = 1_000_000
# Integers are their own hashes up to 2**61; beyond, as many as one likes have one and the same hash.
_MAX_KEY = 1 << 60


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class Call:
    """What the pickle would have called, and with what."""

    function: Global
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class PersistentId:
    """A reference to something outside the pickle: torch's storages."""

    value: Any


@dataclass(eq=False, slots=True)
class Instance:
    """An object of a class of the archive, with the state that would have been given to it."""

    cls: Global
    state: Any = field(default=None, repr=False)


class _Mark:
    """The place on the stack where a tuple, list or dict begins."""


_MARK = _Mark()
GlobalPolicy = Callable[[Global], bool]
Persistent = Callable[[Any], Any]


def load_pickle_data(
    raw: bytes | BytesIO, where: str, allow: GlobalPolicy, persistent: Persistent = PersistentId
) -> Any:
    """The data that the pickle describes: str, int, float, bool, None, tuple, list, dict and this module's records.

    Args:
        raw: the pickle, of at most `MAX_PICKLE_BYTES`; a stream stands behind the pickle afterwards.
        where: the file and member, for errors.
        allow: whether a global may stand in the pickle at all; none is ever imported.
        persistent: makes the record of a persistent id.

    Raises:
        InputError: a global that is not allowed, an opcode that torch does not write, or a pickle that is damaged or
            has more than `MAX_OPCODES`.
    """
    return _Interpreter(where, allow, persistent).run(raw)


class _Interpreter:
    def __init__(self, where: str, allow: GlobalPolicy, persistent: Persistent) -> None:
        self.where, self.allow, self.persistent = where, allow, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, raw: bytes | BytesIO) -> Any:
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
                if count >= MAX_OPCODES:
                    self._fail(f"at most {MAX_OPCODES} opcodes", "more")
                if opcode.name == "STOP":
                    return self.stack.pop()
                self._step(opcode.name, argument)
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            self._fail("a complete pickle", f"{type(error).__name__}: {error}")
        self._fail("a complete pickle", "no STOP opcode")

    def _fail(self, expected: str, got: str) -> NoReturn:
        raise InputError(
            "a pickle in the checkpoint is damaged or not one that torch writes",
            where=self.where,
            expected=expected,
            got=got[:300],
            fix="get the checkpoint from its publisher, or convert it to safetensors where you trust it",
        )

    def _step(self, name: str, argument: Any) -> None:
        if name in _PUSH_ARGUMENT:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in _HANDLERS:
            _HANDLERS[name](self, argument)
        elif name != "PROTO":
            self._fail("the opcodes that torch writes", f"opcode {name}")

    def _pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        items.reverse()
        return items

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def _short_tuple(self, size: int) -> None:
        items = [self.stack.pop() for _ in range(size)]
        self.stack.append(tuple(reversed(items)))

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        found = Global(module, name)
        if not self.allow(found):
            raise InputError(
                "the checkpoint's pickle names code that is not weights; nothing of it was run",
                where=self.where,
                expected="tensors, plain data and the archive's own classes",
                got=f"global {str(found)[:200]}",
                fix="do not load this file with other tools either, unless you trust whoever made it",
            )
        self.stack.append(found)

    def _new(self, _: Any) -> None:
        self.stack.pop()
        self.stack.append(Instance(self._as_global(self.stack.pop())))

    def _reduce(self, _: Any) -> None:
        arguments = self.stack.pop()
        function = self._as_global(self.stack.pop())
        if not isinstance(arguments, tuple):
            self._fail("a tuple of arguments", type(arguments).__name__)
        # torch writes an empty OrderedDict into every tensor (its backward hooks); it is plain data.
        is_dict = function == Global("collections", "OrderedDict") and not arguments
        self.stack.append({} if is_dict else Call(function, arguments))

    def _as_global(self, value: Any) -> Global:
        # Before torch 1.6 a module's class stood beside its source code: ("module", class, file, source).
        if isinstance(value, PersistentId) and isinstance(value.value, tuple) and value.value[:1] == ("module",):
            value = value.value[1] if len(value.value) > 1 else None
        if not isinstance(value, Global):
            self._fail("a global", type(value).__name__)
        return value

    def _build(self, _: Any) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        # A state dict's attribute `_metadata`, which says nothing of weights, is given to a dict; what a call would
        # have made is never made, and neither is its state kept.
        if isinstance(target, Instance):
            target.state = state
        elif not isinstance(target, dict | Call):
            self._fail("an object of the archive's own classes", type(target).__name__)

    def _persistent(self, _: Any) -> None:
        self.stack.append(self.persistent(self.stack.pop()))

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Call | Instance) and len(items) % 2 == 0:
            return  # items of a mapping that is never made
        if not isinstance(target, dict) or len(items) % 2:
            self._fail("a dict and pairs", type(target).__name__)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Only these: hashing a nested tuple could take time exponential in the pickle's size.
            if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < _MAX_KEY):
                self._fail("text or integers as keys", type(key).__name__)
            target[key] = value

    def _append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Call | Instance):
            return  # items of a sequence that is never made
        if not isinstance(target, list):
            self._fail("a list", type(target).__name__)
        target.extend(items)

    def _one_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])


_PUSH_ARGUMENT = frozenset(
    {"BINUNICODE", "SHORT_BINSTRING", "BINSTRING", "BINFLOAT", "BININT", "BININT1", "BININT2", "LONG1", "LONG4"}
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "MARK": lambda: _MARK,
}
_HANDLERS: dict[str, Callable[[_Interpreter, Any], None]] = {
    "TUPLE": _Interpreter._tuple,
    "TUPLE1": lambda self, _: self._short_tuple(1),
    "TUPLE2": lambda self, _: self._short_tuple(2),
    "TUPLE3": lambda self, _: self._short_tuple(3),
    "GLOBAL": _Interpreter._global,
    "NEWOBJ": _Interpreter._new,
    "REDUCE": _Interpreter._reduce,
    "BUILD": _Interpreter._build,
    "BINPERSID": _Interpreter._persistent,
    "SETITEM": _Interpreter._one_item,
    "SETITEMS": lambda self, _: self._set_items(self._pop_to_mark()),
    "APPEND": lambda self, _: self._append([self.stack.pop()]),
    "APPENDS": lambda self, _: self._append(self._pop_to_mark()),
}
