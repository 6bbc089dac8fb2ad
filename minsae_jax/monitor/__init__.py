"""Progress bars, tables, CSV files, TensorBoard and W&B."""

from minsae_jax.monitor.csv_log import append_rows, start_csv
from minsae_jax.monitor.frequencies import ACT_FREQS_NPY, open_table
from minsae_jax.monitor.member_log import METRICS, MemberLog
from minsae_jax.monitor.progress_bar import Bar, progress
from minsae_jax.monitor.tables import percent, short_count, size_text, table, wrap
from minsae_jax.monitor.tensorboard import TFEVENTS_PREFIX, RunLog
from minsae_jax.monitor.throughput import Throughput
from minsae_jax.monitor.wandb_log import Wandb

__all__ = [
    "ACT_FREQS_NPY",
    "METRICS",
    "TFEVENTS_PREFIX",
    "Bar",
    "MemberLog",
    "RunLog",
    "Throughput",
    "Wandb",
    "append_rows",
    "open_table",
    "percent",
    "progress",
    "short_count",
    "size_text",
    "start_csv",
    "table",
    "wrap",
]
