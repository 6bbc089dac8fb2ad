"""Read a program that XLA compiled for a GPU: its launches, their memory traffic and products.

A launch is an instruction that runs on the device: a fusion, a library call or a copy. Its traffic
is the size of its inputs and outputs, as if nothing stayed in a cache between launches; an input
that a fusion has under two names counts once. A loop
counts as often as it runs, or once if that depends on the data; of a conditional the branch with
the most traffic counts.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

_ARRAY = re.compile(r"(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = ")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
# XLA writes lhs_batch_dims={0,1} for its own products, "lhs_batch_dimensions":["0","1"] for cuBLAS.
_DIMENSIONS = re.compile(r'(lhs|rhs)_(batch|contracting)_dim(?:ension)?s"?[=:][{\[]([\d,"]*)')
_PRECISION = re.compile(r'operand_precision"?[=:][{\["]+(\w+)')
# These only name memory, or wait for what another instruction started.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_FREE |= {"partition-id", "replica-id", "opt-barrier"}


@dataclass(frozen=True)
class Array:
    """Dtype and dimensions of an array."""

    dtype: str
    bits: int  # of an element
    dimensions: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dimensions)

    @property
    def n_bytes(self) -> int:
        return -(-self.bits * self.size // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dimensions))}]"


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    outputs: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    number: int | None = None  # of a parameter

    @property
    def n_bytes(self) -> int:
        return sum(array.n_bytes for array in self.outputs)

    def called(self, *keys: str) -> list[str]:
        """Return the computations named by some attributes, such as calls=%fusion."""
        names = []
        for key in keys:
            value = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
            if value:
                names += re.findall(r"%([\w.\-]+)", value[1])
        return names


Computation = dict[str, Instruction]  # by name, in the order of execution


@dataclass(frozen=True)
class Product:
    """A matrix product, or a batch of them: [m, k] times [k, n]."""

    library: str  # Triton, cuBLAS, cuDNN or loop: code without tensor cores
    arithmetic: str  # bf16, f16, tf32, f32, ...
    batch: int
    m: int
    n: int
    k: int

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.n * self.k

    def __str__(self) -> str:
        return f"{self.arithmetic} {self.batch} x [{self.m}, {self.k}] [{self.k}, {self.n}]"


@dataclass(frozen=True)
class Launch:
    """An instruction that runs on the device."""

    name: str
    kind: str  # opcode, emitter of a fusion or target of a library call
    times: int
    is_repeated: bool  # part of a loop whose length depends on the data
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    read: int  # bytes, each time
    written: int
    products: tuple[Product, ...]

    @property
    def traffic(self) -> int:
        """Bytes read and written, all times."""
        return self.times * (self.read + self.written)


class Runs(NamedTuple):
    """How often a computation runs."""

    times: int
    is_repeated: bool  # as often again, in a loop whose length depends on the data


def launches(text: str) -> list[Launch]:
    """Return the launches of a compiled module, from `compiled.as_text()`, in order."""
    entry, computations = parse(text)
    return list(_launches(computations, entry, Runs(1, False)))


def parse(text: str) -> tuple[str, dict[str, Computation]]:
    """Return the name of the entry computation, and all computations by name."""
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation = {}
    # XLA numbers long lists in comments: /*index=5*/.
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[2]] = {}
            if header[1]:
                entry = header[2]
        elif start := _INSTRUCTION.match(line):
            current[start[1]] = _instruction(start[1], line[start.end() :])
    return entry, computations


def arrays(shape: str) -> tuple[Array, ...]:
    """Return the arrays of a shape or tuple of shapes, without tokens.

    >>> [str(array) for array in arrays("(f32[2,3]{1,0}, pred[])")]
    ['f32[2,3]', 'pred[]']
    """
    found = []
    for dtype, bits, dimensions in _ARRAY.findall(shape):
        # A truth value takes a byte.
        sizes = tuple(int(n) for n in dimensions.split(",") if n)
        found.append(Array(dtype, int(bits or 8), sizes))
    return tuple(found)


def _instruction(name: str, text: str) -> Instruction:
    """Parse `shape opcode(operands), attributes`."""
    shape_end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    opening = text.index("(", shape_end + 1)
    closing = _closing(text, opening)
    opcode = text[shape_end:opening].strip(") ")
    operands = tuple(re.findall(r"%([\w.\-]+)", text[opening:closing]))
    number = int(text[opening + 1 : closing]) if opcode == "parameter" else None
    attributes = text[closing + 1 :]
    return Instruction(name, arrays(text[:shape_end]), opcode, operands, attributes, number)


def _closing(text: str, start: int) -> int:
    """Return the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses: {text[:200]}")


def _launches(computations: dict[str, Computation], name: str, runs: Runs) -> Iterator[Launch]:
    """Yield the launches of a computation and of those that it calls."""
    computation = computations[name]
    for one in computation.values():
        if one.opcode in _FREE or one.opcode.endswith("-done"):
            continue
        if one.opcode == "while":
            trips = _TRIP_COUNT.search(one.attributes)
            if trips:
                body_runs = runs._replace(times=runs.times * int(trips[1]))
            else:
                body_runs = runs._replace(is_repeated=True)
            # The condition of a loop of known length is not computed.
            for called in one.called("body") if trips else one.called("condition", "body"):
                yield from _launches(computations, called, body_runs)
        elif one.opcode == "conditional":
            names = one.called("branch_computations", "true_computation", "false_computation")
            branches = [list(_launches(computations, branch, runs)) for branch in names]
            yield from max(branches, key=lambda branch: sum(launch.traffic for launch in branch))
        elif one.opcode in ("call", "async-start"):
            for called in one.called("to_apply", "calls"):
                yield from _launches(computations, called, runs)
        else:
            yield _launch(computations, computation, one, runs)


def _launch(
    computations: dict[str, Computation], computation: Computation, one: Instruction, runs: Runs
) -> Launch:
    inputs = tuple(array for name in one.operands for array in computation[name].outputs)
    outputs = one.outputs
    read = sum(array.n_bytes for array in inputs)
    kind = one.opcode
    products: list[Product] = []
    if one.opcode == "fusion":
        fused = computations[one.called("calls")[0]]
        kind = _fusion_kind(one)
        read, written = _fusion_traffic(computation, fused, one)
        library = "Triton" if "triton" in kind else "loop"
        dots = [dot for dot in fused.values() if dot.opcode == "dot"]
        products = [_product(library, dot, fused) for dot in dots]
    elif one.opcode == "custom-call":
        kind = _TARGET.findall(one.attributes)[0]
        # The last output of a library call is its work space.
        outputs = outputs[:1] if kind.startswith(("__cublas", "__cudnn")) else outputs
        written = sum(array.n_bytes for array in outputs)
        if kind.startswith("__cublas"):
            products = [_product("cuBLAS", one, computation)]
        elif kind.startswith("__cudnn$fmha"):
            products = _attention_products(inputs)
    else:
        # What starts a copy or a sum over cards lists its inputs among its outputs.
        written = read if one.opcode.endswith("-start") else one.n_bytes
    return Launch(one.name, kind, *runs, inputs, outputs, read, written, tuple(products))


def _fusion_kind(fusion: Instruction) -> str:
    emitter = re.search(r'"kind":"(\w+)"', fusion.attributes)
    kind = re.search(r"kind=(\w+)", fusion.attributes)
    return emitter[1].strip("_") if emitter else f"fusion {kind[1]}"


def _fusion_traffic(
    computation: Computation, fused: Computation, fusion: Instruction
) -> tuple[int, int]:
    """Return the bytes that a fusion reads and writes.

    Of an input of which only slices are used, these count; of an array that is updated in place,
    the update.
    """
    read = 0
    read_whole: dict[str, int] = {}  # by array, which may have several names
    written = fusion.n_bytes
    for parameter in fused.values():
        if parameter.opcode != "parameter":
            continue
        names = {parameter.name}
        users = []
        for one in fused.values():
            if one.opcode == "bitcast" and one.operands[0] in names:
                names.add(one.name)
            elif names & set(one.operands):
                users.append(one)
        first = [one.opcode for one in users if one.operands[0] in names]
        if len(first) == len(users) and set(first) <= {"slice", "dynamic-slice", "gather"}:
            read += min(parameter.n_bytes, sum(one.n_bytes for one in users))
        elif first == ["dynamic-update-slice"] and len(users) == 1:
            update = fused[users[0].operands[1]]
            written += update.n_bytes - parameter.n_bytes
        else:
            assert parameter.number is not None
            array = _array_of(computation, fusion.operands[parameter.number])
            read_whole[array] = parameter.n_bytes
    return read + sum(read_whole.values()), written


def _array_of(computation: Computation, name: str) -> str:
    """Return the same string for all names of an array."""
    one = computation[name]
    if one.opcode == "bitcast":
        return _array_of(computation, one.operands[0])
    if one.opcode == "get-tuple-element":
        index = re.search(r"index=(\d+)", one.attributes)
        assert index is not None
        several = computation[one.operands[0]]
        if several.opcode == "tuple":
            return _array_of(computation, several.operands[int(index[1])])
        return f"{several.name}, {index[1]}"
    return name


def _product(library: str, dot: Instruction, computation: Computation) -> Product:
    """Return the product of a dot or of a call of cuBLAS."""
    lhs, rhs = (computation[name].outputs[0] for name in dot.operands[:2])
    dimensions = {}
    for side, role, listed in _DIMENSIONS.findall(dot.attributes):
        dimensions[side, role] = [int(n) for n in re.findall(r"\d+", listed)]
    batch = math.prod(lhs.dimensions[i] for i in dimensions.get(("lhs", "batch"), ()))
    k = math.prod(lhs.dimensions[i] for i in dimensions["lhs", "contracting"])
    precision = _PRECISION.search(dot.attributes)
    is_exact = precision is not None and precision[1].lower() != "default"
    arithmetic = lhs.dtype
    # Tensor cores take float32 factors with 10 bits of mantissa only.
    if arithmetic == "f32" and not is_exact:
        arithmetic = "tf32"
    return Product(library, arithmetic, batch, lhs.size // batch // k, rhs.size // batch // k, k)


def _attention_products(inputs: tuple[Array, ...]) -> list[Product]:
    """Return the two products of cuDNN's attention on queries, keys and values."""
    queries, keys = inputs[:2]
    # JAX gives them as [sequences, tokens, heads, width].
    n_sequences, n_queries, n_heads, width = queries.dimensions
    n_keys = keys.dimensions[1]
    batch = n_sequences * n_heads
    scores = Product("cuDNN", queries.dtype, batch, n_queries, n_keys, width)
    mixed = Product("cuDNN", queries.dtype, batch, n_queries, width, n_keys)
    return [scores, mixed]
