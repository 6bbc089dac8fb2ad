"""`make cuda-check`: programs compiled for a GPU that is not there."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo
from benchmarks.cuda_check import COLUMNS, check, is_off_tensor_cores
from benchmarks.cuda_programs import D_MODEL, DEMO, N_MEMBERS, Program
from convert.encoder import convert_encoder

ROOT = Path(__file__).parents[1]


def has_cuda_plugin() -> bool:
    try:
        return importlib.util.find_spec("jax_plugins.xla_cuda12") is not None
    except ModuleNotFoundError:
        return False


def make_program(function, precision="float32"):
    return Program("test", None, precision, "1x1", lambda: jax.jit(function).lower(jnp.ones(3)))


def test_encoder_is_the_demo():
    encoder, _ = convert_encoder(ROOT / "configs/demo/encoder.pth")
    assert encoder.architecture == DEMO


def test_float64_is_a_failure():
    with jax.enable_x64(True):
        _, failures = check([make_program(lambda x: x.astype(jnp.float64).sum())], 0)
    assert failures == ["test, float32, mesh 1x1: contains float64"]


def test_large_output_is_a_failure():
    program = make_program(lambda x: jnp.sin(jnp.outer(x, x)))
    assert check([replace(program, max_output=9)], 0)[1] == []
    _, failures = check([replace(program, max_output=8)], 0)
    assert failures == ["test, float32, mesh 1x1: writes a large array: f32[3,3]"]


def test_float32_passes(capsys):
    rows, failures = check([make_program(jnp.sin)], n_largest=1)
    assert failures == []
    assert capsys.readouterr().out.startswith(rows[0])


def test_figures_of_a_call_of_several_steps_are_those_of_a_step():
    def call(n_steps):
        def run(a):
            return jax.lax.fori_loop(0, n_steps, lambda _, b: jnp.sin(a @ b), a)

        a = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
        program = Program("test", None, "float32", "1x1", lambda: jax.jit(run).lower(a))
        (row,), _ = check([replace(program, n_steps=n_steps)], 0)
        return dict(zip(COLUMNS, row.strip("| ").split(" | "), strict=True))

    four, eight = call(4), call(8)
    for name in ("TFLOP", "products", "H100 ms"):
        assert four[name] == eight[name]
    assert four["TFLOP"] == f"{2 * 1024**3 / 1e12:.3f}"
    # Those of the loop; what comes before it is shared by more steps.
    assert float(eight["launches"]) <= float(four["launches"]) < 4
    # A step reads two factors and writes a product at least.
    assert 3 * 4 * 1024**2 / 1e9 <= float(four["GB in"]) + float(four["GB out"]) < 0.05


def test_program_that_does_not_compile_is_a_failure_and_others_run():
    def fail(x):
        raise ValueError("no such\nlayout")

    rows, failures = check([make_program(fail), make_program(jnp.sin)], 0)
    assert len(rows) == 1
    assert failures == ["test, float32, mesh 1x1: does not compile: no such layout"]


@pytest.mark.parametrize(
    ("library", "arithmetic", "n", "expected"),
    [
        ("Triton", "bf16", 128, False),
        ("cuBLAS", "tf32", 128, False),
        ("Triton", "f32", 128, True),
        ("loop", "bf16", 128, True),
        # A matrix times a vector
        ("loop", "f32", 1, False),
    ],
)
def test_large_products_belong_on_tensor_cores(library, arithmetic, n, expected):
    product = hlo.Product(library, arithmetic, batch=1, m=128, n=n, k=128)
    assert is_off_tensor_cores(product) == expected


def test_float32_product_in_a_bfloat16_program_is_a_failure():
    def product(x):
        return jnp.matmul(jnp.outer(jnp.ones(64), x), jnp.ones((3, 64))) @ jnp.ones((64, 64))

    _, failures = check([make_program(product, "bfloat16")], 0)
    (failure,) = failures
    assert failure == ("test, bfloat16, mesh 1x1: not on tensor cores: f32 1 x [64, 64] [64, 64]")


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.skipif(not has_cuda_plugin(), reason="needs JAX for CUDA: `make setup EXTRA=cuda12`")
def test_smallest_step_compiles_for_an_h100():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cuda_check", "--quick"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    header, _, row = done.stdout.splitlines()
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert cells["products"] == "5 Triton"
    # Of a token: two products with each of both maps forward and back, less the gradient of x.
    flops = 10 * D_MODEL * 256 * 4096 * N_MEMBERS
    assert float(cells["TFLOP"]) == pytest.approx(flops / 1e12, abs=5e-4)
    # Weights and both of Adam's moments are read and written.
    assert float(cells["GB in"]) > 3 * 2 * D_MODEL * 256 * N_MEMBERS * 4 / 1e9
