"""Feature cards and statistics of a trained SAE for your own analysis, as the report shows them.

from minsae_jax.report.features import load_features
features = load_features(
    "runs/mine/members/lambda=5", "stores/mine_test", "tuhab_preprocessed", encoder
)
features.activity.top.sequence   # [d_sae, 16]; see `Activity` for all fields
features.describe(12).spectrum   # see `FeatureCard` for all fields
features.table()[:3]             # one dict per feature, the most active first
features.examples_table(12)      # one dict per example

Both tables are rows for `csv.DictWriter` or `pandas.DataFrame`.
"""

from dataclasses import dataclass
from pathlib import Path

from minsae_jax.encoder.base import BaseEncoder
from minsae_jax.evaluation.dataset import Dataset, open_dataset
from minsae_jax.report.context import Context
from minsae_jax.report.describe import FeatureCard, describe, describe_all
from minsae_jax.report.examples import Activity, Tokens, collect
from minsae_jax.report.excerpts import Example, shown_samples
from minsae_jax.sae.member import check_features, load_sae

__all__ = ["Activity", "Dataset", "FeatureCard", "Features", "Tokens", "load_features"]
COLUMNS = (
    "id",
    "density",
    "mean",
    "max",
    "channel",
    "band",
    "patients",
    "patient_share",
    "artefact",
    "artefact_top",
    "cls",
    "suggestion",
    "support",
)


@dataclass(frozen=True)
class Features:
    """The features of an SAE on the tokens of a store."""

    activity: Activity
    context: Context

    def __repr__(self) -> str:
        # Without the arrays, which a notebook would print in full.
        d_sae = self.context.sae.d_sae
        return f"{type(self).__name__}({d_sae} features, {self.activity.n_tokens} tokens)"

    def describe(self, feature: int) -> FeatureCard:
        """Return the card of one feature: its examples with EEG, spectrum, channels and so on.

        Raises UserError if there is no such feature.
        """
        check_features(self.context.sae, [feature])
        return describe(self.context, feature)

    def table(self) -> list[dict[str, int | float | str]]:
        """Return COLUMNS of every feature, the most active first."""
        cards = sorted(describe_all(self.context), key=lambda card: -card.density)
        return [{name: getattr(card, name) for name in COLUMNS} for card in cards]

    def examples_table(self, feature: int) -> list[dict[str, int | float | str]]:
        """Return a row for each example of a feature, in the order of the card.

        start and stop are those of the active patch in its recording, or of the EEG shown for a
        token without a patch, in seconds; `source` is the EEG file that the recording was made
        from, "" if unknown, and source_start the start in it. `events` are those that overlap the
        EEG shown, with start and stop in seconds, and with their channels unless these are all;
        `other_features` have their activations.
        """
        return [self._example_row(feature, example) for example in self.describe(feature).examples]

    def _example_row(self, feature: int, example: Example) -> dict[str, int | float | str]:
        seconds = len(example.trace) / self.context.dataset.sampling_rate
        start, stop = example.patch or (example.start, example.start + seconds)
        dataset = self.context.dataset
        source, cut_off = dataset.description.origin(example.recording)
        events = []
        for event in example.events:
            words = [f"{event.kind} {event.start:g}-{event.stop:g}"]
            if len(event.channels) < dataset.n_vars:
                words += event.channels
            events.append(" ".join(words))
        others = [f"{other} {activation:g}" for other, activation in example.other_features]
        return {
            "feature": feature,
            "group": example.group,
            "activation": example.activation,
            "recording": example.recording,
            "patient": example.patient,
            "channel": example.channel,
            "start": start,
            "stop": stop,
            "source": source,
            "source_start": start + cut_off,
            "artefact_hints": "; ".join(example.hints),
            "events": "; ".join(events),
            "other_features": "; ".join(others),
        }


def load_features(
    member: str | Path,
    store: str | Path,
    root_path: str | Path,
    encoder: BaseEncoder | None = None,
    layer: int | None = None,
    w: int = 10,
    top: int = 16,
    per_recording: int = 3,
) -> Features:
    """Read a store once with a member's SAE.

    root_path: folder of the recordings that the store was extracted from. encoder: for the
    waveforms, and for stores without tokens.npz. layer: needed if the store's folder contains
    several. w: patches shown before and after an example's patch. top, per_recording: number of
    strongest examples of a feature, and of them from one recording.

    Raises UserError if member, store, recordings and encoder do not belong together.
    """
    sae = load_sae(member)
    dataset = open_dataset(store, layer, encoder, root_path)
    activity = collect(dataset, sae, top, per_recording, n_samples=shown_samples(dataset, w))
    return Features(activity, Context(dataset, sae, activity, encoder, w))
