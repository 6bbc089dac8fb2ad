"""Features such as an SAE has, made up without one: rhythms, blinks, and some that never fire."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from minsae_jax.eeg.montage import CHANNELS, POSITIONS
from minsae_jax.evaluation.config import Band
from minsae_jax.report.describe import FeatureCard, Histogram
from minsae_jax.report.excerpts import EventSpan, Example
from minsae_jax.report.page import EventRow, MemberRow, ReportMeta
from minsae_jax.report.spectra import Spectrum

BANDS = (
    Band("delta", 1.0, 4.0),
    Band("theta", 4.0, 8.0),
    Band("alpha", 8.0, 13.0),
    Band("beta", 13.0, 25.0),
    Band("gamma", 25.0, 35.0),
)
RATE = 100
PATCH = 10  # samples
N_PATCHES = 30
SAMPLES = 210
KINDS = {  # suggested name: Hz, centre on the head
    "posterior alpha, 8–13 Hz": (10.0, (0.0, -0.9)),
    "frontal blink, below 4 Hz": (2.0, (0.0, 1.0)),
    "central spindle, 13–25 Hz": (13.5, (0.0, 0.1)),
    "left temporal theta, 4–8 Hz": (6.0, (-1.0, 0.1)),
    "right temporal muscle, over 25 Hz": (30.0, (1.0, 0.0)),
}


def make_meta(**changes: Any) -> ReportMeta:
    members = [
        MemberRow(
            name=f"lambda={v:g}",
            hyper={"lambda_sparsity": v},
            l0=96 / (1 + v),
            fvu=0.6 * v / (v + 4),
            recommended=v == 5,
        )
        for v in (0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
    ]
    events = [
        EventRow(
            kind=kind,
            feature=i,
            auc=0.97 - 0.05 * i,
            probe_auc=0.99 - 0.03 * i,
            raw_auc=0.8 - 0.06 * i,
            pca_auc=0.85 - 0.07 * i,
        )
        for i, kind in enumerate(("alpha", "blink", "spindle"))
    ]
    values: dict[str, Any] = {
        "title": "Features of a demo encoder",
        "member": "lambda=5",
        "run": "runs/demo",
        "encoder": "0123456789ab",
        "layer": -1,
        "created_with": "minsae_jax 0.1.0",
        "n_tokens": 1_234_560,
        "n_windows": 2166,
        "n_recordings": 48,
        "n_patients": 16,
        "split": "test",
        "sampling_rate": RATE,
        "patch_seconds": PATCH / RATE,
        "n_patches": N_PATCHES,
        "has_cls": True,
        "channels": CHANNELS,
        "positions": POSITIONS,
        "bands": BANDS,
        "summary": [
            ("FVU, variance unexplained", "0.333"),
            ("L0, active features per token", "16.0"),
            ("Loss recovered", "97.1 %"),
            ("Features", "1,024, of which 41 never active"),
        ],
        "members": members,
        "events": events,
        "waveform_exact": False,
        "shifted_recordings": 2,
        "notes": ["Held-out patients only."],
    }
    return ReportMeta(**(values | changes))


def make_cards(n: int, dead: tuple[int, ...] = (), seed: int = 0) -> Iterator[FeatureCard]:
    for i in range(n):
        if i in dead:
            yield make_dead_card(i, n)
        else:
            yield make_card(i, n, np.random.default_rng([seed, i]))


def _nearest(i: int, n: int) -> list[tuple[int, float]]:
    return [((i + 5 * k) % n, 0.7 - 0.08 * k) for k in range(1, 6)]


def make_dead_card(i: int, n: int, **changes: Any) -> FeatureCard:
    values: dict[str, Any] = {
        "id": i,
        "density": 0.0,
        "mean": np.nan,
        "max": np.nan,
        "channel": "",
        "band": "",
        "patients": 0,
        "patient_share": 0.0,
        "artefact": 0.0,
        "artefact_top": 0.0,
        "cls": 0.0,
        "label": "",
        "note": "",
        "suggestion": "",
        "support": np.nan,
        "examples": [],
        "histogram": Histogram(np.zeros(0), np.zeros(0, int)),
        "channel_ratio": np.zeros(0),
        "spectrum": None,
        "position": np.zeros(0),
        "patient_list": [],
        "nearest": _nearest(i, n),
        "coactive": [],
        "waveform": None,
        "artefacts": {},
        "artefacts_top": {},
    }
    return FeatureCard(**(values | changes))


def make_card(i: int, n: int, rng: np.random.Generator) -> FeatureCard:
    suggestion, (hz, centre) = list(KINDS.items())[i % len(KINDS)]
    weights = np.exp(-((POSITIONS - centre) ** 2).sum(1) / 0.5)
    top = int(weights.argmax())
    strongest = float(rng.uniform(3, 9))
    groups = ["top"] * 8 + [f"q{k}" for k in range(1, 11)] + ["random"] * 10
    levels = np.concatenate(
        [np.linspace(1, 0.8, 8), np.linspace(0.05, 0.95, 10), rng.uniform(0.05, 0.9, 10)]
    )
    examples = [
        _make_example(rng, group, float(level), strongest, hz, weights, top)
        for group, level in zip(groups, levels, strict=True)
    ]
    frequencies = np.arange(0.5, 35.5, 0.5)
    peak = 4 * np.exp(-(((frequencies - hz) / 2) ** 2))
    ratio = 0.8 + peak + 0.05 * rng.normal(size=frequencies.size)
    edges = np.geomspace(0.01, strongest, 33)
    shares = np.sort(rng.dirichlet(np.ones(12)))[::-1] * 0.95
    position = rng.dirichlet(np.full(N_PATCHES, 40.0))
    t = np.arange(PATCH) / RATE
    return FeatureCard(
        id=i,
        density=float(10 ** rng.uniform(-4.5, -0.5)),
        mean=strongest / 4,
        max=strongest,
        channel=CHANNELS[top],
        band=next(band.name for band in BANDS if hz < band.high),
        patients=int(rng.integers(4, 17)),
        patient_share=float(shares[0]),
        artefact=float(rng.uniform(0, 0.3)),
        artefact_top=float(rng.uniform(0, 0.6)),
        cls=0.02,
        label="Posterior dominant rhythm" if i == 0 else "",
        note="Eyes closed in all examples; attenuates on opening." if i == 0 else "",
        suggestion=suggestion,
        support=float(rng.uniform(0.2, 1)),
        examples=examples,
        histogram=Histogram(edges, rng.poisson(3000 * np.exp(-edges[:-1]) * edges[:-1])),
        channel_ratio=0.3 + 3 * weights + 0.1 * rng.random(19),
        spectrum=Spectrum(frequencies, ratio, 0.88 * ratio, 1.14 * ratio),
        position=position,
        patient_list=[(f"demo{k:03d}", float(share)) for k, share in enumerate(shares)],
        nearest=_nearest(i, n),
        coactive=_nearest(i, n)[:3],
        waveform=np.cos(2 * np.pi * hz * t),
        artefacts={"beyond 5 SD": 0.04, "flat": 0.0, "over 25 Hz": 0.11},
        artefacts_top={"beyond 5 SD": 0.25, "flat": 0.0, "over 25 Hz": 0.5},
    )


def _make_example(
    rng: np.random.Generator,
    group: str,
    level: float,
    strongest: float,
    hz: float,
    weights: np.ndarray,
    top: int,
) -> Example:
    """A burst on the active patch and around it, in noise of 1 SD; q3 is a CLS token."""
    t = np.arange(SAMPLES) / RATE
    noise = np.cumsum(rng.normal(size=(19, SAMPLES)), 1)
    noise = (noise - noise.mean(1, keepdims=True)) / noise.std(1, keepdims=True)
    envelope = 3 * level * np.exp(-(((t - 1.05) / 0.35) ** 2))
    burst = envelope * np.sin(2 * np.pi * hz * (t - 1.05) + 1)
    eeg = np.clip(10 * (0.6 * noise + np.outer(weights, burst)), -127, 127).astype(np.int8)
    start = round(float(rng.uniform(0, 3000)), 1)
    recording = f"demo{rng.integers(16):03d}_s{rng.integers(4):03d}_t000"
    bump = np.exp(-(((np.arange(21) - 10) / 2.5) ** 2))
    return Example(
        group=group,
        activation=level * strongest,
        recording=recording,
        patient=recording[:7],
        channel=CHANNELS[top],
        start=start,
        patch=None if group == "q3" else (start + 1.0, start + 1.1),
        trace=eeg[top],
        others=eeg[:, ::2] if group == "top" else None,
        strip=np.maximum(0, level * strongest * (bump - 0.2)) / 0.8,
        strip_start=start,
        hints=["beyond 5 SD"] if rng.random() < 0.1 else [],
        events=[EventSpan("spindle", start + 0.4, start + 1.3, [CHANNELS[top], "FP1"])],
        other_features=[(1, 2.5), (2, 0.5)],
    )
