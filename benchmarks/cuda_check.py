"""Compile all GPU programs of the package for a card that is not there: `make cuda-check`.

XLA's compiler for CUDA needs a description of the card, not the card. This finds programs that do
not compile, float64, products that miss the tensor cores, and scores of an attention that are
written to memory, and it shows from the memory traffic how fast a program can be at most. Nothing
is timed. Prints Markdown and writes it to CUDA.md, where the columns are explained; exits with 1 if
a program fails.
"""

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jax

from benchmarks import hlo
from benchmarks.cuda_programs import Program, all_programs, as_on_gpu, smallest_program
from minsae_jax.errors import brief
from minsae_jax.files import atomic_write

DOCUMENT = Path(__file__).parent / "CUDA.md"
# The command writes what follows this line of the document.
HEADING = "## Figures\n"
MAX_CARDS = 4
# Factors of a product on tensor cores are at least this wide.
TENSOR_CORE_TILE = 16
ON_TENSOR_CORES = ("bf16", "f16", "tf32")


@dataclass(frozen=True)
class Card:
    """Rates from the vendor's data sheet, dense and without sparsity."""

    name: str
    bandwidth: float  # bytes/s
    bf16: float  # FLOP/s
    tf32: float
    f32: float

    def seconds(self, launch: hlo.Launch) -> float:
        """Return the least time of a launch, all times that it runs."""
        computing = sum(map(self.seconds_of, launch.products))
        return max(launch.traffic / self.bandwidth, launch.times * computing)

    def seconds_of(self, product: hlo.Product) -> float:
        """Return the time of a product at the card's peak."""
        rates = {"bf16": self.bf16, "f16": self.bf16, "tf32": self.tf32}
        return product.flops / rates.get(product.arithmetic, self.f32)


H100 = Card("H100", 3.35e12, bf16=989e12, tf32=494e12, f32=67e12)
H200 = Card("H200", 4.8e12, bf16=989e12, tf32=494e12, f32=67e12)
COLUMNS = (
    *("program", "d_sae", "precision", "cards", "launches", "GB in", "GB out", "per round"),
    *("temporary MB", "products", "TFLOP", "compiled in s"),
    *(f"{card.name} ms" for card in (H100, H200)),
    "of peak",
)


@dataclass(frozen=True)
class Compiled:
    """A compiled program."""

    program: Program
    launches: list[hlo.Launch]
    text: str
    temporary: int  # bytes
    seconds: float  # of compilation

    def failures(self) -> list[str]:
        """Return a line for everything that is wrong with the program."""
        lines = []
        if re.search(r"\b(f64|c128)\[", self.text):
            lines.append(f"{self.program}: contains float64")
        outputs = [array for launch in self.launches for array in launch.outputs]
        large = [array for array in outputs if array.size > self.program.max_output]
        lines += [f"{self.program}: writes a large array: {array}" for array in large]
        if self.program.precision != "float32":
            slow = [product for _, product in self.products if is_off_tensor_cores(product)]
            lines += [f"{self.program}: not on tensor cores: {product}" for product in slow]
        return lines

    @property
    def products(self) -> list[tuple[int, hlo.Product]]:
        """All products, with the number of times that each is computed."""
        return [(launch.times, one) for launch in self.launches for one in launch.products]

    def row(self) -> list[str]:
        """Return the cells of the table; of a call of several steps, the mean of its steps."""
        program = self.program
        n_steps = program.n_steps
        n_launches = count(self.launches) / n_steps
        read = sum(launch.times * launch.read for launch in self.launches) / n_steps
        written = sum(launch.times * launch.written for launch in self.launches) / n_steps
        repeated = [launch for launch in self.launches if launch.is_repeated]
        launches_per_round = count(repeated) / n_steps
        traffic_per_round = sum(launch.traffic for launch in repeated) / n_steps
        libraries = Counter(product.library for _, product in self.products)
        flops = sum(times * product.flops for times, product in self.products) / n_steps
        computing = sum(times * H100.seconds_of(product) for times, product in self.products)
        bounds = [sum(map(card.seconds, self.launches)) for card in (H100, H200)]
        return [
            f"{program.name}, cuBLAS" if program.cublas else program.name,
            f"{program.d_sae:,}" if program.d_sae else "",
            program.precision,
            program.mesh,
            f"{n_launches:g}",
            f"{read / 1e9:.3f}",
            f"{written / 1e9:.3f}",
            f"{launches_per_round:g}, {traffic_per_round / 1e9:.3f}" if repeated else "",
            f"{self.temporary / 1e6:,.0f}",
            ", ".join(f"{n} {library}" for library, n in libraries.items()),
            f"{flops / 1e12:.3f}",
            f"{self.seconds:.0f}",
            *(f"{1e3 * bound / n_steps:.3f}" for bound in bounds),
            f"{computing / bounds[0]:.0%}",
        ]


def count(launches: Iterable[hlo.Launch]) -> int:
    return sum(launch.times for launch in launches)


def is_off_tensor_cores(product: hlo.Product) -> bool:
    """Return whether a product that is large enough for tensor cores does without."""
    is_large = min(product.m, product.n, product.k) >= TENSOR_CORE_TILE
    is_on = product.library != "loop" and product.arithmetic in ON_TENSOR_CORES
    return is_large and not is_on


def compile_program(program: Program) -> Compiled:
    started = time.perf_counter()
    compiled = program.compile()
    seconds = time.perf_counter() - started
    text = compiled.as_text()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return Compiled(program, hlo.launches(text), text, temporary, seconds)


def largest(launches: list[hlo.Launch], n: int) -> list[str]:
    """Return a line for each of the n launches with the most traffic."""
    lines = []
    for launch in sorted(launches, key=lambda launch: launch.traffic, reverse=True)[:n]:
        inputs = " ".join(map(str, launch.inputs))
        outputs = " ".join(map(str, launch.outputs))
        megabytes = f"{launch.traffic / 1e6:,.1f} MB"
        lines.append(f"{megabytes:>12}  {launch.times} x {launch.kind}: {inputs} -> {outputs}")
    return lines


def check(programs: Iterable[Program], n_largest: int) -> tuple[list[str], list[str]]:
    """Compile programs, print their rows and failures, and return both."""
    rows = []
    failures: list[str] = []
    for program in programs:
        try:
            compiled = compile_program(program)
            new_failures = compiled.failures()
            rows.append(f"| {' | '.join(compiled.row())} |")
            print("\n".join([rows[-1], *largest(compiled.launches, n_largest)]), flush=True)
        # XLA raises many types, and the other programs are to be compiled all the same.
        except Exception as e:
            new_failures = [f"{program}: does not compile: {brief(e)}"]
        for failure in new_failures:
            print(failure, file=sys.stderr, flush=True)
        failures += new_failures
    return rows, failures


def write_table(table: str) -> None:
    """Replace the figures in the document."""
    text, heading, _ = DOCUMENT.read_text().partition(HEADING)
    assert heading, f"{DOCUMENT} has no heading {HEADING!r}"
    with atomic_write(DOCUMENT) as temporary:
        temporary.write_text(f"{text}{HEADING}\njax {jax.__version__}.\n\n{table}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="compile the smallest program only")
    parser.add_argument("--only", default="", help="compile programs with this text in their name")
    parser.add_argument("--largest", type=int, default=0, help="list N launches of each program")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    # A sweep is set up on as many simulated devices as there are cards.
    jax.config.update("jax_num_cpu_devices", MAX_CARDS)
    with as_on_gpu():
        programs = [smallest_program()] if args.quick else list(all_programs())
        programs = [program for program in programs if args.only in str(program)]
        if not programs:
            parser.error(f"no program has {args.only!r} in its name")
        head = f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|"
        print(head, flush=True)
        rows, failures = check(programs, args.largest)
    if not args.quick and not args.only:
        write_table("\n".join([head, *rows]))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
