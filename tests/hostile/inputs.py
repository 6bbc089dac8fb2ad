"""Every input that a user can write by hand or get from others: how it is generated and read."""

import contextlib
import dataclasses
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import convert.__main__
from convert.encoder import convert as convert_encoder
from convert.encoder import read_source
from minsae_jax.__main__ import VERBS
from minsae_jax.cli import parse_verb
from minsae_jax.eeg.description import read_description
from minsae_jax.eeg.prepare.config import PrepareConfig
from minsae_jax.eeg.prepare.labels import read_labels as read_prepare_labels
from minsae_jax.eeg.prepare.sources import Source
from minsae_jax.eeg.recordings import WindowShape, find_windows
from minsae_jax.eeg.splits import patient_of
from minsae_jax.evaluation.dataset import open_dataset
from minsae_jax.evaluation.events import read_events
from minsae_jax.evaluation.labels import read_labels
from minsae_jax.report.naming import read_feature_labels
from minsae_jax.sae.member import load_sae
from minsae_jax.settings import load_values
from tests.conftest import FIXTURES
from tests.hostile import mutations, valid
from tests.hostile.attempt import Tally, attempt

SECTIONS = {name: verb.settings for name, verb in VERBS.items()}
ENCODER = FIXTURES / "layernorm_prenorm"
SHAPE = WindowShape(100, 50, len(valid.CHANNELS))


@dataclass(frozen=True)
class Input:
    """One kind of input.

    prepare: makes a folder with valid files and returns the one that is replaced. cases: generates
    contents of this file, from the valid one. read: reads it in all ways that commands do.
    """

    prepare: Callable[[Path], Path]
    cases: Callable[[bytes], st.SearchStrategy]
    read: Callable[[Path], object]
    names: str = ""  # what an error contains; the name of the file by default

    def run(self, folder: Path, examples: int) -> Tally:
        """Read the valid file, then generated ones; returns what happened to these."""
        path = self.prepare(folder)
        content = path.read_bytes()
        # Also imports what is imported late, which audits would notice.
        self.read(path)
        tally = Tally()

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(self.cases(content))
        def check(case: bytes) -> None:
            path.write_bytes(case)
            attempt(partial(self.read, path), self.names or path.name, tally)

        check()
        return tally


class Flags:
    """The words of a command line, of either program."""

    def run(self, folder: Path, examples: int) -> Tally:
        tally = Tally()
        flags = {f"--{name}" for cls in SECTIONS.values() for name in _fields(cls)}
        words = mutations.command_lines(valid.COMMANDS, sorted(flags))
        (folder / "some.yaml").write_text(valid.YAML, encoding="utf-8")

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(words, st.sampled_from(("minsae", "minsae", "convert")))
        def check(words: list[str], program: str) -> None:
            attempt(partial(_parse, program, words), "", tally)

        before = Path.cwd()
        os.chdir(folder)
        try:
            for words in valid.COMMANDS:
                _parse("minsae", words)
            check()
        finally:
            os.chdir(before)
        return tally


def _fields(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _parse(program: str, words: list[str]) -> None:
    """Parse a command line; --help ends the process with exit code 0."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            if program == "minsae":
                parse_verb(VERBS, words, "minsae", "")
            else:
                parse_verb(convert.__main__.VERBS, words, "convert", "", has_config=False)
    except SystemExit as end:
        code = end.code
        assert code == 0
        assert out.getvalue().startswith("usage: ")


def _config(folder: Path) -> Path:
    path = folder / "mine.yaml"
    path.write_text(valid.YAML, encoding="utf-8")
    return path


def _encoder_yaml(folder: Path) -> Path:
    path = folder / "encoder.yaml"
    path.write_bytes((ENCODER / "config.yaml").read_bytes())
    return path


def _read_encoder(path: Path) -> None:
    encoder, _ = convert_encoder(read_source(ENCODER / "checkpoint.pth", path))
    assert encoder.architecture.d_model > 0


def _recordings(table: str, folder: Path) -> Path:
    return valid.write_recordings(folder / "data") / table


def _read_windows(path: Path) -> None:
    windows, bad = find_windows(path.parent, "all", 42, SHAPE)
    assert set(windows.files) | set(bad) >= set(valid.names())
    assert windows.read(0, 2).shape[1:] == (100, len(valid.CHANNELS))


def _read_splits(path: Path) -> None:
    windows, bad = find_windows(path.parent, "all", 42, SHAPE)
    assert set(windows.files) | set(bad) <= set(valid.names())


def _read_events(path: Path) -> None:
    for events in read_events(path.parent).values():
        for event in events:
            # They become int64 later.
            assert 0 <= np.int64(event.start) < np.int64(event.stop)
            assert all(0 <= channel < len(valid.CHANNELS) for channel in event.channels)


def _read_labels(path: Path) -> None:
    for label in read_labels(path.parent, valid.names()):
        assert np.isfinite(label.values).all()
    config = PrepareConfig(source=("x.edf",), out="out", labels=str(path))
    name = valid.names()[0]
    source = Source(Path("x.edf"), "x.edf", name, "x.edf", patient_of(name))
    read_prepare_labels(config, [source])


def _feature_labels(folder: Path) -> Path:
    path = folder / "labels.csv"
    path.write_text('feature,label,note\n0,spike,sure\n7,"slow, wave",\n', encoding="utf-8")
    return path


def _read_description(path: Path) -> None:
    description = read_description(path.parent)
    assert np.isfinite(description.sampling_rate)
    assert len(description.channels) == len(description.positions) > 0
    for name in valid.names():
        scale = description.uv_per_unit(name)
        assert scale is None or scale.shape == (len(description.channels),)


def _store(folder: Path) -> Path:
    valid.write_recordings(folder / "data")
    return valid.write_store(folder / "store/l-1") / "manifest.json"


def _read_store(path: Path) -> None:
    dataset = open_dataset(path.parent, None, None, path.parents[2] / "data")
    assert dataset.store.read_rows(0, 4).shape == (4, valid.D_MODEL)


def _in_store(name: str, folder: Path) -> Path:
    return _store(folder).with_name(name)


def _splits(folder: Path) -> Path:
    data = valid.write_recordings(folder / "data")
    find_windows(data, "all", 42, SHAPE)
    return data / "tuh_patient_splits_seed_42.pkl"


def _member_config(folder: Path) -> Path:
    return _member(folder).with_name("config.json")


def _member(folder: Path) -> Path:
    return valid.write_member(folder / "member") / "sae.safetensors"


def _read_member(path: Path) -> None:
    sae = load_sae(path.parent)
    assert sae.params["W_enc"].shape == (sae.d_model, sae.d_sae)
    assert np.isfinite(np.asarray(sae.params["W_dec"])).all()


INPUTS: dict[str, Input | Flags] = {
    "YAML of a command": Input(
        _config,
        lambda content: mutations.yaml_files(content, valid.TREE),
        lambda path: load_values(path, SECTIONS),
    ),
    "YAML of an encoder": Input(
        _encoder_yaml,
        lambda content: mutations.yaml_files(content, {"data": {"n_vars": 2}, "model": {}}),
        _read_encoder,
        "YAML",  # a command has one of an encoder
    ),
    "flags": Flags(),
    "file_lengths_map.csv": Input(
        partial(_recordings, "file_lengths_map.csv"), mutations.csv_files, _read_windows
    ),
    "events.csv": Input(partial(_recordings, "events.csv"), mutations.csv_files, _read_events),
    "labels.csv": Input(partial(_recordings, "labels.csv"), mutations.csv_files, _read_labels),
    "labels.csv of a report": Input(
        _feature_labels, mutations.csv_files, partial(read_feature_labels, d_sae=8)
    ),
    "dataset.json": Input(
        partial(_recordings, "dataset.json"), mutations.json_files, _read_description
    ),
    "manifest.json": Input(_store, mutations.json_files, _read_store, "store/l-1"),
    "shard": Input(partial(_in_store, "b0001.npy"), mutations.changed_bytes, _read_store),
    "provenance.npz": Input(
        partial(_in_store, "provenance.npz"), mutations.changed_bytes, _read_store
    ),
    "tokens.npz": Input(partial(_in_store, "tokens.npz"), mutations.changed_bytes, _read_store),
    "patient splits": Input(_splits, mutations.changed_bytes, _read_splits),
    "sae.safetensors": Input(_member, mutations.safetensors_files, _read_member),
    "config.json of an SAE": Input(_member_config, mutations.json_files, _read_member),
}
