"""Correctness on a GPU: parts of `benchmarks.gpu`.

    python -m benchmarks.gpu_checks FOLDER [--small]

makes a step of each kind of SAE in float32 and writes the results; `first_steps` starts this on the
CPU.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

from benchmarks import kinds, train
from benchmarks.gpu_programs import (
    AUX,
    D_MODEL,
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
from benchmarks.gpu_rates import seconds_per_step
from benchmarks.timing import row, table_head
from minsae_jax.encoder.patchtst.reduction import fits_reduction
from minsae_jax.errors import brief
from minsae_jax.parallel.mesh import make_mesh, put_batch
from minsae_jax.parallel.processes import start_jax

Arrays = dict[str, np.ndarray]

# In float32 the largest error counts, in lower precision rms / SD.
LARGEST_ERROR = 1e-4
RMS_LIMITS = {"tf32": 2e-3, "bfloat16": 2e-2}
FULL_LAMBDA = 10_000  # a step after the warm-up of λ and before the decay of lr
RUNS = ("whole", "stopped", "streamed")
SPLIT_LIMIT = 1e-2  # of a norm of differences / norm, with bfloat16 products
SECONDS = 240  # that another process may take


class Limits(NamedTuple):
    """Largest relative differences from the CPU's float32 that a step may have.

    A product that is rounded differently moves some features over the edge at 0 or over the
    threshold; the gradient then differs by whole terms. With the CPU's own bfloat16 it differs by
    up to 0.04, active features by 0.007 and the loss by 3e-4; a rounding of float32 to TF32 would
    be seen.
    """

    loss: float
    gradient: float  # norm of the difference / norm
    active: float  # features


STEP_LIMITS = {
    "float32": Limits(loss=1e-5, gradient=2e-3, active=1e-4),
    "tf32": Limits(loss=1e-3, gradient=0.02, active=3e-3),
    "bfloat16": Limits(loss=5e-3, gradient=0.1, active=2e-2),
}


def encoder(session: Session) -> Lines:
    """Errors of the encoder's activations on random windows, against PyTorch in float64."""
    sizes = session.sizes
    a = demo_encoder().architecture
    n_sequences = sizes.n_windows * a.n_vars
    n_summed = a.n_layers if a.res_attention else 1
    is_default = fits_reduction(
        np.float32, n_sequences, a.n_tokens, a.d_model // a.n_heads, n_summed
    )
    yield f"By default, float32 uses {'the reduction' if is_default else 'score matrices'}.\n"
    x = noise_windows(sizes.n_windows)
    expected = _layers_in_float64(x[: sizes.n_reference_windows])
    yield table_head(
        *("layer", "products", "attention", "largest error", "rms / SD", "within the limit")
    )
    measures = {}
    for layer in sizes.layers:
        for variant in VARIANTS:
            error_row = partial(_error_row, session, layer, variant, x, expected[layer])
            measures[f"layer {layer}, {variant}"] = error_row
    yield from session.rows(measures)


def _error_row(
    session: Session, layer: int, variant: Variant, x: np.ndarray, expected: np.ndarray
) -> str:
    """Return the row of a program; expected: activations of the first windows."""
    z = encoder_program(layer, variant, len(x))(put_batch(make_mesh(), x))
    error = np.asarray(z)[: len(expected)] - expected
    rms = np.sqrt(np.square(error).mean()) / expected.std()
    largest = np.abs(error).max()
    limit = RMS_LIMITS.get(variant.precision)
    is_good = largest <= LARGEST_ERROR if limit is None else rms <= limit
    is_within = session.check(bool(is_good), f"layer {layer}, {variant}: error")
    return row(str(layer), *variant, f"{largest:.1e}", f"{rms:.1e}", is_within)


def _layers_in_float64(x: np.ndarray) -> list[np.ndarray]:
    """Return all layers by PyTorch's functions on the CPU."""
    import torch

    from benchmarks.extract import CHECKPOINT
    from convert.checkpoint import load_checkpoint
    from convert.patchtst_torch import forward

    tensors = load_checkpoint(CHECKPOINT).tensors
    state = {name: torch.from_numpy(array).double() for name, array in tensors.items()}
    with torch.inference_mode():
        layers, _ = forward(demo_encoder().architecture, state, torch.from_numpy(x).double())
    return [layer.numpy() for layer in layers]


def first_steps(session: Session) -> Lines:
    """A training step of each kind from its initial weights, against the CPU's in float32."""
    for precision, limit in STEP_LIMITS.items():
        values = f"loss {limit.loss:g}, gradient {limit.gradient:g}, active {limit.active:g}"
        yield f"Limits in {precision}: {values}.  "
    yield "\n" + table_head("kind", "products", *Limits._fields, "within the limits")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gpu_checks", folder]
        if session.sizes == SMALL:
            command.append("--small")
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        with subprocess.Popen(command, env=environment) as process:
            try:
                yield from session.rows(_comparisons(session, process, Path(folder)))
            finally:
                process.kill()


def _comparisons(
    session: Session, process: subprocess.Popen[bytes], folder: Path
) -> dict[str, Callable[[], str]]:
    """Return a function for each row; `process` writes the CPU's steps into the folder."""
    sizes = session.sizes
    cases = [(kind, "float32") for kind in sizes.kinds]
    # In lower precision a kind without selection, and one with it.
    low = [kind for kind in ("relu", "batchtopk") if kind in sizes.kinds]
    cases += [(kind, p) for p in sizes.precisions if p != "float32" for kind in low]

    def compare(kind: str, precision: str) -> str:
        arrays = first_step(kind, precision, sizes)
        file = folder / f"{kind}.npz"
        _wait_until(file.exists, process)
        with np.load(file) as saved:
            expected = dict(saved)
        differences = Limits(*(relative_difference(arrays, expected, n) for n in Limits._fields))
        pairs = zip(differences, STEP_LIMITS[precision], strict=True)
        is_good = all(difference <= limit for difference, limit in pairs)
        is_within = session.check(is_good, f"first step, {kind}, {precision}: difference")
        return row(kind, precision, *(f"{value:.1e}" for value in differences), is_within)

    return {f"{kind}, {p}": partial(compare, kind, p) for kind, p in cases}


def _wait_until(is_true: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait for what a process does. Raises if it ends before, or takes too long."""
    end = time.monotonic() + SECONDS
    while not is_true():
        has_ended = process.poll() is not None
        # It may have done this last.
        if has_ended and not is_true():
            raise RuntimeError(f"a process ended too early, with {process.returncode}")
        if time.monotonic() > end:
            raise RuntimeError(f"a process took more than {SECONDS} s")
        time.sleep(0.005)


def relative_difference(arrays: Arrays, expected: Arrays, prefix: str) -> float:
    """Return the largest norm of a difference / norm, of the arrays of some name."""
    differences = []
    for name, reference in expected.items():
        norm = np.linalg.norm(reference.astype(np.float64))
        # Some parameters have no gradient, such as a bias that is not trained.
        if name.startswith(prefix) and norm > 0:
            difference = arrays[name].astype(np.float64) - reference
            differences.append(float(np.linalg.norm(difference) / norm))
    return max(differences)


def first_step(name: str, precision: str, sizes: Sizes) -> Arrays:
    """Return loss and active features of each member, and gradients as Adam's first moment."""
    kind = name.removesuffix(AUX)
    sweep = kinds.sweep_of(kind, sizes.d_sae, 2, precision, mesh="1x1")
    state = sweep.init(median=np.zeros(D_MODEL, np.float32))
    if kind != name:
        state = kinds.with_dead(state, 0.5)
    step = jax.device_put(np.int32(FULL_LAMBDA), state.step.sharding)
    x = np.random.default_rng(1).normal(size=(sizes.batch, D_MODEL)).astype(np.float32)
    state, _ = sweep.step(
        state._replace(step=step), sweep.hyper, sweep.put(x), np.float32(1), n_tokens=len(x)
    )
    (group,) = state.groups
    arrays = {"loss": group.metrics.loss, "active": group.metrics.active}
    moments = optax.tree.get(group.opt_state, "mu")
    arrays |= {f"gradient/{parameter}": moment for parameter, moment in moments.items()}
    return {key: np.asarray(array) for key, array in arrays.items()}


def several_gpus(session: Session) -> Lines:
    """Ten steps with the members or the tokens split over all devices, against one device."""
    if jax.device_count() == 1:
        yield "Skipped: there is one device."
        return
    sizes = session.sizes
    yield f"Limit of the difference of the weights after ten steps: {SPLIT_LIMIT:g}.\n"
    yield table_head("kind", "members x tokens", "ms a step", "/ one", "difference", "within")
    yield from session.rows({kind: partial(_split_rows, session, kind) for kind in sizes.kinds})


def _split_rows(session: Session, kind: str) -> str:
    sizes = session.sizes
    weights: dict[str, Arrays] = {}
    seconds: dict[str, float] = {}
    rows = []
    for mesh in ("1x1", f"{jax.device_count()}x1", f"1x{jax.device_count()}"):
        calls = StepCalls(Step(kind, "bfloat16", sizes.d_sae), sizes, mesh)
        calls.start()
        weights[mesh] = jax.device_get(calls.sweep.portable(calls.state).groups[0].params)
        seconds[mesh] = seconds_per_step(calls, sizes)
        difference = relative_difference(weights[mesh], weights["1x1"], "W_")
        is_within = session.check(difference <= SPLIT_LIMIT, f"{kind} on {mesh}: difference")
        cells = [kind, mesh, f"{1e3 * seconds[mesh]:.3f}"]
        cells += [f"{seconds['1x1'] / seconds[mesh]:.2f}", f"{difference:.1e}", is_within]
        rows.append(row(*cells))
    return "\n".join(rows)


def resume(session: Session) -> Lines:
    """`minsae train --deterministic`, stopped and resumed, and with a streamed store."""
    yield table_head("products", "run", "files", "same bytes as uninterrupted and resident")
    # float32 first, which is the default.
    precisions = session.sizes.precisions[::-1]
    yield from session.rows({name: partial(_resume_rows, session, name) for name in precisions})


def _resume_rows(session: Session, precision: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return _compare_runs(session, precision, Path(folder))


def _compare_runs(session: Session, precision: str, folder: Path) -> str:
    sizes = session.sizes
    train.write_noise_store(folder / "store", n_shards=2, n_sequences=256)
    command = [sys.executable, "-m", "minsae_jax", "train", "--store", str(folder / "store")]
    settings = (
        f"{sizes.resume_kinds} --seed 0 1 --lr auto "
        f"--feature_dim_factor {sizes.d_sae / D_MODEL} --batch_size {sizes.batch} "
        f"--num_steps {sizes.resume_steps} --checkpoint_every {sizes.resume_steps // 3} "
        f"--precision {precision} --deterministic"
    )
    command += settings.split()

    def start(run: str, resident: str) -> subprocess.Popen[bytes]:
        arguments = [*command, "--resident", resident, "--run_dir", str(folder / run)]
        # A file, since a pipe that is not read stops a command that has much to say.
        with (folder / f"{run}.log").open("wb") as log:
            return subprocess.Popen(arguments, stdout=log, stderr=log)

    def wait(process: subprocess.Popen[bytes], run: str, expected: int = 0) -> None:
        code = process.wait(SECONDS)
        if code != expected:
            last_line = (folder / f"{run}.log").read_text().strip().rpartition("\n")[2]
            raise RuntimeError(f"{run} ended with {code} instead of {expected}: {brief(last_line)}")

    # All at once, since they compile for longer than they compute.
    processes = {name: start(name, "off" if name == "streamed" else "on") for name in RUNS}
    try:
        checkpoints = folder / "stopped/checkpoints"
        _wait_until(lambda: _has_checkpoint(checkpoints), processes["stopped"])
        processes["stopped"].send_signal(signal.SIGTERM)
        wait(processes["stopped"], "stopped", 128 + signal.SIGTERM)
        processes["stopped"] = start("stopped", "on")
        for name, process in processes.items():
            wait(process, name)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    whole = folder / "whole"
    files = [path for path in whole.rglob("*") if path.suffix in (".csv", ".safetensors")]
    rows = []
    for run in ("stopped", "streamed"):
        different = [
            path.name
            for path in files
            if path.read_bytes() != (folder / run / path.relative_to(whole)).read_bytes()
        ]
        answer = session.check(not different, f"{run}, {precision}: {different} differ")
        rows.append(row(precision, run, str(len(files)), answer))
        if run == "stopped":
            # Of all precisions together.
            is_equal_so_far = session.goals.resumes_equal is not False
            session.goals.resumes_equal = is_equal_so_far and not different
    return "\n".join(rows)


def _has_checkpoint(folder: Path) -> bool:
    return any(path.name.isdigit() for path in folder.glob("*"))


def main() -> None:
    start_jax()
    folder, *flags = sys.argv[1:]
    sizes = SMALL if flags else Sizes()
    for kind in sizes.kinds:
        temporary = Path(folder) / "temporary.npz"
        np.savez(temporary, **first_step(kind, "float32", sizes))
        temporary.rename(Path(folder) / f"{kind}.npz")


if __name__ == "__main__":
    main()
