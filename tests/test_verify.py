"""`verify`: one flipped byte in any file is reported with the file, or has no effect."""

import pickle
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import minsae_jax as ms
from minsae_jax.__main__ import main
from minsae_jax.checksums import SUMS
from minsae_jax.eeg.splits import read_splits
from minsae_jax.errors import UserError
from minsae_jax.sae.config import load_run_config
from minsae_jax.sae.trainer import train

N_POSITIONS = 6
# Orbax's own notes on a checkpoint, which are not read to resume.
WITHOUT_EFFECT = ("_CHECKPOINT_METADATA", "commit_success.txt")


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory) -> Path:
    """A folder with recordings, an encoder, stores and an evaluated run."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(trained.recordings, folder / "data/tuhab_preprocessed")
    shutil.copytree(trained.encoder_folder, folder / "encoder")
    shutil.copytree(trained.run, folder / "run")
    for split in ("", "_val", "_test"):
        store = trained.stores.with_name(trained.stores.name + split)
        shutil.copytree(store, folder / f"store{split}")
    config = ms.EvaluateConfig(
        run=str(folder / "run"),
        store=str(folder / "store_test"),
        root_path=str(folder / "data"),
        checkpoint_path=str(folder / "encoder"),
        substitution_windows=4,
        report_features=8,
        top=4,
    )
    ms.evaluate(config)
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def problems(*paths: Path) -> list[str]:
    return ms.verify(ms.VerifyConfig(path=tuple(map(str, paths)))).problems


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def files_below(folder: Path) -> list[Path]:
    """Return the files that damage must be found in."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    return [path for path in paths if path.name not in WITHOUT_EFFECT]


def same_arrays(first: Path, second: Path) -> bool:
    try:
        with first.open("rb") as file, np.load(file) as arrays:
            changed = dict(arrays)
    except Exception:
        return False
    with np.load(second) as arrays:
        original = dict(arrays)
    same_names = changed.keys() == original.keys()
    # As bytes, since NaN differs from itself.
    return same_names and all(changed[n].tobytes() == original[n].tobytes() for n in original)


def test_evaluation_outside_its_run(finished, tmp_path):
    """As `evaluate --out` writes it."""
    for name in ("evaluation.json", "evaluation.csv", "report", SUMS):
        source = finished / "run" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    lines = (tmp_path / SUMS).read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.split(maxsplit=1)[1].startswith(("evaluation.j", "rep"))]
    (tmp_path / SUMS).write_text("".join(kept))
    (verified,) = ms.verify(ms.VerifyConfig(path=(str(tmp_path),))).folders
    assert (verified.kind, verified.problems) == ("evaluation", ())
    flip(tmp_path / "report/index_data.js", 100)
    (problem,) = problems(tmp_path)
    assert problem.endswith("differs from its checksum: remove it, then rerun `evaluate`")


def test_finished_files_are_fine(finished):
    verification = ms.verify(ms.VerifyConfig(path=(str(finished),)))
    assert verification.problems == []
    kinds = [verified.kind for verified in verification.folders]
    assert kinds == ["recordings", "encoder", "run", "store", "store", "store"]
    # Those have checksums in their formats, or are not read to resume.
    for verified in verification.folders:
        for path in verified.without_checksum:
            has_own = path.suffix in (".npz", ".pkl") or "tfevents" in path.name
            assert has_own or path.name in WITHOUT_EFFECT


# Files with checksums of others are damaged while the others are not.
@pytest.mark.parametrize("group", [SUMS, "manifest.json", None])
def test_a_flipped_byte_in_any_file_is_named(finished, copy, group):
    rng = np.random.default_rng(0)
    files = [path for path in files_below(copy) if path.name == group]
    if group is None:
        files = [path for path in files_below(copy) if path.name not in (SUMS, "manifest.json")]
        kinds = {path.suffix for path in files}
        assert kinds >= {".npy", ".npz", ".json", ".csv", ".yaml", ".safetensors", ".png", ".js"}
    for i in range(N_POSITIONS):
        for path in files:
            size = path.stat().st_size
            # The first and the last byte, and others between them.
            position = {0: 0, 1: size - 1}.get(i, int(rng.integers(size)))
            flip(path, position, int(rng.integers(8)))
        found = problems(copy)
        for path in files:
            original = finished / path.relative_to(copy)
            lines = [line for line in found if line.startswith(f"{path} ")]
            if path.name == SUMS:
                # The line that differs is that of another file, or there is no such file.
                assert any(line.startswith(str(path.parent)) for line in found)
            elif path.suffix == ".npz" and not lines:
                # The zip format has bytes without meaning, such as times.
                assert same_arrays(path, original)
            elif path.suffix == ".pkl" and not lines:
                # A pickle has them too.
                assert read_splits(path) == read_splits(original)
            else:
                assert len(lines) == 1, path
                assert ": " in lines[0]
            shutil.copyfile(original, path)
    assert problems(copy) == []


def test_files_of_users_beside_recordings_are_only_read(tmp_path):
    np.save(tmp_path / "p1_s001_t000.npy", np.zeros((100, 2), np.float32))
    (tmp_path / "file_lengths_map.csv").write_text("filename,time_len\np1_s001_t000.npy,100\n")
    (tmp_path / "notes.csv").write_text("date,note\n1 May\n")
    (tmp_path / "ages.pkl").write_bytes(pickle.dumps({"p1": 40}))
    (tmp_path / "log.json").write_text('{"line": 1}\n{"line": 2}\n')
    (tmp_path / "params.yaml").write_text("rate: !hertz 100\n")
    assert problems(tmp_path) == []
    (tmp_path / "events.csv").write_text("recording,event,start,stop,channels\nhalf a row\n")
    (problem,) = problems(tmp_path)
    assert problem.startswith(f"{tmp_path / 'events.csv'} is damaged (line 2 has 1 columns, not 5)")


def test_files_of_earlier_versions_are_read_in_full(copy, finished):
    """Without SHA256SUMS, formats with checksums of their own still find a flipped byte."""
    for path in copy.rglob(SUMS):
        path.unlink()
    assert problems(copy) == []
    suffixes = (".npz", ".png", ".safetensors")
    files = [p for p in files_below(copy) if p.suffix in suffixes]
    files += [p for p in files_below(copy) if p.match("b[0-9][0-9][0-9][0-9].npy")]
    files += [p for p in files_below(copy) if "tfevents" in p.name]
    for path in files:
        flip(path, path.stat().st_size // 2)
    found = problems(copy)
    for path in files:
        if path.suffix == ".npz" and same_arrays(path, finished / path.relative_to(copy)):
            continue
        assert [line for line in found if line.startswith(f"{path} ")], path


def test_damaged_weights_are_not_loaded_and_are_exported_again(copy, trained):
    member = copy / "run/members/lambda=1"
    before = {path.name: path.read_bytes() for path in member.iterdir()}
    flip(member / "sae.safetensors", -1)
    with pytest.raises(UserError, match=r"sae\.safetensors differs from its checksum"):
        ms.load_sae(member)
    (line,) = problems(copy)
    assert "remove sweep.csv, then rerun `train`" in line
    (copy / "run/sweep.csv").unlink()
    resume(copy, trained)
    after = {path.name: path.read_bytes() for path in member.iterdir()}
    for name in ("sae.safetensors", "config.json", "metrics.csv", "act_freqs.csv"):
        assert after[name] == before[name], name
    assert problems(copy) == []


def resume(copy: Path, trained) -> None:
    config = load_run_config(copy / "run")
    # The store is found by its fingerprint; members record its path.
    train(replace(config, run_dir=str(copy / "run")), trained.encoder.fingerprint)


def test_damaged_checkpoint_is_not_resumed(copy, trained):
    (copy / "run/sweep.csv").unlink()
    (step,) = (path for path in (copy / "run/checkpoints").iterdir() if path.is_dir())
    largest = max((step / "state").rglob("*"), key=lambda path: path.stat().st_size)
    flip(largest, largest.stat().st_size // 2)
    with pytest.raises(UserError, match=f"{largest.name} differs from its checksum"):
        resume(copy, trained)


def test_files_without_a_checksum_in_a_checkpoint_have_no_effect(copy, trained):
    weights = copy / "run/members/lambda=1/sae.safetensors"
    before = weights.read_bytes()
    rng = np.random.default_rng(3)
    for path in (copy / "run/checkpoints").glob("*/*"):
        if path.name in WITHOUT_EFFECT:
            flip(path, int(rng.integers(path.stat().st_size)), int(rng.integers(8)))
    (copy / "run/sweep.csv").unlink()
    weights.unlink()
    resume(copy, trained)
    assert weights.read_bytes() == before


def test_remedies_of_a_store_write_the_same_bytes(copy, finished, trained):
    store = copy / "store/l-1"
    config = ms.ExtractConfig(
        root_path=str(copy / "data"),
        checkpoint_path=str(copy / "encoder"),
        batch_size=4,
        out=str(copy / "store"),
    )
    expected = {path.name: path.read_bytes() for path in store.iterdir()}
    for removed in (("b0001.npy",), ("provenance.npz",), ("tokens.npz", "provenance.npz")):
        flip(store / removed[0], 200)
        (line,) = problems(store)
        for name in removed:
            assert name in line
            (store / name).unlink()
        ms.extract(trained.encoder, config)
        assert {path.name: path.read_bytes() for path in store.iterdir()} == expected
    flip(store / "manifest.json", 30)
    assert "--overwrite" in problems(store)[0]
    ms.extract(trained.encoder, replace(config, overwrite=True))
    assert {path.name: path.read_bytes() for path in store.iterdir()} == expected


def test_damaged_saved_measures_are_measured_again(copy, trained):
    """Any flipped byte is noticed by zip's checksums, whatever error the libraries raise."""
    from minsae_jax.evaluation.saved import load_part

    path = copy / "run/evaluation/lambda=1.tokens.npz"
    with np.load(path) as content:
        key = str(content["key"])
        arrays = {name: content[name] for name in content.files if name != "key"}
    rng = np.random.default_rng(2)
    original = path.read_bytes()
    n_refused = 0
    for position in rng.choice(len(original), 200, replace=False).tolist():
        flip(path, position, int(rng.integers(8)))
        loaded = load_part(copy / "run", "lambda=1", "tokens", key)
        if loaded is None:
            n_refused += 1
        else:
            for name, array in arrays.items():
                np.testing.assert_array_equal(loaded[name], array)
        path.write_bytes(original)
    assert n_refused > 0


def test_command_prints_problems_and_a_table(copy, capsys):
    main(["verify", str(copy / "run"), str(copy / "encoder")])
    assert "fine" in capsys.readouterr().out
    flip(copy / "run/config.yaml", 10)
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(copy / "run")])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"{copy / 'run/config.yaml'} differs from its checksum: restore it")
    assert "damaged" in printed.out


def test_checksums_are_those_of_sha256sum(finished):
    if shutil.which("sha256sum") is None:
        pytest.skip("requires sha256sum")
    for path in finished.rglob(SUMS):
        command = ["sha256sum", "--check", "--strict", "--quiet", SUMS]
        subprocess.run(command, cwd=path.parent, check=True)


def test_missing_and_unknown_folders_are_errors(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        problems(tmp_path / "missing")
    with pytest.raises(UserError, match="does not contain a store"):
        problems(tmp_path)


def test_checksums_do_not_lead_out_of_their_folder(copy):
    sums = copy / "encoder" / SUMS
    for name in ("/dev/zero", "../run/config.yaml"):
        sums.write_text(f"{'0' * 64}  {name}\n")
        assert problems(copy / "encoder") == [
            f"{sums} is damaged: remove it, since nothing else needs it"
        ]
