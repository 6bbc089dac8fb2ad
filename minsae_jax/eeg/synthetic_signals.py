"""Synthetic scalp EEG with planted events.

A recording is a background of spatially mixed pink-noise sources plus events with known times and
channels, so features of an autoencoder can be compared with them. The demo encoder was pretrained
on recordings of this generator.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from minsae_jax.eeg.events import Event
from minsae_jax.eeg.montage import CHANNELS, POSITIONS
from minsae_jax.eeg.recordings import SAMPLING_RATE

MIN_SAMPLES = 400  # longer than every event
EVENTS_PER_MINUTE = 6.0  # of each kind
N_SOURCES = 10  # of the background, mixed over the scalp


class EventKind(NamedTuple):
    """How one kind of event is planted."""

    name: str
    length: int  # samples
    weights: Float[np.ndarray, "19"]  # amplitude on each channel
    wave: Callable[[int, np.random.Generator], np.ndarray]  # (length, rng) -> course in time


def field(x: float, y: float, width: float) -> Float[np.ndarray, "19"]:
    """Return a Gaussian scalp field centred at (x, y): one weight per channel."""
    squared_distance = (POSITIONS[:, 0] - x) ** 2 + (POSITIONS[:, 1] - y) ** 2
    return np.exp(-squared_distance / (2 * width * width))


def pink(
    rng: np.random.Generator, channels: int, samples: int
) -> Float[np.ndarray, "channels samples"]:
    """Return noise of SD 1 whose amplitude is proportional to frequency ** -0.9."""
    hz = np.fft.rfftfreq(samples, 1 / SAMPLING_RATE)
    real = rng.normal(size=(channels, hz.size))
    imaginary = rng.normal(size=(channels, hz.size))
    spectrum = real + 1j * imaginary
    # Flat below 0.5 Hz, or slow drifts would outweigh everything else.
    spectrum /= np.maximum(hz, 0.5) ** 0.9
    spectrum[:, 0] = 0
    noise = np.fft.irfft(spectrum, samples, axis=1)
    return noise / noise.std(1, keepdims=True)


def _sine(hz: float, samples: int, phase: float = 0.0) -> np.ndarray:
    angle = 2 * np.pi * hz * np.arange(samples) / SAMPLING_RATE + phase
    return np.hanning(samples) * np.sin(angle)


def _event_kinds(alpha_hz: float, spindle_hz: float) -> list[EventKind]:
    def alpha(n: int, rng: np.random.Generator) -> np.ndarray:
        return 3 * _sine(alpha_hz, n, rng.uniform(0, 6))

    def spindle(n: int, rng: np.random.Generator) -> np.ndarray:
        return 2.5 * _sine(spindle_hz, n)

    def slow_wave(n: int, rng: np.random.Generator) -> np.ndarray:
        # One period over the whole length, the trough first.
        return -4 * _sine(SAMPLING_RATE / n, n)

    def blink(n: int, rng: np.random.Generator) -> np.ndarray:
        return 7 * np.hanning(n)

    def spike(n: int, rng: np.random.Generator) -> np.ndarray:
        # 80 ms of one sign, then a slower wave of the other, as after an epileptic spike.
        return 7 * np.concatenate([np.hanning(8), -0.45 * np.hanning(n - 8)])

    def muscle(n: int, rng: np.random.Generator) -> np.ndarray:
        return 2.2 * rng.normal(size=n) * np.hanning(n)

    return [
        EventKind("alpha", 250, field(0.0, -0.95, 0.5), alpha),
        EventKind("spindle", 100, field(0.0, 0.2, 0.5), spindle),
        EventKind("slow_wave", 120, field(0.0, 0.5, 0.6), slow_wave),
        EventKind("blink", 35, field(0.0, 1.05, 0.35), blink),
        EventKind("spike", 30, field(-1.0, 0.05, 0.35), spike),
        EventKind("muscle", 80, field(1.0, 0.1, 0.4), muscle),
    ]


def recording(
    seed: int | list[int], samples: int, spindle_factor: float = 1.0
) -> tuple[Float[np.ndarray, "samples 19"], list[Event]]:
    """Return a recording, z-scored per channel, and its events in order of time.

    spindle_factor: times the usual number of spindles. Additional ones are added after the z-score,
    so that nothing else differs from the recording without them: in a z-score over everything, more
    spindles would make all other waves smaller. The same seed gives the same
    recording: the order of the random draws must not change.
    """
    rng = np.random.default_rng(seed)
    # Short recordings are cut out of a longer one, which every event fits into.
    n = max(samples, MIN_SAMPLES)
    fields = []
    for _ in range(N_SOURCES):
        x_position = rng.uniform(-1, 1)
        y_position = rng.uniform(-1, 1)
        fields.append(field(x_position, y_position, rng.uniform(0.3, 0.8)))
    # Sources mixed over the scalp, and independent noise at every channel: [19, n].
    mixing = np.stack(fields, axis=1)
    sources = pink(rng, N_SOURCES, n)
    noise = pink(rng, len(CHANNELS), n)
    x = mixing @ sources + 0.3 * noise

    alpha_hz = rng.uniform(8.5, 11.5)
    spindle_hz = rng.uniform(12, 14)
    kinds = _event_kinds(alpha_hz, spindle_hz)
    events = []
    for kind in kinds:
        events += _plant(x, kind, 1.0, rng)
    mean = x[:, :samples].mean(1, keepdims=True)
    sd = x[:, :samples].std(1, keepdims=True)
    if spindle_factor > 1:
        spindles = next(kind for kind in kinds if kind.name == "spindle")
        events += _plant(x, spindles, spindle_factor - 1, rng)

    x = (x[:, :samples] - mean) / sd
    inside = [event for event in events if event.start < samples]
    cut = [replace(event, stop=min(event.stop, samples)) for event in inside]
    return x.T.astype(np.float32), sorted(cut, key=lambda event: event.start)


def _plant(
    x: Float[np.ndarray, "19 n"], kind: EventKind, rate: float, rng: np.random.Generator
) -> list[Event]:
    """Add events of a kind to x, `rate` times the usual number, and return them."""
    is_strong = kind.weights >= kind.weights.max() / 2
    # Those with at least half of the largest amplitude
    channels = tuple(np.array(CHANNELS)[is_strong].tolist())
    n = x.shape[1]
    count = rng.poisson(rate * EVENTS_PER_MINUTE * n / SAMPLING_RATE / 60)
    events = []
    for start in rng.integers(0, n - kind.length, count).tolist():
        stop = start + kind.length
        wave = kind.wave(kind.length, rng)
        x[:, start:stop] += np.outer(kind.weights, wave)
        events.append(Event(kind.name, start, stop, channels))
    return events
