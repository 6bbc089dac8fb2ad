"""Reading compiled programs: launches, traffic and products, against XLA's own cost analysis."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo

CUBLAS = """
ENTRY %main (a: f32[8,64,256], b: f32[8,32,256]) -> f32[8,64,32] {
  %a = f32[8,64,256]{2,1,0} parameter(0)
  %b = f32[8,32,256]{2,1,0} parameter(1)
  %call = (f32[8,64,32]{2,1,0}, /*index=1*/s8[4194304]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["2"],\
"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]},\
"precision_config":{"operand_precision":["PRECISION","PRECISION"],"algorithm":"ALG_UNSET"}}}
  ROOT %result = f32[8,64,32]{2,1,0} get-tuple-element(%call), index=0
}
"""
CUDNN = """
ENTRY %main (q: bf16[6,101,4,16], k: bf16[6,101,4,16], v: bf16[6,101,4,16]) -> bf16[6,4,101,16] {
  %q = bf16[6,101,4,16]{3,2,1,0} parameter(0)
  %k = bf16[6,101,4,16]{3,2,1,0} parameter(1)
  %v = bf16[6,101,4,16]{3,2,1,0} parameter(2)
  %call = (bf16[6,4,101,16]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %v), \
custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %result = bf16[6,4,101,16]{3,1,2,0} get-tuple-element(%call), index=0
}
"""

# %a and %b are the same array; %c is another.
TWO_NAMES = """
%fused (p1: f32[100], p0: f32[10,10], p2: f32[100]) -> f32[100] {
  %p1 = f32[100]{0} parameter(1)
  %p0 = f32[10,10]{1,0} parameter(0)
  %p2 = f32[100]{0} parameter(2)
  %flat = f32[100]{0} bitcast(%p0)
  %sum = f32[100]{0} add(%flat, %p1)
  ROOT %result = f32[100]{0} multiply(%sum, %p2)
}

ENTRY %main (x: f32[10,10], c: f32[100]) -> f32[100] {
  %x = f32[10,10]{1,0} parameter(0)
  %c = f32[100]{0} parameter(1)
  %both = (f32[100]{0}, f32[10,10]{1,0}) tuple(%c, %x)
  %a = f32[10,10]{1,0} get-tuple-element(%both), index=1
  %b = f32[100]{0} bitcast(%x)
  ROOT %result = f32[100]{0} fusion(%a, %b, %c), kind=kLoop, calls=%fused
}
"""

# One of ten batches, of which the fusion has the array under two names.
SLICE = """
%fused (p0: f32[10,32,64], p1: s32[]) -> f32[32,64] {
  %p0 = f32[10,32,64]{2,0,1} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %renamed = f32[32,10,64]{2,1,0} bitcast(%p0)
  %one = f32[32,1,64]{2,1,0} dynamic-slice(%renamed, %zero, %p1, %zero), \
dynamic_slice_sizes={32,1,64}
  ROOT %result = f32[32,64]{1,0} bitcast(%one)
}

ENTRY %main (x: f32[10,32,64], i: s32[]) -> f32[32,64] {
  %x = f32[10,32,64]{2,0,1} parameter(0)
  %i = s32[] parameter(1)
  ROOT %result = f32[32,64]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
}
"""


def compiled(function, *shapes, **options):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function, **options).lower(*arguments).compile()


def launches(function, *shapes, **options):
    return hlo.launches(compiled(function, *shapes, **options).as_text())


@pytest.mark.parametrize(
    ("subscripts", "a", "b"),
    [("ij,jk->ik", (32, 64), (64, 48)), ("bij,bkj->bik", (4, 32, 64), (4, 48, 64))],
)
def test_flops_and_traffic_of_a_product_equal_those_of_xla(subscripts, a, b):
    program = compiled(lambda a, b: jnp.einsum(subscripts, a, b), a, b)
    found = hlo.launches(program.as_text())
    products = [product for launch in found for product in launch.products]
    cost = program.cost_analysis()
    assert sum(product.flops for product in products) == cost["flops"]
    assert sum(launch.traffic for launch in found) == cost["bytes accessed"]


def test_loop_counts_as_often_as_it_runs():
    def run(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.sin(x) * 2, x)

    in_loop = [launch for launch in launches(run, (1000,)) if launch.outputs[0].size == 1000]
    assert sum(launch.traffic for launch in in_loop if launch.times == 5) == 5 * 2 * 4000
    assert not any(launch.is_repeated for launch in in_loop)


def test_loop_whose_length_depends_on_the_data_counts_once():
    def run(x):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: jnp.sin(x) * 0.5, x)

    repeated = [launch for launch in launches(run, (1000,)) if launch.is_repeated]
    assert {launch.times for launch in repeated} == {1}
    # The body reads and writes the array, and the condition reads it.
    assert sum(launch.traffic for launch in repeated) >= 3 * 4000


def test_branch_with_more_traffic_counts():
    def run(x, large):
        return jax.lax.cond(x[0] > 0, lambda: jnp.sin(large).sum(), lambda: jnp.cos(x).sum())

    found = launches(run, (10,), (100_000,))
    assert 400_000 <= sum(launch.traffic for launch in found) < 1_300_000
    names = {array.size for launch in found for array in launch.inputs}
    assert 100_000 in names


def test_slice_counts_instead_of_the_array():
    def run(x, start):
        return jnp.sin(jax.lax.dynamic_slice(x, (start[0].astype(int), 0), (2, 100))) * 2

    found = launches(run, (1000, 100), (1,))
    assert sum(launch.traffic for launch in found) < 2 * 800 + 100


def test_update_in_place_counts_instead_of_the_array():
    def run(x, row, start):
        return jax.lax.dynamic_update_slice(x, jnp.sin(row), (start[0].astype(int), 0))

    found = launches(run, (1000, 100), (1, 100), (1,), donate_argnums=0)
    assert sum(launch.traffic for launch in found) < 4 * 400 + 100


def test_array_with_two_names_counts_once():
    (launch,) = hlo.launches(TWO_NAMES)
    assert launch.read == 2 * 400
    assert launch.written == 400


def test_of_an_array_that_is_sliced_the_slice_is_read():
    (launch,) = hlo.launches(SLICE)
    assert launch.read == 4 * 32 * 64 + 4
    assert launch.written == 4 * 32 * 64


@pytest.mark.parametrize(("precision", "arithmetic"), [("DEFAULT", "tf32"), ("HIGHEST", "f32")])
def test_call_of_cublas(precision, arithmetic):
    (launch,) = hlo.launches(CUBLAS.replace("PRECISION", precision))
    (product,) = launch.products
    assert product == hlo.Product("cuBLAS", arithmetic, batch=8, m=64, n=32, k=256)
    assert launch.read == 8 * (64 + 32) * 256 * 4
    # Without the work space
    assert launch.written == 8 * 64 * 32 * 4


def test_attention_of_cudnn_is_two_products():
    (launch,) = hlo.launches(CUDNN)
    scores, mixed = launch.products
    assert scores == hlo.Product("cuDNN", "bf16", batch=24, m=101, n=101, k=16)
    assert mixed == hlo.Product("cuDNN", "bf16", batch=24, m=101, n=16, k=101)
    assert launch.traffic == 4 * 6 * 101 * 4 * 16 * 2
