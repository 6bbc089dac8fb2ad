"""`minsae steer`: scale features of an SAE at its layer, and measure what changes downstream."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from minsae_jax.encoder.base import BaseEncoder
from minsae_jax.errors import UserError
from minsae_jax.evaluation.config import Band, parse_bands
from minsae_jax.evaluation.dataset import Dataset
from minsae_jax.evaluation.inputs import EvaluationInputs, open_inputs
from minsae_jax.evaluation.members import Member
from minsae_jax.evaluation.recordings import check_unchanged, open_finite_recording
from minsae_jax.evaluation.steering.config import SteerConfig
from minsae_jax.evaluation.steering.edit import Place, SteeredEncoder
from minsae_jax.evaluation.steering.output import WindowChanges, measure_windows
from minsae_jax.evaluation.steering.probes import (
    ProbeReading,
    Target,
    find_target,
    make_probes,
    read_probes,
    read_spans,
)
from minsae_jax.evaluation.steering.results import Effect, Steering
from minsae_jax.monitor import progress
from minsae_jax.sae.config import TrainConfig
from minsae_jax.sae.member import check_features
from minsae_jax.settings import did_you_mean, read_json

BATCH_SEQUENCES = 512
MAX_WINDOWS_PER_RECORDING = 2
# By variant: scale 1, then the scales
Readings = list[tuple[ProbeReading, ...]]


def steer(
    settings: SteerConfig, encoder: BaseEncoder, train_config: TrainConfig | None = None
) -> Steering:
    """Steer features of a member of a run, and write the files of the result into the run.

    train_config: settings of the run, read from it unless passed. Raises UserError if run, stores,
    encoder and recordings do not belong together, or if there is no such member, feature, recording
    or window, or a feature is not active there.
    """
    member_name = settings.member or _recommended(Path(settings.run))
    inputs = open_inputs(settings, encoder, train_config, member_name)
    with inputs.locked():
        return _steer(settings, encoder, inputs, member_name)


def _steer(
    settings: SteerConfig, encoder: BaseEncoder, inputs: EvaluationInputs, member_name: str
) -> Steering:
    """Steer features on locked inputs."""
    check_unchanged(inputs.test)
    if inputs.val is not None and inputs.events is not None:
        # Probes are fitted on it.
        check_unchanged(inputs.val)
    member = next(m for m in inputs.members if m.name == member_name)
    features = settings.feature
    check_features(member.sae, features, member.name)
    steered = SteeredEncoder(encoder, inputs.test, inputs.layer, member.sae)
    places = _choose_places(settings, steered)
    # A variant for each scale, which is that of all features.
    scales = np.outer(settings.scale, np.ones(len(features)))
    bands = parse_bands(settings.bands)
    changes = measure_windows(steered, places, features, scales, bands)
    probes = make_probes(inputs, steered, features, settings.seed)
    target = None
    readings: Readings = [()] * (1 + len(scales))
    if probes is not None:
        values = read_spans(steered, probes.test, features, scales)
        target = find_target(probes, features, values)
        readings = read_probes(probes, values)
    steering = _result(inputs, member, features, settings.scale, places, changes, target, readings)
    steering.write()
    return steering


def steer_best(
    inputs: EvaluationInputs,
    member: Member,
    features: Mapping[str, int],
    scales: Sequence[float] = (0.0, 2.0),
    windows: int = 8,
    bands: Sequence[Band] = (),
    seed: int = 0,
) -> dict[str, Steering]:
    """Steer the best feature of each kind of event, as `steer` does, and write nothing.

    features: by kind, such as {kind: score.feature} of the member's scores in an evaluation; the
    kind is the target. Features that are active on no test token are left out, and so are kinds
    without a probe; without labelled events there are none. One pass over the test store and one
    over the windows with labelled spans serve all features. Raises UserError if the encoder cannot
    run from a layer on.
    """
    assert inputs.encoder is not None, "steering requires the encoder"
    steered = SteeredEncoder(inputs.encoder, inputs.test, inputs.layer, member.sae)
    distinct = sorted(set(features.values()))
    # `evaluate` has warned of the other kinds, which have no best feature.
    probes = make_probes(inputs, steered, distinct, seed, expected=features)
    if probes is None:
        return {}
    maxima = _sequence_maxima(steered, distinct)
    # A variant for each feature and scale, in which the other features keep scale 1.
    n_scales = len(scales)
    n_features = len(distinct)
    variants = np.ones((n_features, n_scales, n_features))
    for i in range(n_features):
        variants[i, :, i] = scales
    values = read_spans(steered, probes.test, distinct, variants.reshape(-1, n_features))
    untouched, *readings = read_probes(probes, values)
    of_one_feature = np.array(scales, np.float64)[:, None]
    results = {}
    for kind in [probe.kind for probe in probes.probes if probe.kind in features]:
        feature = features[kind]
        i = distinct.index(feature)
        strength = maxima[:, i]
        if not strength.any():
            continue
        places = _strongest_places(inputs.test, strength, windows)
        changes = measure_windows(steered, places, [feature], of_one_feature, bands)
        first = i * n_scales
        of_feature = [untouched, *readings[first : first + n_scales]]
        target = find_target(probes, distinct, values, (kind, feature))
        results[kind] = _result(
            inputs, member, [feature], scales, places, changes, target, of_feature
        )
    return results


def _recommended(run: Path) -> str:
    """Return the name of the recommended member. Raises UserError before an evaluation."""
    path = run / "evaluation.json"
    if not path.is_file():
        raise UserError(f"{run} has no evaluation.json; set --member, or run evaluate first")
    recommended = read_json(path).get("recommended")
    if not isinstance(recommended, str):
        raise UserError(f"{path} does not name a recommended member; set --member")
    return recommended


def _result(
    inputs: EvaluationInputs,
    member: Member,
    features: Sequence[int],
    scales: Sequence[float],
    places: Sequence[Place],
    changes: WindowChanges,
    target: Target | None,
    readings: Readings,
) -> Steering:
    effects = []
    for i, scale in enumerate([1.0, *scales]):
        effect = Effect(
            scale=scale,
            last_layer=float(changes.last[i]),
            last_layer_elsewhere=float(changes.last_elsewhere[i]),
            reconstruction=changes.reconstructions[i] if changes.reconstructions else None,
            probes=readings[i],
        )
        effects.append(effect)
    dataset = inputs.test
    is_normalized = dataset.store.require_manifest().data["revin"]
    return Steering(
        run=str(inputs.run),
        member=member.name,
        layer=inputs.layer,
        features=tuple(features),
        windows=tuple(places),
        n_tokens=changes.n_tokens,
        n_affected=changes.n_affected,
        unit="SD of the window" if is_normalized else dataset.description.unit,
        sampling_rate=dataset.sampling_rate,
        channels=dataset.channel_names or tuple(map(str, range(dataset.n_vars))),
        positions=dataset.positions,
        hz=changes.hz,
        r=changes.r if changes.reconstructions else None,
        target=target,
        untouched=effects[0],
        effects=tuple(effects[1:]),
        examples=changes.examples,
    )


def _choose_places(settings: SteerConfig, steered: SteeredEncoder) -> list[Place]:
    """Return the windows that the settings name, or those where the features are strongest.

    Raises UserError if a feature is active on no token of the windows to choose from.
    """
    features = settings.feature
    directions = steered.sae.decoder_directions[list(features)]
    norms = np.linalg.norm(directions, axis=1)
    if settings.recording is None:
        maxima = _sequence_maxima(steered, features)
        _check_active(features, maxima, "any token of the test patients")
        return _strongest_places(steered.dataset, maxima @ norms, settings.windows)
    places = _places_of(settings.recording, settings.window, steered.dataset)
    maxima = np.zeros((len(places), len(features)), np.float32)
    no_scales = np.ones((0, len(features)))
    for windows in steered.run(places, features, no_scales):
        activations = steered.sae.encode_features(windows.hidden, features)
        stop = windows.start + len(activations)
        maxima[windows.start : stop] = activations.max(axis=(1, 2))
    _check_active(features, maxima, f"the chosen windows of {settings.recording}")
    if settings.window:
        return places
    order = np.argsort(-(maxima @ norms), kind="stable")
    strongest = np.sort(order[: settings.windows])
    return [places[i] for i in strongest]


def _check_active(
    features: Sequence[int], maxima: Float[np.ndarray, "n features"], where: str
) -> None:
    for feature, of_feature in zip(features, maxima.T, strict=True):
        if not (of_feature > 0).any():
            raise UserError(f"feature {feature} is not active on {where}; choose another --feature")


def _places_of(name: str, windows: Sequence[int], dataset: Dataset) -> list[Place]:
    """Return windows of a recording, all by default. Raises UserError if there is none."""
    path = dataset.folder / name
    if path.suffix != ".npy" or not path.is_file():
        known = [other.name for other in dataset.folder.glob("*.npy")]
        raise UserError(
            f"there is no recording {name} in {dataset.folder}" + did_you_mean(name, known)
        )
    recording = open_finite_recording(path)
    if recording.shape[1] != dataset.n_vars:
        raise UserError(
            f"{name} has {recording.shape[1]} channels, but the encoder expects {dataset.n_vars}"
        )
    n_windows = len(recording) // dataset.seq_len
    for window in windows:
        if window >= n_windows:
            raise UserError(f"there is no window {window}: {name} has {n_windows}, from 0")
    if not n_windows:
        raise UserError(f"{name} is shorter than a window of {dataset.seq_len} samples")
    return [Place(name, window) for window in windows or range(n_windows)]


def _sequence_maxima(
    steered: SteeredEncoder, features: Sequence[int]
) -> Float[np.ndarray, "sequences features"]:
    """Return the largest activation of each feature in every sequence of the test store."""
    dataset = steered.dataset
    maxima = np.zeros((len(dataset.recording), len(features)), np.float32)
    with progress("find windows", len(maxima), "sequences", delay=2.0) as bar:
        for start, x in dataset.batches(BATCH_SEQUENCES):
            activations = steered.sae.encode_features(x, features)
            maxima[start : start + len(x)] = activations.max(axis=1)
            bar.advance(len(x))
    return maxima


def _strongest_places(
    dataset: Dataset, strength: Float[np.ndarray, " sequences"], count: int
) -> list[Place]:
    """Return the strongest windows, at most two of a recording.

    Recordings with shifted columns come last, since the names of their channels are wrong.
    """
    order = np.lexsort([-strength, dataset.shifted[dataset.recording]])
    n_of_recording = np.zeros(len(dataset.recordings), np.int64)
    places: list[Place] = []
    for sequence in order[strength[order] > 0]:
        recording = int(dataset.recording[sequence])
        window = int(dataset.window[sequence])
        place = Place(dataset.recordings[recording], window)
        if place in places or n_of_recording[recording] == MAX_WINDOWS_PER_RECORDING:
            continue
        places.append(place)
        n_of_recording[recording] += 1
        if len(places) == count:
            break
    return places
