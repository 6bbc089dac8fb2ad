"""Features such as an SAE has, made up without one: rhythms, blinks, and some that never fire."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from minsae_jax.eeg.montage import CHANNELS, POSITIONS
from minsae_jax.estimates import Estimate, Interval
from minsae_jax.evaluation.associations import LabelledFeature
from minsae_jax.evaluation.config import Band
from minsae_jax.evaluation.event_results import EventScore, EventSummary, FeatureScore
from minsae_jax.evaluation.label_probes import LabelProbe, ProbeScore
from minsae_jax.evaluation.loss_recovered import LossRecovered
from minsae_jax.evaluation.results import (
    DecoderCosines,
    DensityHistogram,
    Recommendation,
    TokenMeasures,
)
from minsae_jax.report.describe import FeatureCard, FeatureRow, Histogram
from minsae_jax.report.event_pages import EventPage, SteeringEffect, SteeringResult
from minsae_jax.report.excerpts import EventSpan, Example
from minsae_jax.report.findings import Explained, SeedMatch, SeedStability
from minsae_jax.report.folder import ReportMeta
from minsae_jax.report.label_pages import LabelPage
from minsae_jax.report.montages import bipolar_chains
from minsae_jax.report.pages import MemberRow, Pages
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
EVENTS = ("alpha", "blink", "spindle", "spike", "muscle", "slow wave")


def make_meta(**changes: Any) -> ReportMeta:
    values: dict[str, Any] = {
        "title": "Features of a demo encoder",
        "member": "lambda=5",
        "member_folder": "runs/demo/members/lambda=5",
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
        "bipolar": bipolar_chains(CHANNELS),
        "bands": BANDS,
        "summary": [
            ("FVU, variance unexplained", "0.333"),
            ("L0, active features per token", "16.0"),
            ("Loss recovered", "97.1 %"),
            ("Features", "1,024, of which 41 never active"),
        ],
        "waveform_exact": False,
        "waveform_unit": "SD",
        "shifted_recordings": 2,
        "pages_rule": "Pages were written for all features.",
    }
    return ReportMeta(**(values | changes))


def make_cards(n: int, dead: tuple[int, ...] = (), seed: int = 0) -> Iterator[FeatureCard]:
    for i in range(n):
        if i in dead:
            yield make_dead_card(i, n)
        else:
            yield make_card(i, n, np.random.default_rng([seed, i]))


def make_row(i: int, **changes: Any) -> FeatureRow:
    """Return a feature that has no page."""
    values = {"density": 0.1, "mean": 1.0, "max": 2.0, "channel": "", "patients": 1, "label": ""}
    return FeatureRow(id=i, **(values | changes))


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


def with_findings(card: FeatureCard) -> FeatureCard:
    """Return a card with seeds, shares of variance, events and labels, as of a whole evaluation."""
    rng = np.random.default_rng([1, card.id])
    auc = np.clip(rng.normal(0.6, 0.06, len(EVENTS)), 0, 1)
    auc[card.id % len(EVENTS)] = rng.uniform(0.85, 0.99)
    events = [make_score(kind, card.id, float(auc[i])) for i, kind in enumerate(EVENTS)]
    events.sort(key=lambda event: -event.auc)
    found = 1 + card.id % 3
    matches = [
        SeedMatch(
            f"topk,k=8,seed={seed}", 7 * card.id % 40, 0.93 - 0.2 * i, 0.9 - 0.2 * i, i < found - 1
        )
        for i, seed in enumerate((1, 2))
    ]
    patient = 0.42 if card.id == 1 else 0.04
    examples = [
        replace(
            example,
            events=_event_spans(example, EVENTS[card.id % len(EVENTS)]),
            other_features=[((card.id + 3 * k) % 40, 4.0 - k) for k in range(1, 4)],
        )
        for example in card.examples
    ]
    return replace(
        card,
        examples=examples,
        stability=SeedStability(found, 3, matches),
        explained=Explained(0.02, 0.21, patient + 0.05, patient, "demo007", 0.61),
        events=events,
        labels=[
            LabelledFeature("age", card.id, -0.41, 0.002, 0.03, patient),
            LabelledFeature("sex", card.id, 0.1, 0.4, 0.81, patient),
        ],
    )


def make_score(kind: str, feature: int, auc: float) -> FeatureScore:
    return FeatureScore(
        kind=kind, feature=feature, val_auc=auc, auc=auc, recall=0.8 * auc**2, precision=auc**3
    )


def _event_spans(example: Example, kind: str) -> list[EventSpan]:
    """One event on the example's channel, and in part of the examples one on other channels."""
    start = example.start + 0.7
    spans = [EventSpan(kind, start, start + 0.8, [example.channel, "C3"])]
    if example.group == "top" and int(example.start) % 2:
        spans.append(EventSpan("blink", start - 0.4, start + 0.1, ["Fp1", "Fp2"]))
    return spans


def make_pages(n: int) -> Pages:
    """Return pages of a sweep with two kinds of SAE and PCA, six kinds of event and two labels."""
    recommendation = Recommendation(
        member="topk,k=8",
        interval=Interval(0.958, 0.98),
        runners_up=("topk,k=16", "jumprelu,k=8"),
        reason=(
            "topk,k=8 (97.1 % recovered, interval 95.8 % to 98.0 %) has the shortest description, "
            "174 bits per token with L0 8.0, of the 5 that recover 95 % of the loss"
        ),
        warnings={"topk,k=8": ("12 % of the features have a twin (decoder cosine above 0.9)",)},
    )
    return Pages(
        recommendation=recommendation,
        rule="of the members that recover 95 % of the loss, the one with the shortest description",
        as_good="topk,k=8 does not clearly detect them better than the best raw dimension",
        members=_make_members(),
        events=[_make_event(i, kind, n) for i, kind in enumerate(EVENTS)],
        event_means={
            "sae": _make_summary(0.92),
            "raw": _make_summary(0.87),
            "pca": _make_summary(0.93),
        },
        labels=[_make_label("age", "number", n), _make_label("sex", "categories", n)],
        n_seeds=3,
    )


def _estimate(value: float, below: float, above: float) -> Estimate:
    return Estimate(value, Interval(value - below, min(value + above, 1.0)))


def _make_summary(auc: float) -> EventSummary:
    return EventSummary(
        auc=_estimate(auc, 0.03, 0.02),
        recall=_estimate(auc**3, 0.1, 0),
        precision=auc**2,
        token_auc=auc - 0.3,
        probe_auc=_estimate(auc + 0.008, 0.018, 0.012),
        pure_features=11,
        tpp=_estimate(0.3, 0.05, 0.04),
        probe_recovered=Estimate(0.9),
    )


def _make_scores(auc: float, i: int) -> EventScore:
    return EventScore(
        val_events=71 - 8 * i,
        test_events=83 - 9 * i,
        feature=i,
        auc=_estimate(auc, 0.03, 0.02),
        val_auc=0.98,
        n_ties={0: 4, 1: None}.get(i, 1),
        ties=tuple(len(EVENTS) * k for k in range(4)) if i == 0 else (i,),
        ties_auc=(0.93, 0.99) if i == 0 else None,
        recall=_estimate(auc**3, 0.1, 0),
        best_five=(i, 6, 7, 8, 9),
        probe_2_auc=_estimate(auc + 0.004, 0.024, 0.006),
        probe_auc=_estimate(auc + 0.008, 0.018, 0.012),
        x_probe_auc=0.99,
        x_hat_probe_auc=Estimate(0.98),
        ablation_drop=Estimate(0.3),
        ablation_drop_others=Estimate(0.01),
        token_auc=auc - 0.3,
        token_base_rate=0.021 * (i + 1),
        precision=Estimate(auc**2),
        examples=50,
        pure_features=11 - i,
    )


def _make_event(i: int, kind: str, n: int) -> EventPage:
    auc = 0.99 - 0.03 * i
    ranked = [
        FeatureScore(
            kind=kind,
            feature=(i + len(EVENTS) * k) % n,
            val_auc=0.98 - 0.02 * k,
            auc=auc - 0.018 * k,
            recall=0.9 - 0.05 * k,
            precision=0.95 - 0.05 * k,
        )
        for k in range(12)
    ]
    return EventPage(
        kind=kind,
        scores={
            "sae": _make_scores(auc, i),
            "raw": _make_scores(auc - 0.05, i),
            "pca": _make_scores(0.93, i),
        },
        features=ranked,
        steering=_make_steering(i) if i < 3 else None,
        auc_gain=_estimate(-0.012, 0.04, 0.03) if i == 0 else None,
    )


def _make_steering(target: int) -> SteeringResult:
    t = np.arange(PATCH) / RATE
    effects = []
    for scale in (0.0, 2.0, 5.0):
        changes = dict.fromkeys(EVENTS, 0.08 * (scale - 1))
        changes[EVENTS[target]] = 0.9 * (scale - 1)
        waveform = 0.3 * (scale - 1) * np.cos(2 * np.pi * 10 * t)
        ratios = {band.name: 1 + 0.1 * scale * i for i, band in enumerate(BANDS)}
        effects.append(SteeringEffect(scale, changes, 11.2, waveform, ratios))
    return SteeringResult(target, "SD", 48_000, 1_912, effects)


def _make_label(name: str, type: str, n: int) -> LabelPage:
    is_number = type == "number"
    features = [
        LabelledFeature(
            label=name,
            feature=(3 * k + 1) % n,
            effect=(-1) ** k * (0.62 - 0.04 * k),
            p=min(1e-5 * 3**k, 1.0),
            q=min(1e-3 * 4**k, 1.0) if is_number else min(0.3 + 0.1 * k, 1.0),
            patient_share=0.42 if (3 * k + 1) % n == 1 else 0.04,
        )
        for k in range(12)
    ]
    if is_number:
        of_features = ProbeScore((1, 2), 0.61, Estimate(0.02, Interval(-0.42, 0.45)), 0.01)
        raw = ProbeScore((1, 2), 0.66, Estimate(-0.01, Interval(-0.4, 0.44)), 0.005)
    else:
        of_features = ProbeScore((1, 2), 0.52, Estimate(0.5, Interval(0.24, 0.77)), 0.44)
        raw = ProbeScore((1, 2), 0.61, Estimate(0.5, Interval(0.22, 0.76)), 0.2)
    probe = LabelProbe(
        label=name,
        score_name="Spearman's rho" if is_number else "AUC",
        chance=0.0 if is_number else 0.5,
        n_val=14,
        n_test=16,
        features=of_features,
        raw=raw,
    )
    return LabelPage(
        name=name,
        type=type,
        patients=16,
        recordings=48,
        values="21 to 83, median 52" if is_number else "female 9, male 7",
        effect_name="Spearman's rho" if is_number else "AUC",
        effect_hint="" if is_number else "probability that a male patient has the larger value",
        notes=() if is_number else ("2 patients without a value are left out",),
        pooling="mean",
        n_tested=n,
        n_significant=sum(feature.q < 0.05 for feature in features),
        features=features,
        probe=probe,
    )


def _make_members() -> list[MemberRow]:
    members = []
    for kind, fvu in (("topk", 0.19), ("jumprelu", 0.17), ("pca", 0.28)):
        for k in (4, 8, 16, 32):
            is_sae = kind != "pca"
            auc = (0.95 if is_sae else 0.92) - 0.002 * abs(k - 8)
            events = replace(
                _make_summary(auc),
                auc=_estimate(auc, 0.02, 0.02),
                tpp=_estimate(0.3 - 0.02 * k, 0.05, 0.04),
                pure_features=80 - k,
            )
            tokens = TokenMeasures(
                fvu=fvu / k**0.8,
                explained_variance=1 - fvu / k**0.8,
                l0=float(k),
                l1=1.0,
                dense_fraction=0.0,
                cosine=0.9,
                norm_ratio=0.9,
                never_active_fraction=0.3 / k,
                log10_density=DensityHistogram([], []),
            )
            recovered = _estimate(1 - 0.25 / k, 0.01, 0.008)
            member = MemberRow(
                name=f"{kind},k={k}",
                kind=kind,
                setting=f"k = {k}",
                line=f"{kind},0.01" if is_sae else "",
                l0=tokens.l0,
                fvu=tokens.fvu,
                description_bits=90 + 12.0 * k,
                loss=LossRecovered(0.1, recovered, 0.99, 0.1, 0.2, 0.3),
                events=events,
                stability=0.1 + 0.4 / k if is_sae else None,
                tokens=tokens if is_sae else None,
                decoder=DecoderCosines(0.1, 0.1, over_0_9=0.02 * k) if is_sae else None,
            )
            members.append(member)
    return members
