"""Measures over all test tokens of the members of a run, from one pass over the store."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from minsae_jax.errors import UserError
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.evaluation.inputs import EvaluationInputs
from minsae_jax.evaluation.members import Member
from minsae_jax.evaluation.results import DecoderCosines, DensityHistogram, TokenMeasures
from minsae_jax.evaluation.saved import Arrays, Keys, saved_or_measured
from minsae_jax.monitor import progress
from minsae_jax.parallel.mesh import make_mesh, members_sharding
from minsae_jax.sae.kinds import SAEKind
from minsae_jax.sae.measures import Measures, measure
from minsae_jax.sae.member import SparseAutoencoder

BATCH_SEQUENCES = 64
COSINE_ROWS = 1024  # decoder rows compared with all others at a time
DENSITY_EDGES = np.arange(-7, 0.51, 0.5)  # log10
MIN_VARIANCE = 1e-12  # of the tokens, as a share of their mean square


class TokenResult(NamedTuple):
    """Measures of one autoencoder over all test tokens, in one pass over the store."""

    measures: TokenMeasures
    # Share of tokens with each feature active
    density: Float[np.ndarray, " d_sae"]
    # Mean and summed variance of the activations themselves
    mean: Float[np.ndarray, " d_model"]
    variance: float

    def to_arrays(self) -> Arrays:
        record = json.dumps(asdict(self.measures))
        return self._asdict() | {"measures": np.array(record)}


def _token_result(saved: Arrays) -> TokenResult:
    record = json.loads(str(saved["measures"]))
    histogram = DensityHistogram(**record.pop("log10_density"))
    measures = TokenMeasures(**record, log10_density=histogram)
    return TokenResult(measures, saved["density"], saved["mean"], float(saved["variance"]))


def measure_tokens(
    inputs: EvaluationInputs, members: Sequence[Member], keys: Mapping[str, Keys]
) -> dict[str, TokenResult]:
    """Return the measures of all members, by name; saved ones are not measured again."""
    return saved_or_measured(
        inputs.out,
        "tokens",
        members,
        keys,
        lambda missing: _measure_missing(inputs.test, missing),
        TokenResult.to_arrays,
        _token_result,
    )


def _measure_missing(test: Dataset, members: Sequence[Member]) -> dict[str, TokenResult]:
    """Measure members in one pass over the store for each scale of activations in training.

    L1 has the unit of that scale. The members of a run have the same one; SAEs of other programs
    have 1. Baselines have neither a scale nor an L1, and join the first pass.
    """
    by_scale: dict[float, list[Member]] = {}
    baselines = []
    for member in members:
        if member.folder is None:
            baselines.append(member)
        else:
            scale = float(member.sae.config.get("scale", 1.0))
            by_scale.setdefault(scale, []).append(member)
    first = next(iter(by_scale), 1.0)
    by_scale.setdefault(first, []).extend(baselines)
    results: dict[str, TokenResult] = {}
    for scale, of_scale in by_scale.items():
        results |= _pass_over_tokens(test, of_scale, scale)
    return results


def _pass_over_tokens(
    test: Dataset, members: Sequence[Member], scale: float
) -> dict[str, TokenResult]:
    """Measure all members on scale * x in one pass over the store.

    Raises UserError if all tokens are equal.
    """
    groups = _group_by_shape(members)
    # The parameters of each group are stacked along a member axis, which lies along the mesh's
    # `sweep` axis, so that one pass over the store measures all members.
    kinds = [group[0].sae.kind for group in groups]
    params = []
    for kind, group in zip(kinds, groups, strict=True):
        scaled = [kind.fold_scale(member.sae.params, 1 / scale) for member in group]
        params.append(jax.tree.map(lambda *arrays: jnp.stack(arrays), *scaled))
    mesh = make_mesh(*map(len, groups))
    params = jax.device_put(params, members_sharding(mesh))
    totals = np.zeros((2, test.store.d_model))
    batches = _test_batches(test, totals)
    results = {}
    measured = measure(mesh, kinds, params, batches, scale)
    mean, mean_square = totals / test.store.total_tokens
    variance = float((mean_square - mean**2).sum())
    # Below it is the rounding error of the difference.
    if variance <= MIN_VARIANCE * mean_square.sum():
        raise UserError(
            f"all tokens of {test.store.folder} are equal, so that there is nothing to explain; "
            "check the encoder and the recordings"
        )
    for group, measures in zip(groups, measured, strict=True):
        for i, member in enumerate(group):
            results[member.name] = TokenResult(
                _token_measures(measures, i),
                measures.density[i],
                mean.astype(np.float32),
                variance,
            )
    return results


def _group_by_shape(members: Sequence[Member]) -> list[list[Member]]:
    """Return members of equal kind and size together, since their parameters are stacked."""
    groups: dict[tuple[int, SAEKind], list[Member]] = {}
    for member in members:
        groups.setdefault((member.sae.d_sae, member.sae.kind), []).append(member)
    return [groups[key] for key in sorted(groups, key=repr)]


def _test_batches(
    test: Dataset,
    totals: Float[np.ndarray, "2 d_model"],
) -> Iterator[Float[np.ndarray, "tokens d_model"]]:
    """Yield all tokens of the test store, adding each and its square to `totals`."""
    n_sequences = len(test.recording)
    with progress("measure", n_sequences, "sequences", delay=2.0) as bar:
        for start in range(0, n_sequences, BATCH_SEQUENCES):
            x = test.read(start, min(start + BATCH_SEQUENCES, n_sequences))
            bar.advance(len(x))
            tokens = x.reshape(-1, x.shape[-1])
            exact = tokens.astype(np.float64)
            totals[0] += exact.sum(0)
            totals[1] += np.square(exact).sum(0)
            yield tokens


def _token_measures(measures: Measures, i: int) -> TokenMeasures:
    """Return the measures of member i of a group."""
    density = measures.density[i]
    log10_density = np.log10(density[density > 0])
    counts, _ = np.histogram(log10_density, DENSITY_EDGES)
    return TokenMeasures(
        fvu=float(measures.fvu[i]),
        explained_variance=float(measures.explained_variance[i]),
        l0=float(measures.l0[i]),
        l1=float(measures.l1[i]),
        dense_fraction=float(measures.dense_fraction[i]),
        cosine=float(measures.cosine[i]),
        norm_ratio=float(measures.norm_ratio[i]),
        never_active_fraction=float((density == 0).mean()),
        log10_density=DensityHistogram(DENSITY_EDGES.tolist(), counts.tolist()),
    )


def decoder_cosines(sae: SparseAutoencoder) -> DecoderCosines:
    """Summarise the largest cosine of each decoder row with any other row."""
    rows = sae.unit_directions
    largest = np.full(len(rows), -1.0)
    # In blocks, since [d_sae, d_sae] may not fit into memory.
    for start in range(0, len(rows), COSINE_ROWS):
        cosine = rows[start : start + COSINE_ROWS] @ rows.T
        in_block = np.arange(len(cosine))
        cosine[in_block, start + in_block] = -1  # each row with itself
        largest[start : start + COSINE_ROWS] = cosine.max(axis=1)
    return DecoderCosines(
        mean=float(largest.mean()),
        median=float(np.median(largest)),
        over_0_9=float((largest > 0.9).mean()),
    )
