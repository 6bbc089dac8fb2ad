"""Where the time of a program goes on a GPU, by JAX's profiler: a part of `benchmarks.gpu`."""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.gpu_programs import (
    AUX,
    VARIANTS,
    Lines,
    Session,
    Sizes,
    Step,
    StepCalls,
    Variant,
    encoder_program,
    noise_windows,
)
from benchmarks.timing import in_a_row, row, table_head
from minsae_jax.parallel.mesh import make_mesh, put_batch
from minsae_jax.sae.batches import STEPS_PER_CALL

N_CALLS = 3
N_LARGEST = 8  # kernels of a program that are listed


class Kernel(NamedTuple):
    """A kernel of a program, or a copy."""

    name: str
    ms: float  # of a step, or of a batch of windows, in all launches
    launches: float


def kernels(session: Session) -> Lines:
    """The kernels that take longest, ms of a step, or of a layer of the encoder for all windows."""
    yield table_head("program", "kernel", "ms", "launches")
    sizes = session.sizes
    measures: dict[str, Callable[[], str]] = {}
    for kind in ("relu", "topk", "batchtopk", f"topk{AUX}"):
        if kind in sizes.kinds:
            measures[kind] = partial(_step_rows, Step(kind, "bfloat16", sizes.d_sae), sizes)
    for variant in (VARIANTS[0], VARIANTS[-1]):
        measures[f"encoder, {variant}"] = partial(_encoder_rows, sizes, variant)
    yield from session.rows(measures)


def _step_rows(step: Step, sizes: Sizes) -> str:
    return _rows(str(step), StepCalls(step, sizes).start, STEPS_PER_CALL)


def _encoder_rows(sizes: Sizes, variant: Variant) -> str:
    layer = sizes.layers[-1]
    program = encoder_program(layer, variant, sizes.n_windows)
    x = put_batch(make_mesh(), noise_windows(sizes.n_windows))
    return _rows(f"layer {layer}, {variant}", partial(program, x), 1)


def _rows(program: str, start: Callable[[], jax.Array], n_steps: int) -> str:
    """Return rows of all kernels together, and of the largest."""
    run = in_a_row(start, N_CALLS)
    run()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
        found = list(kernels_of(profile, N_CALLS * n_steps))
    everything = Kernel("all", sum(k.ms for k in found), sum(k.launches for k in found))
    largest = sorted(found, key=lambda kernel: -kernel.ms)[:N_LARGEST]
    lines = [everything, *largest]
    return "\n".join(row(program, k.name[:60], f"{k.ms:.4f}", f"{k.launches:.1f}") for k in lines)


def kernels_of(profile: Any, n_steps: int) -> Iterator[Kernel]:
    """Yield the kernels in a profile of n_steps steps, with their means; none without a GPU."""
    events: defaultdict[str, list[float]] = defaultdict(list)
    for plane in profile.planes:
        if "GPU" in plane.name:
            for line in plane.lines:
                # Others contain the same kernels again, by module and by operation.
                if line.name.startswith("Stream"):
                    for event in line.events:
                        events[event.name].append(event.duration_ns)
    for name, nanoseconds in events.items():
        yield Kernel(name, sum(nanoseconds) / n_steps / 1e6, len(nanoseconds) / n_steps)
