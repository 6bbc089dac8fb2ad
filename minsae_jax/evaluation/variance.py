"""Shares of a feature's variance by token position, channel, recording and patient.

A share is eta² = Σ_g n_g (m_g - m)² / Σ (f - m)² over all tokens, for groups g of n_g tokens with
mean activations m_g: the between-group sum of squares over the total (Pearson's correlation ratio).
It is 0 if all groups have the same mean, and 1 if the feature is constant within groups. Shares
overlap: the recordings of a patient explain at least as much as the patient.

Groups differ by chance too. Without any effect and with independent tokens, eta² is about (groups -
1) / tokens; neighbouring tokens are alike, so that recordings and patients explain more.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from minsae_jax.evaluation.pooling import GroupMeans, Pooled, group_by_patient

FEATURE_BLOCK = 512  # of all recordings in float64 at a time


@dataclass(frozen=True)
class VarianceShares:
    """eta² of every feature for four groupings of the tokens; 0 for features that never vary."""

    position: Float[np.ndarray, " features"]
    channel: Float[np.ndarray, " features"]
    recording: Float[np.ndarray, " features"]
    patient: Float[np.ndarray, " features"]
    # The patient with the largest mean activation of each feature, and that patient's share of the
    # sum of the feature over all tokens (NaN where the sum is 0)
    top_patient: tuple[str, ...]
    top_patient_share: Float[np.ndarray, " features"]


def variance_shares(pooled: Pooled) -> VarianceShares:
    """Return the shares of variance that position, channel, recording and patient explain."""
    overall = np.average(pooled.by_position.mean, axis=0, weights=pooled.by_position.n_tokens)
    by_recording = GroupMeans(pooled.n_tokens, pooled.mean)
    patients, by_patient = _patient_means(pooled)
    total = pooled.total_squares
    top = by_patient.mean.argmax(axis=0)
    mean_of_top = by_patient.mean.max(axis=0)
    of_top = by_patient.n_tokens[top] * mean_of_top
    of_all = by_patient.n_tokens @ by_patient.mean
    return VarianceShares(
        position=_share(pooled.by_position, overall, total),
        channel=_share(pooled.by_channel, overall, total),
        recording=_share(by_recording, overall, total),
        patient=_share(by_patient, overall, total),
        top_patient=tuple(patients[i] for i in top),
        top_patient_share=of_top / np.where(of_all != 0, of_all, np.nan),
    )


def _share(
    groups: GroupMeans,
    overall: Float[np.ndarray, " features"],
    total_squares: Float[np.ndarray, " features"],
) -> Float[np.ndarray, " features"]:
    between = np.empty(len(overall))
    for start in range(0, len(overall), FEATURE_BLOCK):
        block = slice(start, start + FEATURE_BLOCK)
        deviation = groups.mean[:, block].astype(np.float64) - overall[block]
        between[block] = groups.n_tokens @ np.square(deviation)
    # A feature that never varies has no variance to explain.
    share = between / np.where(total_squares > 0, total_squares, np.inf)
    # Means are rounded, so that a share of 1 can come out above it.
    return np.minimum(share, 1)


def _patient_means(pooled: Pooled) -> tuple[tuple[str, ...], GroupMeans]:
    """Return the patients, and the means over the tokens of each."""
    patients, patient = group_by_patient(pooled.recordings)
    n_tokens = np.zeros(len(patients), np.int64)
    np.add.at(n_tokens, patient, pooled.n_tokens)
    sums = np.zeros((len(patients), pooled.mean.shape[1]))
    for i, mean, n in zip(patient, pooled.mean, pooled.n_tokens, strict=True):
        sums[i] += mean.astype(np.float64) * n
    sums /= n_tokens[:, None]
    return patients, GroupMeans(n_tokens, sums)
