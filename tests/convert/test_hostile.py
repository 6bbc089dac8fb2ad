"""Hostile files: each is converted correctly or refused with one line.

No code from a file runs, and memory stays close to the size of the file.
"""

import contextlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import threading
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import minsae_jax as ms
from convert import verify
from convert.encoder import convert, read_source
from convert.patchtst.weights import settings_of
from minsae_jax import UserError
from tests.conftest import FIXTURES
from tests.random_encoder import BASE, random_state_dict
from tests.samples import sample

TINY = replace(
    BASE,
    n_vars=2,
    seq_len=20,
    patch_len=4,
    stride=4,
    n_layers=1,
    d_model=8,
    n_heads=2,
    d_ff=8,
    pos_dim=8,
    target_dim=4,
)
GIB = 1 << 30


def good_checkpoint() -> bytes:
    content = io.BytesIO()
    torch.save({"model_state_dict": random_state_dict(TINY), "config": settings_of(TINY)}, content)
    return content.getvalue()


GOOD = good_checkpoint()


class Call:
    """An object that is pickled as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def lying_tensor(size, stride):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.save has no other way to name a storage
        storage = torch.zeros(8).storage()
    return Call(torch._utils._rebuild_tensor_v2, storage, 0, size, stride, False, OrderedDict())


def rewritten(pickled: bytes) -> bytes:
    """Return the good checkpoint with another data.pkl and valid checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(GOOD)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, pickled if entry.endswith("data.pkl") else old.read(entry))
    return out.getvalue()


def write_bomb(path: Path) -> None:
    """Write a small archive whose pickle is a text of 3 GiB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/version", "3")
        with archive.open("archive/data.pkl", "w", force_zip64=True) as f:
            f.write(b"\x80\x02X" + struct.pack("<I", 3 * GIB - 1))
            for _ in range(3 * 64):
                f.write(bytes(GIB // 64))
    assert path.stat().st_size < 20 << 20


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Return a folder of hostile files."""
    folder = tmp_path_factory.mktemp("hostile")

    def save(name, content):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(content, folder / name)

    touch = Call(os.system, f"touch {folder}/hacked")
    (folder / "raw_pickle.pth").write_bytes(pickle.dumps(touch))
    save("call.pth", {"model_state_dict": random_state_dict(TINY), "config": touch})
    save("call_as_state.pth", touch)
    (folder / "nested.pth").write_bytes(rewritten(pickle.dumps({"model_state_dict": touch})))
    with zipfile.ZipFile(folder / "zip_in_zip.pth", "w") as archive:
        archive.writestr("archive/data.pkl", (folder / "call.pth").read_bytes())
    write_bomb(folder / "bomb.pth")
    # central directory: the size of the first entry, at 24 bytes after its signature
    directory = GOOD.index(b"PK\x01\x02")
    (folder / "large_part.pth").write_bytes(
        GOOD[: directory + 20] + struct.pack("<II", 0xFFFFFF00, 0xFFFFFF00) + GOOD[directory + 28 :]
    )
    state = random_state_dict(TINY)
    for name, tensor in {
        "repeated": torch.zeros(1).expand(10**6, 10**6),
        "too_large": lying_tensor((10**6, 10**6), (10**6, 1)),
        "negative": lying_tensor((4, 2), (-2, 1)),
        "beyond": lying_tensor((4, 4), (4, 1)),
        "sparse": torch.sparse_coo_tensor(
            torch.zeros(1, 1, dtype=torch.int64), torch.ones(1), (2**40,), check_invariants=True
        ),
        "meta": torch.zeros(10**6, 10**6, device="meta"),
        "numpy": np.zeros(4),
    }.items():
        save(f"{name}.pth", {"model_state_dict": state | {"backbone.W_P.weight": tensor}})
    save("bytes.pth", {"model_state_dict": state, "config": Call(bytearray, 50 * GIB)})
    scalar = np.float64(0).__reduce__()[0]
    save(
        "scalar.pth",
        {"model_state_dict": state, "config": Call(scalar, Call(np.dtype, f"V{2 * GIB - 1}"))},
    )
    save("deep.pth", {"model_state_dict": state, "config": {"model": {"stride": nested(100)}}})
    good = {"model_state_dict": state, "config": settings_of(TINY)}
    save("many_channels.pth", good | {"config": settings_of(TINY) | {"data": {"n_vars": 10**12}}})
    for name, change in {
        "empty": lambda t: t[:0] if t.ndim else t,
        "infinite": lambda t: t * torch.inf,
        "double": lambda t: t.double() * 1e300,
        "complex": lambda t: t.to(torch.complex64),
    }.items():
        save(f"{name}.pth", good | {"model_state_dict": {k: change(v) for k, v in state.items()}})
    layers = {k.replace("layers.0", "layers.999999999"): v for k, v in state.items()}
    save("many_layers.pth", good | {"model_state_dict": state | layers})
    for tenth in range(10):
        (folder / f"cut{tenth}.pth").write_bytes(GOOD[: len(GOOD) * tenth // 10])
    for name, header in {"header": struct.pack("<Q", 50 * GIB), "shape": hostile_header()}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        (folder / name / "model.safetensors").write_bytes(header + b"{}")
    save_file({"a": np.zeros(1000, np.float32)}, folder / "good.safetensors")
    whole = (folder / "good.safetensors").read_bytes()
    for tenth in range(10):
        (folder / f"safe{tenth}").mkdir()
        (folder / f"safe{tenth}/config.json").write_text("{}")
        (folder / f"safe{tenth}/model.safetensors").write_bytes(whole[: len(whole) * tenth // 10])
    (folder / "good.safetensors").unlink()
    return folder


def nested(depth):
    value: list = []
    for _ in range(depth):
        value = [value, value]  # 2 ** depth when written out
    return value


def hostile_header() -> bytes:
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}}
    ).encode()
    return struct.pack("<Q", len(header)) + header


RUN = """
import json, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from convert.__main__ import main
from minsae_jax import cli
from minsae_jax.errors import UserError
messages = {}

def convert_all(_):
    for path in sorted(Path(sys.argv[1]).iterdir()):
        try:
            main(["encoder", str(path), "--out", sys.argv[2]])
            messages[path.name] = None
        except UserError as e:
            messages[path.name] = str(e)

cli.run(convert_all, [])
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(line for line in lines if line.startswith("VmHWM"))
print("RESULT" + json.dumps([messages, int(peak.split()[1])]))
"""


@pytest.mark.slow
def test_hostile_files_are_refused_with_one_line(hostile, tmp_path):
    command = [sys.executable, "-c", RUN, str(hostile), str(tmp_path / "encoder")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    messages, peak_kib = json.loads(run.stdout.partition("RESULT")[2])
    assert peak_kib < 2 * GIB / 1024
    assert len(messages) == len(list(hostile.iterdir())) > 40
    for name, message in messages.items():
        assert message is not None, name
        assert "\n" not in message, name
        assert 20 < len(message) < 700, (name, message)
    assert not (hostile / "hacked").exists()
    assert list(tmp_path.iterdir()) == []
    assert "contains code or objects" in messages["call.pth"]
    assert "compressed" in messages["bomb.pth"]
    assert "exceed the file" in messages["large_part.pth"]
    assert "larger than their stored numbers" in messages["repeated.pth"]
    assert "far more memory" in messages["bytes.pth"]
    assert "infinity" in messages["infinite.pth"]
    assert "infinity" in messages["double.pth"]
    assert "n_vars must be" in messages["many_channels.pth"]


def test_other_threads_get_memory_while_an_encoder_is_loaded(tmp_path):
    (tmp_path / "x.pth").write_bytes(GOOD)
    is_loading = True
    failures = []

    def allocate() -> None:
        while is_loading:
            try:
                # Not touched, so that it is address space only.
                np.empty(3 * GIB, np.uint8)
            except MemoryError as e:
                failures.append(e)

    thread = threading.Thread(target=allocate)
    thread.start()
    try:
        for _ in range(20):
            ms.load_encoder(tmp_path / "x.pth")
    finally:
        is_loading = False
        thread.join()
    assert failures == []


def test_hostile_recordings_are_refused(tmp_path):
    (tmp_path / "good.pth").write_bytes(GOOD)
    encoder, _ = convert(read_source(tmp_path / "good.pth"))
    np.save(
        tmp_path / "objects.npy",
        np.array([Call(os.system, f"touch {tmp_path}/hacked")]),
        allow_pickle=True,
    )
    np.save(tmp_path / "good.npy", np.zeros((100, 2), np.float32))
    good = (tmp_path / "good.npy").read_bytes()
    (tmp_path / "large.npy").write_bytes(good.replace(b"(100, 2)", b"(9999999999, 2)"))
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "empty.npy").write_bytes(b"")
    np.savez(tmp_path / "archive.npz", a=np.zeros(3))
    np.save(tmp_path / "channels.npy", np.zeros((100, 3), np.float32))
    np.save(tmp_path / "nan.npy", np.full((100, 2), np.nan, np.float32))
    assert verify.read_windows(encoder, str(tmp_path / "good.npy")).shape == (4, 20, 2)
    for name in (
        "objects.npy",
        "large.npy",
        "text.npy",
        "empty.npy",
        "archive.npz",
        "channels.npy",
        "nan.npy",
        "no",
    ):
        with pytest.raises(UserError, match=name):
            verify.read_windows(encoder, str(tmp_path / name))
    assert not (tmp_path / "hacked").exists()


def mutated(good: bytes, changes) -> bytes:
    content = bytearray(good)
    for place, kind, value in changes:
        at = int(place * len(content))
        if kind == "set":
            content[at : at + 1] = bytes([value])
        elif kind == "flip":
            content[at : at + 1] = (
                bytes([content[at] ^ 1 << value % 8]) if at < len(content) else b""
            )
        elif kind == "cut":
            del content[at : at + value]
        else:
            content[at:at] = content[at : at + value]
    return bytes(content)


MUTATIONS = sample(250, 1000)
CHANGES = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["set", "flip", "cut", "double"]),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)
with zipfile.ZipFile(io.BytesIO(GOOD)) as _archive:
    PICKLE = next(_archive.read(n) for n in _archive.namelist() if n.endswith("data.pkl"))


@settings(max_examples=MUTATIONS, deadline=None, database=None, derandomize=True)
@given(where=st.sampled_from(["file", "pickle", "pickle"]), changes=CHANGES)
def mutation(path: Path, seen: dict[str, int], where, changes):
    """Change bytes anywhere in the file (mostly seen by checksums), or in the pickle alone."""
    path.write_bytes(
        mutated(GOOD, changes) if where == "file" else rewritten(mutated(PICKLE, changes))
    )
    try:
        source = read_source(path)
        encoder, _ = convert(source)
    except UserError as e:
        seen["refused"] += len(str(e).splitlines()) == 1
        return
    windows = np.random.default_rng(0).normal(
        size=(1, encoder.architecture.seq_len, encoder.architecture.n_vars)
    )
    for d in verify.verify(encoder, source.checkpoint.tensors, windows.astype(np.float32)):
        assert (
            d.passes or not np.isfinite(d.sd) or d.largest < 1e-4 * d.sd
        )  # a changed weight may be huge
    seen["converted"] += 1


@pytest.mark.slow
def test_mutated_files_are_refused_or_converted_correctly(tmp_path):
    seen = {"refused": 0, "converted": 0}
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mutation(tmp_path / "x.pth", seen)
    assert sum(seen.values()) >= MUTATIONS
    assert min(seen.values()) > MUTATIONS // 50, seen
    assert _memory("VmHWM") - before < GIB


def _memory(name: str) -> int:
    """Return a memory figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def test_truncated_checkpoints_are_refused(tmp_path):
    good = (FIXTURES / "layernorm_prenorm/checkpoint.pth").read_bytes()
    for tenth in range(10):
        (tmp_path / "x.pth").write_bytes(good[: len(good) * tenth // 10])
        with pytest.raises(UserError, match="not a PyTorch checkpoint, or it is damaged"):
            read_source(tmp_path / "x.pth")


def change_settings(**changes):
    config = settings_of(TINY)
    return {"data": config["data"] | changes, "model": config["model"] | changes}


COUNTER = "backbone.encoder.layers.0.norm_attn.1.num_batches_tracked"


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({COUNTER: torch.tensor([7])}, {}, "num_batches_tracked is not a number"),
        ({COUNTER: torch.tensor(torch.nan)}, {}, "num_batches_tracked is not a number"),
        (
            {"backbone.W_pos": torch.zeros(6, 3)},
            {},
            r"W_pos is \[6, 3\], but must be 1 or d_model \(8\) wide",
        ),
        ({}, {"n_vars": 3_000_000}, "are too large"),
        ({}, {"seq_len": 10**9, "stride": 2 * 10**8}, "are too large"),
        (
            {},
            {"subtract_last": torch.zeros(3)},
            r"subtract_last must be true or false, got tensor",
        ),
        ({}, {"subtract_last": "maybe"}, "subtract_last must be true or false"),
        ({}, {"stride": 10**5000}, "stride must be a whole number|it is damaged"),
        (dict.fromkeys(map(str, range(300)), torch.zeros(2000)), {}, "share so much storage"),
    ],
)
def test_invalid_settings_and_tensors_are_refused(tmp_path, tensors, settings, message):
    state = random_state_dict(TINY) | tensors
    torch.save(
        {"model_state_dict": state, "config": change_settings(**settings)}, tmp_path / "x.pth"
    )
    with pytest.raises(UserError, match=message):
        convert(read_source(tmp_path / "x.pth"))


def merges(levels: int) -> str:
    """Return YAML in which each mapping merges the one before it nine times."""
    lines = [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, levels)]
    return "\n".join(["a0: &a0 {x: 1}", *lines])


@pytest.mark.parametrize(
    "text",
    [
        "seq_len: !!int",
        "seq_len: !!bool xyz",
        "seq_len: !!timestamp abc",
        "seq_len: 0x" + "f" * 5000,
        "[" * 100_000,
    ],
    ids=range(5),
)
def test_hostile_yaml_is_refused(tmp_path, text):
    (tmp_path / "x.pth").write_bytes(GOOD)
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError) as e:
        read_source(tmp_path / "x.pth", tmp_path / "x.yaml")
    assert len(str(e.value)) < 500


def test_nested_merges_of_yaml_stay_small(tmp_path):
    """They are refused, or read by a PyYAML that merges each key once (6.0.4)."""
    (tmp_path / "x.pth").write_bytes(GOOD)
    (tmp_path / "x.yaml").write_text(merges(12))
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    with contextlib.suppress(UserError):
        read_source(tmp_path / "x.pth", tmp_path / "x.yaml")
    assert _memory("VmHWM") - before < GIB / 4
