"""Rates and memory on a GPU: parts of `benchmarks.gpu`.

    python -m benchmarks.gpu_rates [--small] PROGRAM

prints the peak memory of one program; `memory` starts this.
"""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby

import jax
import numpy as np

from benchmarks import hlo, train
from benchmarks.gpu_programs import (
    SMALL,
    VARIANTS,
    Lines,
    Session,
    Sizes,
    Step,
    StepCalls,
    Variant,
    demo_encoder,
    encoder_program,
    noise_windows,
)
from benchmarks.timing import (
    alternate,
    import_torch,
    in_a_row,
    peak_memory,
    peak_rss,
    row,
    table_head,
)
from minsae_jax.errors import brief
from minsae_jax.parallel.mesh import fetch_batch, make_mesh, put_batch
from minsae_jax.parallel.processes import start_jax
from minsae_jax.sae.batches import STEPS_PER_CALL


def extraction(session: Session) -> Lines:
    """Windows per second of the demo's encoder; both ways of float32 take turns."""
    yield table_head(
        *("layer", "products", "attention"),
        *("windows/s, without the copy", "with the copy to the host"),
    )
    x = noise_windows(session.sizes.n_windows)
    measures = {}
    for layer in session.sizes.layers:
        for precision, variants in groupby(VARIANTS, lambda variant: variant.precision):
            rows = partial(_extraction_rows, session.sizes, x, layer, list(variants))
            measures[f"layer {layer}, {precision}"] = rows
    yield from session.rows(measures)


def _extraction_rows(sizes: Sizes, x: np.ndarray, layer: int, variants: list[Variant]) -> str:
    on_device = put_batch(make_mesh(), x)
    computing = {}
    copying = {}
    for variant in variants:
        program = encoder_program(layer, variant, sizes.n_windows)
        computing[str(variant)] = in_a_row(partial(program, on_device), sizes.n_calls)
        copying[str(variant)] = partial(_compute_and_copy, program, x)
    seconds = alternate(computing, sizes.rounds)
    seconds_with_copy = alternate(copying, sizes.rounds)
    rows = []
    for variant in variants:
        rate = sizes.n_calls * len(x) / seconds[str(variant)]
        rate_with_copy = len(x) / seconds_with_copy[str(variant)]
        rows.append(row(str(layer), *variant, f"{rate:,.0f}", f"{rate_with_copy:,.0f}"))
    return "\n".join(rows)


def _compute_and_copy(program: Callable[[jax.Array], jax.Array], x: np.ndarray) -> None:
    fetch_batch(program(put_batch(make_mesh(), x)), len(x))


def end_to_end(session: Session) -> Lines:
    """Runs of `minsae train` with the store on the device, metrics and logs included."""
    yield table_head(
        *("kind", "products", "million tokens x members/s", "ms a step", "of the bfloat16 rate")
    )
    sizes = session.sizes
    runs = [("relu", precision) for precision in sizes.precisions[:2]]
    runs += [(kind, "bfloat16") for kind in ("batchtopk", "topk") if kind in sizes.kinds]
    yield from session.rows({", ".join(run): partial(_run_row, session, *run) for run in runs})


def _run_row(session: Session, kind: str, precision: str) -> str:
    sizes = session.sizes
    rate = train.end_to_end(
        sizes.n_members, sizes.end_to_end_steps, precision, sizes.d_sae, sizes.batch, kind
    )
    share = session.share(rate, sizes.d_sae)
    if (kind, precision) == ("relu", "bfloat16"):
        session.goals.run_share = share
    ms = 1e3 * sizes.n_members * sizes.batch / rate
    return row(kind, precision, f"{rate / 1e6:.1f}", f"{ms:.3f}", f"{share:.1%}")


def steps(session: Session) -> Lines:
    """Training steps alone, ten in a call, with the batches on the device."""
    yield table_head(
        *("kind", "products", "d_sae", "ms a step", "million tokens x members/s"),
        *("of the bfloat16 rate", "launches a step", "products of a step"),
    )
    steps = session.sizes.steps
    yield from session.rows({str(step): partial(_step_row, session, step) for step in steps})


def _step_row(session: Session, step: Step) -> str:
    sizes = session.sizes
    calls = StepCalls(step, sizes)
    seconds = seconds_per_step(calls, sizes)
    calls.check_dead()
    rate = sizes.n_members * sizes.batch / seconds
    share = session.share(rate, step.d_sae)
    if step == sizes.steps[0]:
        session.goals.step_share = share
    cells = [step.kind, step.precision, f"{step.d_sae:,}", f"{1e3 * seconds:.3f}"]
    cells += [f"{rate / 1e6:.1f}", f"{share:.1%}"]
    return row(*cells, *_launches_and_products(calls.program))


def seconds_per_step(calls: StepCalls, sizes: Sizes) -> float:
    seconds = alternate({"calls": in_a_row(calls.start, sizes.n_calls)}, sizes.rounds)
    return seconds["calls"] / sizes.n_calls / STEPS_PER_CALL


def _launches_and_products(program: jax.stages.Compiled) -> tuple[str, str]:
    """Return the launches of a step, and its products by library, after XLA's autotuning."""
    try:
        launches = hlo.launches(program.as_text())
    # The parser was made for programs compiled without a card; a rate is worth more than these.
    except Exception as e:
        return f"unknown: {brief(e, 40)}", ""
    libraries: Counter[str] = Counter()
    for launch in launches:
        for product in launch.products:
            libraries[product.library] += launch.times
    n_launches = sum(launch.times for launch in launches)
    products = [f"{n / STEPS_PER_CALL:g} {library}" for library, n in libraries.items()]
    return f"{n_launches / STEPS_PER_CALL:.1f}", ", ".join(products)


def pytorch(session: Session) -> Lines:
    """Training and extraction against PyTorch, as `make bench` measures them."""
    torch = import_torch()
    if torch is None or torch.cuda.is_available() != (jax.default_backend() == "gpu"):
        yield "Skipped: there is no PyTorch for this device."
        return
    yield table_head(*train.COLUMNS)
    precisions = session.sizes.precisions
    yield from session.rows({name: partial(_training_row, session, name) for name in precisions})
    yield "\n" + table_head("layer", "", "windows/s", "minsae_jax is faster by")
    layers = session.sizes.layers
    yield from session.rows({f"layer {n}": partial(_layer_rows, session, n) for n in layers})


def _training_row(session: Session, precision: str) -> str:
    sizes = session.sizes
    arguments = (sizes.d_sae, precision, sizes.n_members, sizes.batch)
    try:
        rates = train.measure_rates(*arguments, sizes.rounds, sizes.with_compiled)
    # torch.compile needs a C compiler and more; the eager loop does not.
    except Exception as e:
        session.failures.append(f"torch.compile, {precision}: {brief(e)}")
        rates = train.measure_rates(*arguments, sizes.rounds, with_compiled=False)
    if precision == "bfloat16":
        session.goals.over_eager = rates["minsae_jax"] / rates["eager"]
        if "compiled" in rates:
            session.goals.over_compiled = rates["minsae_jax"] / rates["compiled"]
    return train.rates_row(*arguments, rates, session.flops[precision])


def _layer_rows(session: Session, layer: int) -> str:
    from benchmarks.extract import forward_windows, measure_layer  # which need torch

    encoder = demo_encoder()
    x = noise_windows(forward_windows(session.sizes.n_windows))
    n_layers = layer % encoder.architecture.n_layers + 1
    seconds, best = measure_layer(encoder, x, n_layers, rounds=min(session.sizes.rounds, 3))
    ratios = {name: s / seconds["minsae_jax"] for name, s in seconds.items()}
    goals = session.goals
    ratio = ratios[f"PyTorch, batch {best}, its best"]
    goals.extraction_over_pytorch = min(goals.extraction_over_pytorch or ratio, ratio)
    rates = {name: f"{len(x) / s:,.0f}" for name, s in seconds.items()}
    return "\n".join(row(str(layer), n, rates[n], f"{ratios[n]:.1f}") for n in seconds)


def memory(session: Session) -> Lines:
    """Peak device memory of a process that makes two calls, the compiler's trials included."""
    sizes = session.sizes
    names = list(programs(sizes))
    flags = []
    if sizes == SMALL:
        flags = ["--small"]
        names = names[-1:]  # a process each takes seconds
    yield table_head("program", "peak memory")
    # Several at once, since they mostly compile; each counts its own memory.
    pool = ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) // 4))
    try:
        for name, peak in zip(names, pool.map(partial(_peak, *flags), names), strict=True):
            yield row(name, peak)
    finally:
        pool.shutdown(cancel_futures=True)


def _peak(*arguments: str) -> str:
    try:
        return f"{peak_memory('benchmarks.gpu_rates', *arguments):,} MB"
    except subprocess.CalledProcessError as e:
        _, _, last_line = e.stderr.strip().rpartition("\n")
        return f"failed: {brief(last_line)}"


def programs(sizes: Sizes) -> dict[str, Callable[[], Callable[[], jax.Array]]]:
    """Return, by name, what compiles a program and returns a function that starts a call."""
    layer = sizes.layers[-1]
    makers: dict[str, Callable[[], Callable[[], jax.Array]]] = {}
    for variant in VARIANTS:
        makers[f"layer {layer}, {variant}"] = partial(_encoder_calls, layer, variant, sizes)
    for step in sizes.steps:
        makers[f"step, {step}"] = partial(_step_calls, step, sizes)
    return makers


def _encoder_calls(layer: int, variant: Variant, sizes: Sizes) -> Callable[[], jax.Array]:
    program = encoder_program(layer, variant, sizes.n_windows)
    return partial(program, put_batch(make_mesh(), noise_windows(sizes.n_windows)))


def _step_calls(step: Step, sizes: Sizes) -> Callable[[], jax.Array]:
    return StepCalls(step, sizes).start


def main() -> None:
    """Print the peak memory of a device in MB, or on a CPU that of this process."""
    start_jax()
    *flags, name = sys.argv[1:]
    start = programs(SMALL if flags else Sizes())[name]()
    in_a_row(start, 2)()
    statistics = jax.devices()[0].memory_stats() or {}
    print(statistics.get("peak_bytes_in_use", peak_rss()) // 1_000_000)


if __name__ == "__main__":
    main()
