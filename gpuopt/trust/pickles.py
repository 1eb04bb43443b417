"""Pickle opcodes -> the globals a file names and what it does with them, and which of those may load. Nothing is unpickled here.

torch's own `weights_only` unpickler decides by name alone: once a module class is admitted, a file may also *call* it with arguments of the file's
choosing, or smuggle it through `_rebuild_from_type_v2(func, …)`, which calls whatever it is given. So the opcodes are followed first, with names in
place of objects, and every use must be one that a file written by torch.save has: a module or configuration is made empty and filled from a
dictionary, an enum is looked up by its value, an activation function is a value and never called.
"""

from __future__ import annotations

import enum
import importlib
import importlib.metadata
import importlib.util
import io
import pickletools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch import nn

LIBRARIES: Final = ("torch", "torchvision", "timm", "transformers")
"""Whose classes may be made from a file, where installed."""

_MODULE_PREFIXES: Final = (
    "torch.nn.modules.",
    "torchvision.models.",
    "torchvision.ops.",
    "timm.models.",
    "timm.layers.",
    "transformers.models.",
    "transformers.activations",
    "transformers.pytorch_utils",
    "transformers.modeling_layers",
    "transformers.loss.",
    "transformers.integrations.moe",
)
_CONFIG_PREFIXES: Final = ("transformers.models.", "transformers.configuration_utils", "transformers.generation.configuration_utils")
_ENUM_PREFIXES: Final = ("torchvision.", "timm.", "transformers.")
_DATA_PARALLEL: Final = ("torch.nn.parallel.data_parallel", "DataParallel")

ACTIVATIONS: Final = frozenset(
    {
        ("torch._C._nn", name)
        for name in (
            "gelu",
            "silu",
            "mish",
            "elu",
            "hardtanh",
            "hardswish",
            "hardsigmoid",
            "leaky_relu",
            "log_sigmoid",
            "softplus",
            "relu6",
        )
    }
    | {
        ("torch.nn.functional", name)
        for name in (
            "celu elu gelu glu hardsigmoid hardswish hardtanh leaky_relu log_softmax logsigmoid mish relu relu6 rrelu selu sigmoid silu softmax softplus softsign tanh tanhshrink"
        ).split()
    }
)
"""Functions of tensors to tensors, without a way to reach anything else."""

_CALLABLE_BESIDE_MODULES: Final = frozenset(
    {
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_qtensor",
        "torch._utils._rebuild_sparse_tensor",
        "torch.serialization._get_layout",
        "torch.Size",
        "torch.device",
        "collections.OrderedDict",
        "collections.Counter",
        "builtins.set",
        "builtins.complex",
        "builtins.bytearray",
        "_codecs.encode",
    }
)
"""What a file that also names modules may call. Left out on purpose: `_rebuild_from_type_v2` and `_rebuild_wrapper_subclass` call or build what the file names."""

_REBUILD_FROM_TYPE: Final = "torch._tensor._rebuild_from_type_v2"
"""Written for any tensor that carries attributes (transformers marks its buffers); admitted for plain tensors alone."""
_PLAIN_TENSORS: Final = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter"})

_WORD = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
_OPCODES: Final = frozenset(
    (
        "GLOBAL NEWOBJ REDUCE BUILD APPEND APPENDS SETITEM SETITEMS MARK TUPLE TUPLE1 TUPLE2 TUPLE3 NONE NEWFALSE NEWTRUE EMPTY_TUPLE EMPTY_LIST "
        "EMPTY_DICT EMPTY_SET BINPERSID BININT BININT1 BININT2 BINFLOAT BINGET LONG_BINGET BINPUT LONG_BINPUT BINUNICODE SHORT_BINSTRING LONG1 PROTO STOP"
    ).split()
)
"""All that torch's restricted unpickler understands, and all that torch.save writes."""

MAX_OPCODES: Final = 50_000_000


class Use(enum.StrEnum):
    """What a file does with a global."""

    MAKE = "made"
    MAKE_WITH = "made with arguments"
    LOOK_UP = "looked up by one value"
    CALL = "called"
    REBUILD = "called to rebuild a plain tensor"
    VALUE = "kept as a value"
    FILL_ODDLY = "filled from something other than a dictionary"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What one pickle stream names and does."""

    uses: frozenset[tuple[str, Use]]
    """`module.name` and its use."""
    problems: tuple[str, ...] = ()
    """What no file of torch.save contains, in words."""
    names: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a scanned file may load, and with what."""

    admitted: tuple[tuple[Any, str], ...] = ()
    """(object, the name the file uses) for torch.serialization.safe_globals; empty for a file of tensors."""
    refused: tuple[str, ...] = ()
    """One line for each reason; empty means it may load."""
    names: tuple[str, ...] = ()
    """Every global beyond torch's own, sorted."""


@dataclass(slots=True)
class _Global:
    name: str


@dataclass(slots=True)
class _Made:
    """The result of a call or of NEWOBJ."""

    of: str


@dataclass(slots=True)
class _Tuple:
    items: list[Any]


class _Mark(enum.Enum):
    MARK = 0
    PLAIN = 1
    LIST = 2
    DICT = 3


@dataclass(slots=True)
class _Machine:
    uses: set[tuple[str, Use]] = field(default_factory=set)
    problems: dict[str, None] = field(default_factory=dict)
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def value(self, *items: Any) -> None:
        for item in items:
            if isinstance(item, _Global):
                self.uses.add((item.name, Use.VALUE))

    def pop_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not _Mark.MARK:
            items.append(item)
        items.reverse()
        return items

    def step(self, op: str, arg: Any) -> None:
        stack = self.stack
        if op == "GLOBAL":
            stack.append(_Global(_qualified(str(arg), self.problems)))
        elif op in ("NEWOBJ", "REDUCE"):
            arguments, called = stack.pop(), stack.pop()
            self.value(arguments)
            if not isinstance(called, _Global) or not isinstance(arguments, _Tuple):
                self.problems["calls something that it computed"] = None
                stack.append(_Mark.PLAIN)
                return
            count = len(arguments.items)
            if op == "NEWOBJ":
                use = Use.MAKE if count == 0 else Use.MAKE_WITH
            elif called.name == _REBUILD_FROM_TYPE and _rebuilds_plain_tensor(arguments):
                use = Use.REBUILD
            else:
                use = Use.LOOK_UP if count == 1 and not isinstance(arguments.items[0], (_Global, _Made)) else Use.CALL
            self.uses.add((called.name, use))
            stack.append(_Made(called.name))
        elif op == "BUILD":
            state = stack.pop()
            self.value(state)
            target = stack[-1]
            if isinstance(target, _Global):
                self.uses.add((target.name, Use.FILL_ODDLY))
            elif isinstance(target, _Made) and state is not _Mark.DICT:
                self.uses.add((target.of, Use.FILL_ODDLY))
        elif op == "APPEND":
            self.value(stack.pop())
        elif op == "SETITEM":
            self.value(stack.pop(), stack.pop())
        elif op in ("APPENDS", "SETITEMS"):
            self.value(*self.pop_mark())
        elif op == "MARK":
            stack.append(_Mark.MARK)
        elif op == "TUPLE":
            items = self.pop_mark()
            self.value(*items)
            stack.append(_Tuple(items))
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(op[-1])
            items = stack[-count:]
            if len(items) < count:
                raise IndexError("stack underflow")
            del stack[-count:]
            self.value(*items)
            stack.append(_Tuple(items))
        elif op == "EMPTY_TUPLE":
            stack.append(_Tuple([]))
        elif op == "EMPTY_DICT":
            stack.append(_Mark.DICT)
        elif op == "EMPTY_LIST":
            stack.append(_Mark.LIST)
        elif op == "BINPERSID":
            stack.pop()
            stack.append(_Mark.PLAIN)
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[int(arg)])
        elif op in ("BINPUT", "LONG_BINPUT"):
            self.memo[int(arg)] = stack[-1]
        elif op not in ("PROTO", "STOP"):
            stack.append(_Mark.PLAIN)


def _rebuilds_plain_tensor(arguments: _Tuple) -> bool:
    function, kind = (arguments.items + [None, None])[:2]
    return (
        isinstance(function, _Global)
        and function.name in _CALLABLE_BESIDE_MODULES
        and function.name.startswith("torch._utils.")
        and isinstance(kind, _Global)
        and kind.name in _PLAIN_TENSORS
    )


def scan(data: bytes | IO[bytes], *, streams: int = 1) -> Scan:
    """Follow `streams` pickles that lie one behind the other. Never raises on garbage: it becomes a problem."""
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    start = file.tell()
    machine = _Machine()
    for _ in range(streams):
        machine.stack, machine.memo = [], {}
        try:
            for index, (op, arg, _position) in enumerate(pickletools.genops(file)):
                if index > MAX_OPCODES:
                    machine.problems[f"holds more than {MAX_OPCODES} opcodes"] = None
                    break
                if op.name not in _OPCODES:
                    machine.problems[f"uses the opcode {op.name}, which torch.save never writes"] = None
                    break
                machine.step(op.name, arg)
            else:
                machine.value(*machine.stack)
        except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError, EOFError) as error:
            machine.problems[f"is not a whole pickle ({type(error).__name__}: {str(error)[:80]})"] = None
        if machine.problems:
            break
    names = {name for name, _ in machine.uses}
    if machine.problems:
        file.seek(start)
        names |= _named(file)
    return Scan(uses=frozenset(machine.uses), problems=tuple(machine.problems), names=frozenset(names))


def judge(found: Scan) -> Verdict:
    """Which globals of a scan may load here, and why the others may not."""
    own = _torch_own()
    names = tuple(sorted(name for name in found.names if name not in own))
    if found.problems:
        return Verdict(refused=(*found.problems, *(f"names {name}" for name in names)), names=names)
    if not names:
        return Verdict()  # tensors and plain containers: torch's restricted unpickler is the judge
    admitted: dict[str, Any] = {}
    refused: dict[str, None] = {}
    for name, use in sorted(found.uses):
        if name in own:
            if use in (Use.CALL, Use.LOOK_UP) and name not in _CALLABLE_BESIDE_MODULES:
                refused[f"{name} is {use} beside modules"] = None
            continue
        admission = admit(name)
        if admission.thing is None:
            refused[f"{name} {admission.reason}"] = None
        elif use not in admission.uses:
            refused[f"{name} is {use}, which no saved module does"] = None
        else:
            admitted[name] = admission.thing
    return Verdict(admitted=tuple((thing, name) for name, thing in admitted.items()), refused=tuple(refused), names=names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """One global: what it is and the uses it may be put to, or why it may not be named."""

    thing: Any = None
    uses: frozenset[Use] = frozenset()
    reason: str = ""


@cache
def admit(full_name: str) -> Admission:
    """Decide one global by name, importing only a well-known library that is installed.

    >>> admit("torch.nn.modules.linear.Linear").uses
    frozenset({<Use.MAKE: 'made'>})
    >>> admit("os.system").reason
    'is code of its own'
    """
    module_name, _, name = full_name.rpartition(".")
    library = module_name.partition(".")[0]
    if library == "__main__":
        return Admission(reason="is defined in the script that saved the file")
    if (module_name, name) in ACTIVATIONS:
        function = getattr(importlib.import_module(module_name), name, None)
        return Admission(thing=function, uses=frozenset({Use.VALUE}), reason="" if function else "is not in this torch")
    if library not in LIBRARIES or not module_name.startswith((*_MODULE_PREFIXES, *_CONFIG_PREFIXES, *_ENUM_PREFIXES, _DATA_PARALLEL[0])):
        return Admission(reason="is code of its own")
    if not _is_installed(library):
        return Admission(reason=f"belongs to {library}, which is not installed")
    try:
        thing = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        return Admission(reason=f"is not in the {library} installed here ({type(error).__name__})")
    if not isinstance(thing, type):
        return Admission(reason="is neither a module, a configuration, an enum nor an activation")
    home = thing.__module__
    if issubclass(thing, nn.Module):
        if not home.startswith(_MODULE_PREFIXES) and (home, name) != _DATA_PARALLEL:
            return Admission(reason=f"is a module of {home}")
        if issubclass(thing, torch.jit.ScriptModule) or thing.__new__ is not object.__new__ or not _plain_setstate(thing):
            return Admission(reason="is a module that runs code of its own when it is restored")
        return Admission(thing=thing, uses=frozenset({Use.MAKE}))
    if issubclass(thing, enum.Enum):
        if not home.startswith(_ENUM_PREFIXES) or not len(thing):
            return Admission(reason="is an enum without members, or another library's")
        return Admission(thing=thing, uses=frozenset({Use.LOOK_UP}))
    if library == "transformers" and home.startswith(_CONFIG_PREFIXES) and _is_configuration(thing):
        if thing.__new__ is not object.__new__ or hasattr(thing, "__setstate__"):
            return Admission(reason="is a configuration that runs code of its own when it is restored")
        return Admission(thing=thing, uses=frozenset({Use.MAKE}))
    return Admission(reason="is neither a module, a configuration, an enum nor an activation")


def _plain_setstate(cls: type) -> bool:
    """Whether restoring runs only torch.nn's own `__setstate__`, which updates `__dict__`."""
    owner = next((base for base in cls.__mro__ if "__setstate__" in base.__dict__), None)
    return owner is None or owner.__module__.startswith("torch.nn.modules.")


def _is_configuration(cls: type) -> bool:
    from transformers import GenerationConfig, PretrainedConfig

    return issubclass(cls, (PretrainedConfig, GenerationConfig))


@cache
def _is_installed(library: str) -> bool:
    """Installed as a distribution, from where that distribution lies: a folder of the same name beside a model is not the library."""
    if library == "torch":
        return True
    loaded = sys.modules.get(library)
    spec = loaded.__spec__ if loaded is not None else importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        return False
    try:
        distribution = importlib.metadata.distribution(library)
    except importlib.metadata.PackageNotFoundError:
        return False
    return Path(str(distribution.locate_file(f"{library}/__init__.py"))).resolve() == Path(spec.origin).resolve()


@cache
def _torch_own() -> frozenset[str]:
    """What torch's restricted unpickler admits by itself. Its table is private; without it nothing but tensors of the common kind would be recognised."""
    from torch._weights_only_unpickler import _get_allowed_globals

    return frozenset(_get_allowed_globals())


def _qualified(arg: str, problems: dict[str, None]) -> str:
    """genops joins module and name by a blank; torch then joins them by a dot. Names with blanks or dots would make two spellings of one global."""
    module, _, name = arg.partition(" ")
    if not _WORD.fullmatch(module) or not _WORD.fullmatch(name) or "." in name:
        problems[f"names {arg[:80]!r}"] = None
        return arg
    mapped_module, mapped_name = _renamed(module, name)
    return f"{mapped_module}.{mapped_name}"


def _renamed(module: str, name: str) -> tuple[str, str]:
    """Python 2 names, renamed by the tables of torch's unpickler; what it does not rename stays, and is then no admitted name."""
    from torch import _utils

    names: dict[tuple[str, str], tuple[str, str]] = getattr(_utils, "NAME_MAPPING", {})
    modules: dict[str, str] = getattr(_utils, "IMPORT_MAPPING", {})
    if (module, name) in names:
        return names[(module, name)]
    return modules.get(module, module), name


def _named(file: IO[bytes]) -> set[str]:
    """Globals of any pickle, for the message alone: STACK_GLOBAL is read as the last two strings."""
    names: set[str] = set()
    strings: list[str] = []
    for op, arg in _opcodes(file):
        if op in ("GLOBAL", "INST"):
            names.add(str(arg).replace(" ", ".", 1))
        elif op == "STACK_GLOBAL" and len(strings) >= 2:
            names.add(f"{strings[-2]}.{strings[-1]}")
        elif op.startswith("EXT"):
            names.add(f"copyreg extension {arg}")
        elif isinstance(arg, str) and "UNICODE" in op:
            strings = [*strings[-1:], arg[:200]]
    return names


def _opcodes(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    try:
        for index, (op, arg, _) in enumerate(pickletools.genops(file)):
            if index > MAX_OPCODES:
                return
            yield op.name, arg
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError):
        return
