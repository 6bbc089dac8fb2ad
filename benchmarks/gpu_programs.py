"""What `benchmarks.gpu` measures: its sizes, and programs of the package, ready to be called."""

import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kinds
from benchmarks.timing import row
from minsae_jax.encoder.base import ComputeOptions, Precision
from minsae_jax.encoder.native import hidden_function
from minsae_jax.encoder.patchtst import attention
from minsae_jax.encoder.patchtst.model import PatchTST
from minsae_jax.errors import brief
from minsae_jax.parallel.mesh import make_mesh, put_batch
from minsae_jax.sae.batches import STEPS_PER_CALL
from minsae_jax.sae.step import SweepState

Lines = Generator[str, None, None]  # of Markdown
D_MODEL = kinds.D_MODEL
AUX = ", AuxK"
# Bias of a feature that is never to be active.
SILENT = -1e4


class Step(NamedTuple):
    """A training step. kind: a key of `kinds.SETTINGS`, or one with AUX added."""

    kind: str
    precision: str
    d_sae: int

    def __str__(self) -> str:
        return ", ".join(map(str, self))


class Variant(NamedTuple):
    """A way to compute the encoder."""

    precision: Precision
    attention: str  # reduction, score matrices or cuDNN

    def __str__(self) -> str:
        return ", ".join(self)


VARIANTS = (
    Variant("float32", "reduction"),
    Variant("float32", "score matrices"),
    Variant("tf32", "cuDNN"),
    Variant("bfloat16", "cuDNN"),
)
# After the first one, those that were never timed as they are now come first.
STEPS = (
    Step("relu", "bfloat16", 1024),
    Step("jumprelu, tanh", "bfloat16", 1024),
    Step("jumprelu, target L0", "bfloat16", 1024),
    Step(f"topk{AUX}", "bfloat16", 1024),
    Step("topk", "bfloat16", 1024),
    Step("batchtopk", "bfloat16", 1024),
    Step("matryoshka", "bfloat16", 1024),
    Step("relu", "tf32", 1024),
    Step("relu", "float32", 1024),
    Step("relu", "bfloat16", 4096),
)


@dataclass(frozen=True)
class Sizes:
    """How much is measured; the defaults are the sizes of the tables in RESULTS.md."""

    n_windows: int = 128
    n_reference_windows: int = 8  # compared with float64
    layers: tuple[int, ...] = (0, -1)
    n_members: int = 8
    batch: int = 4096  # tokens
    d_sae: int = 1024
    precisions: tuple[str, ...] = ("bfloat16", "tf32", "float32")
    kinds: tuple[str, ...] = (*kinds.SETTINGS, f"topk{AUX}")
    steps: tuple[Step, ...] = STEPS
    n_calls: int = 20  # before the host waits for the devices
    rounds: int = 5
    end_to_end_steps: int = 20_000
    resume_steps: int = 3000
    resume_kinds: str = "--kind relu topk batchtopk --lambda_sparsity 5 --k 32"
    with_compiled: bool = True


SMALL = Sizes(
    n_windows=2,
    n_reference_windows=1,
    layers=(0,),
    n_members=2,
    batch=128,
    d_sae=128,
    precisions=("bfloat16",),
    kinds=("relu",),
    steps=(Step("relu", "bfloat16", 128), Step(f"topk{AUX}", "float32", 128)),
    n_calls=1,
    rounds=1,
    end_to_end_steps=50,
    resume_steps=120,
    resume_kinds="--kind relu --lambda_sparsity 5",
    with_compiled=False,
)


@dataclass
class Goals:
    """Measurements that the project has goals for; None if they were not made."""

    step_share: float | None = None  # of the card's bfloat16 rate, 8 members in bfloat16
    run_share: float | None = None  # the same of a whole run
    over_eager: float | None = None
    over_compiled: float | None = None
    extraction_over_pytorch: float | None = None  # at its best batch, the smallest of all layers
    resumes_equal: bool | None = None


@dataclass
class Session:
    """What the parts read, and what they add to the summary."""

    sizes: Sizes
    # FLOP/s of the device's best product, by precision
    flops: defaultdict[str, float] = field(default_factory=lambda: defaultdict(lambda: math.nan))
    goals: Goals = field(default_factory=Goals)
    failures: list[str] = field(default_factory=list)

    def check(self, is_good: bool, failure: str) -> str:
        """Return "yes" or "NO" for a cell, and remember the failure."""
        if not is_good:
            self.failures.append(failure)
        return "yes" if is_good else "NO"

    def rows(self, measures: Mapping[str, Callable[[], str]]) -> Iterator[str]:
        """Yield the rows that functions return, or an error, after which the next one runs."""
        for name, measure in measures.items():
            try:
                yield measure()
            # JAX, torch and processes raise many types.
            except Exception as e:
                self.failures.append(f"{name}: {type(e).__name__}")
                yield row(name, f"failed: {type(e).__name__}: {brief(e)}")

    def share(self, rate: float, d_sae: int) -> float:
        """Return the share of the bfloat16 rate that tokens x members per second take."""
        return 10 * D_MODEL * d_sae * rate / self.flops["bfloat16"]


@lru_cache
def demo_encoder() -> Any:
    # Imported here, since torch reads the demo's weights and may be missing.
    from benchmarks.extract import CHECKPOINT
    from convert.encoder import convert_encoder

    encoder, _ = convert_encoder(CHECKPOINT, CHECKPOINT.with_suffix(".yaml"))
    return encoder


def noise_windows(n_windows: int) -> np.ndarray:
    a = demo_encoder().architecture
    rng = np.random.default_rng(0)
    return rng.normal(size=(n_windows, a.seq_len, a.n_vars)).astype(np.float32)


@lru_cache
def encoder_program(
    layer: int, variant: Variant, n_windows: int
) -> Callable[[jax.Array], jax.Array]:
    """Return the compiled function from windows on the devices to a layer's activations.

    All but the one with score matrices are what the package chooses on a GPU; a CPU has products of
    another kind only.
    """
    from benchmarks.extract import flax_program

    encoder = demo_encoder()
    mesh = make_mesh()
    layers = (layer % encoder.architecture.n_layers,)
    function = encoder.function(layers, ComputeOptions(variant.precision))
    context: AbstractContextManager = nullcontext()
    if variant.attention == "score matrices":
        # Another function than the cached one, since that may have been traced already.
        uncached = hidden_function.__wrapped__
        function = uncached(PatchTST, encoder.architecture, layers, variant.precision)
        context = mock.patch.object(attention, "fits_reduction", return_value=False)
    run = flax_program(encoder, mesh, function, variant.precision)
    with context:
        run(put_batch(mesh, noise_windows(n_windows))).block_until_ready()
    return run


class StepCalls:
    """Calls of ten training steps each, with the batches on the devices."""

    def __init__(self, step: Step, sizes: Sizes, mesh: str | None = None):
        kind = step.kind.removesuffix(AUX)
        self.has_aux = kind != step.kind
        self.sweep = kinds.sweep_of(kind, step.d_sae, sizes.n_members, step.precision, mesh)
        self.state = self.sweep.init(median=np.zeros(D_MODEL, np.float32))
        if self.has_aux:
            self.state = _silence_half(self.state)
        shape = (STEPS_PER_CALL, sizes.batch, D_MODEL)
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        self._arguments = (self.sweep.hyper, self.sweep.put(x), np.float32(1))
        lowered = self.sweep.step.lower(self.state, *self._arguments, n_tokens=sizes.batch)
        self.program = lowered.compile()

    def start(self) -> jax.Array:
        """Start a call; wait for the result to wait for its steps."""
        self.state, done = self.program(self.state, *self._arguments)
        return done

    def check_dead(self) -> None:
        """Raise if AuxK had no dead features to train, or others than it should."""
        (group,) = self.state.groups
        share = float((group.tokens_since_fired == kinds.NEVER).mean())
        if self.has_aux and share != 0.5:
            raise RuntimeError(f"{share:.0%} of the features are dead instead of half")


def _silence_half(state: SweepState) -> SweepState:
    """Return the state with half of the features dead, and a bias that keeps them so."""
    state = kinds.with_dead(state, 0.5)
    (group,) = state.groups
    b_enc = group.params["b_enc"]
    silenced = jnp.where(group.tokens_since_fired > 0, SILENT, b_enc)
    params = group.params | {"b_enc": jax.device_put(silenced, b_enc.sharding)}
    return state._replace(groups=(group._replace(params=params),))
