"""What features are active on, as arrays and a small table: what the report shows, for one's own analysis.

from minsae_jax.report.features import load_features
found = load_features("runs/mine/members/lambda=5", "stores/mine_test", "tuhab_preprocessed", encoder)
found.activity.top.sequence      # [d_sae, 16], and much else of every feature: see `Activity`
found.describe(12)["spectrum"]   # everything of one
found.table()[:3]                # a dict a feature, the most active first
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minsae_jax.encoder.converted import Encoder
from minsae_jax.evaluation.dataset import Dataset, open_dataset
from minsae_jax.report.describe import Context, describe, make_context
from minsae_jax.report.examples import Activity, Tokens, collect
from minsae_jax.sae.member import load_sae

__all__ = ["Activity", "Dataset", "Features", "Tokens", "load_features"]
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
    "cls",
    "suggestion",
)


@dataclass(frozen=True)
class Features:
    """An autoencoder's features on the tokens of a store."""

    activity: Activity
    context: Context

    def describe(self, feature: int) -> dict[str, Any]:
        """One feature as the report shows it: examples with their EEG, spectrum, channels, neighbours and so on."""
        return describe(self.context, feature)

    def table(self) -> list[dict[str, Any]]:
        """COLUMNS of every feature, the most active first."""
        rows = [self.describe(feature) for feature in range(self.context.sae.d_sae)]
        return sorted(
            ({name: row[name] for name in COLUMNS} for row in rows), key=lambda row: -row["density"]
        )


def load_features(
    member: str | Path, store: str | Path, root_path: str | Path, encoder: Encoder, layer: int | None = None,
    w: int = 10, top: int = 16, per_recording: int = 3,
) -> Features:  # fmt: skip
    """One pass over a store with a member's autoencoder. `root_path` holds the recordings that the store is of; `layer`
    is needed where the folder holds several. Raises UserError where they do not fit one another."""
    sae = load_sae(member)
    dataset = open_dataset(store, layer, encoder.architecture, root_path)
    activity = collect(dataset, sae, top, per_recording)
    return Features(activity, make_context(dataset, sae, activity, encoder, w))
