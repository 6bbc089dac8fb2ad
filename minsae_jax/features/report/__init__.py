"""The report that an EEG researcher opens from disk: a page that needs neither network nor server."""

from minsae_jax.features.report.write import write_report

__all__ = ["write_report"]
