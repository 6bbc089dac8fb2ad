"""Features such as an autoencoder has, made up without one: rhythms, blinks, and some that never fire."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from minsae_jax.eeg.montage import CHANNELS, POSITIONS

BANDS = [("delta", 1, 4), ("theta", 4, 8), ("alpha", 8, 13), ("beta", 13, 25), ("gamma", 25, 35)]
RATE, PATCH, N_PATCHES, SAMPLES = 100, 10, 30, 210
KINDS = {  # what the numbers suggest: Hz, centre on the head
    "posterior alpha, 8–13 Hz": (10.0, (0.0, -0.9)),
    "frontal blink, below 4 Hz": (2.0, (0.0, 1.0)),
    "central spindle, 13–25 Hz": (13.5, (0.0, 0.1)),
    "left temporal theta, 4–8 Hz": (6.0, (-1.0, 0.1)),
    "right temporal muscle, over 25 Hz": (30.0, (1.0, 0.0)),
}


def meta(**changes: Any) -> dict[str, Any]:
    lambdas = (0.5, 1, 2, 5, 10, 20)
    members = [
        {
            "name": f"lambda={v}",
            "lambda_sparsity": v,
            "l0": 96 / (1 + v),
            "fvu": 0.6 * v / (v + 4),
            "recommended": v == 5,
        }
        for v in lambdas
    ]
    return {
        "title": "Features of a demo encoder", "member": "lambda=5", "run": "runs/demo", "encoder": "checkpoints/demo",
        "layer": -1, "created_with": "minsae_jax 0.1.0", "split": "test", "n_tokens": 1_234_560, "n_windows": 2166,
        "n_recordings": 48, "n_patients": 16, "sampling_rate": RATE, "patch_seconds": PATCH / RATE,
        "n_patches": N_PATCHES, "has_cls": True, "channels": list(CHANNELS), "positions": POSITIONS, "bands": BANDS,
        "summary": [
            ("FVU, variance not explained", "0.333"), ("L0, active features a token", "16.0"),
            ("Loss recovered", "97.1 %"), ("Features", "1,024, of which 41 never active"), ("λ", "5"),
        ],
        "members": members,
        "events": [
            {"kind": kind, "feature": i, "auc": 0.97 - 0.05 * i, "probe_auc": 0.99 - 0.03 * i,
             "raw_auc": 0.8 - 0.06 * i, "pca_auc": 0.85 - 0.07 * i}
            for i, kind in enumerate(("alpha", "blink", "spindle"))
        ],
        "waveform_exact": False, "shifted_recordings": 2, "notes": ["Held-out patients only."],
    } | changes  # fmt: skip


def features(n: int, dead: tuple[int, ...] = (), seed: int = 0) -> Iterator[dict[str, Any]]:
    for i in range(n):
        yield dead_feature(i, n) if i in dead else feature(i, n, np.random.default_rng([seed, i]))


def _nearest(i: int, n: int) -> list[tuple[int, float]]:
    return [((i + 5 * k) % n, 0.7 - 0.08 * k) for k in range(1, 6)]


def dead_feature(i: int, n: int) -> dict[str, Any]:
    nothing = dict.fromkeys(
        ("mean", "max", "channel", "band", "cls", "spectrum", "waveform", "histogram", "position")
    )
    return nothing | {
        "id": i, "density": 0.0, "patients": 0, "patient_share": 0.0, "artefact": 0.0, "label": "", "note": "",
        "suggestion": "", "examples": [], "channel_ratio": [], "patient_list": [], "nearest": _nearest(i, n),
        "coactive": [], "artefacts": {},
    }  # fmt: skip


def feature(i: int, n: int, rng: np.random.Generator) -> dict[str, Any]:
    suggestion, (hz, centre) = list(KINDS.items())[i % len(KINDS)]
    weights = np.exp(-((POSITIONS - centre) ** 2).sum(1) / 0.5)
    top = int(weights.argmax())
    strongest = float(rng.uniform(3, 9))
    groups = ["top"] * 8 + [f"q{k}" for k in range(1, 11)] + ["random"] * 10
    levels = (
        np.r_[np.linspace(1, 0.8, 8), np.linspace(0.05, 0.95, 10), rng.uniform(0.05, 0.9, 10)]
        * strongest
    )
    examples = [
        _example(rng, group, float(level), level / strongest, hz, weights, top)
        for group, level in zip(groups, levels, strict=True)
    ]
    frequencies = np.arange(0.5, 35.5, 0.5)
    ratio = (
        0.8
        + 4 * np.exp(-(((frequencies - hz) / 2) ** 2))
        + 0.05 * rng.normal(size=frequencies.size)
    )
    edges = np.geomspace(0.01, strongest, 33)
    shares = np.sort(rng.dirichlet(np.ones(12)))[::-1] * 0.95
    position = rng.dirichlet(np.full(N_PATCHES, 40.0))
    t = np.arange(PATCH) / RATE
    return {
        "id": i, "density": float(10 ** rng.uniform(-4.5, -0.5)), "mean": strongest / 4, "max": strongest,
        "channel": CHANNELS[top], "band": next(b for b, _, to in BANDS if hz < to),
        "patients": int(rng.integers(4, 17)), "patient_share": float(shares[0]), "cls": 0.02,
        "artefact": float(rng.uniform(0, 0.3)),
        "label": "Posterior dominant rhythm" if i == 0 else "", "suggestion": suggestion,
        "note": "Eyes closed in all that I looked at; attenuates on opening." if i == 0 else "",
        "examples": examples,
        "histogram": {"edges": edges, "counts": rng.poisson(3000 * np.exp(-edges[:-1]) * edges[:-1])},
        "channel_ratio": 0.3 + 3 * weights + 0.1 * rng.random(19),
        "spectrum": {"hz": frequencies, "ratio": ratio, "low": 0.88 * ratio, "high": 1.14 * ratio},
        "position": position, "patient_list": [(f"demo{k:03d}", share) for k, share in enumerate(shares)],
        "nearest": _nearest(i, n), "coactive": _nearest(i, n)[:3], "waveform": np.cos(2 * np.pi * hz * t),
        "artefacts": {"beyond 5 SD": 0.04, "flat": 0.0, "over 25 Hz": 0.11},
    }  # fmt: skip


def _example(
    rng: np.random.Generator,
    group: str,
    activation: float,
    strength: float,
    hz: float,
    weights: np.ndarray,
    top: int,
) -> dict[str, Any]:
    """A burst on the patch that fires and around it, in noise of 1 SD; the third decile's is on the CLS token."""
    t = np.arange(SAMPLES) / RATE
    noise = np.cumsum(rng.normal(size=(19, SAMPLES)), 1)
    noise = (noise - noise.mean(1, keepdims=True)) / noise.std(1, keepdims=True)
    burst = (
        3 * strength * np.exp(-(((t - 1.05) / 0.35) ** 2)) * np.sin(2 * np.pi * hz * (t - 1.05) + 1)
    )
    eeg = np.clip(10 * (0.6 * noise + np.outer(weights, burst)), -127, 127).astype(np.int8)
    start = round(float(rng.uniform(0, 3000)), 1)
    recording = f"demo{rng.integers(16):03d}_s{rng.integers(4):03d}_t000"
    strip = np.maximum(0, activation * (np.exp(-(((np.arange(21) - 10) / 2.5) ** 2)) - 0.2)) / 0.8
    return {
        "group": group, "recording": recording, "patient": recording[:7], "channel": CHANNELS[top], "start": start,
        "patch": None if group == "q3" else (start + 1.0, start + 1.1), "activation": activation, "trace": eeg[top],
        "others": eeg[:, ::2] if group == "top" else None, "strip": strip, "strip_start": start,
        "hints": ["beyond 5 SD"] if rng.random() < 0.1 else [],
    }  # fmt: skip
