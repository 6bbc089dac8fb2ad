"""Small valid files of every format, written by hand as the documentation describes them."""

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CHANNELS = ("Fp1", "Resp Belt", "O2")
PATIENTS = 10
SAMPLES = 400
D_MODEL = 8


def names() -> list[str]:
    return [f"patient{i}_s001_t000_preprocessed.npy" for i in range(PATIENTS)]


def write_recordings(folder: Path) -> Path:
    """Write recordings with their four tables."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lengths = ["filename,time_len"]
    events = ["recording,event,start,stop,channels"]
    labels = ["recording,patient,age,sex"]
    for i, name in enumerate(names()):
        samples = rng.normal(size=(SAMPLES, len(CHANNELS)))
        np.save(folder / name, samples.astype(np.float32))
        lengths.append(f"{name},{SAMPLES}")
        events.append(f'{name},spike,{10 * i},{10 * i + 20},"Fp1 ""Resp Belt"""')
        labels.append(f"{name},,{20 + i}.5,{'mf'[i % 2]}")
    for table, lines in {
        "file_lengths_map": lengths,
        "events": events,
        "labels": labels,
    }.items():
        (folder / f"{table}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "dataset.json").write_text(json.dumps(description(), indent=1), encoding="utf-8")
    return folder


def description() -> dict:
    recording = {
        "source": "night λ.edf",
        "mean_uv": [0.5, -1.0, 2.0],
        "sd_uv": [10.0, 20.0, 30.5],
        "bad_channels": ["O2"],
        "interpolated_channels": [],
        "original_sampling_rate": 256.0,
        "duration": 2.0,
    }
    return {
        "format_version": 1,
        "sampling_rate": 200.0,
        "channels": list(CHANNELS),
        "positions": [[-0.03, 0.08, 0.02], None, [0.03, -0.09, 0.01]],
        "unit": "SD",
        "preparation": {"settings": {"low": 0.5}, "versions": {"mne": "1.8"}},
        "recordings": dict.fromkeys(names()[:2], recording),
    }


def write_store(folder: Path) -> Path:
    """Write two shards of sequences of two tokens with manifest, provenance and grid."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    shards = []
    for number in range(2):
        path = folder / f"b{number:04d}.npy"
        np.save(path, rng.normal(size=(15, 2, D_MODEL)).astype(np.float32))
        content = path.read_bytes()
        shards.append(
            {
                "file": path.name,
                "shape": [15, 2, D_MODEL],
                "rows": 30,
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )
    data = {
        "split": "test",
        "split_seed": 42,
        "seq_len": 100,
        "patch_len": 50,
        "n_vars": len(CHANNELS),
        "revin": True,
        "n_windows": 10,
        "recordings_sha256": "0" * 64,
        "skipped": {},
        "sampling_rate": 200.0,
        "channels": list(CHANNELS),
    }
    manifest = {
        "format_version": 1,
        "complete": True,
        "layer": -1,
        "layer_index": 2,
        "dtype": "float32",
        "n_tokens": 2,
        "d_model": D_MODEL,
        "encoder": "f" * 64,
        "data": data,
        "shards": shards,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    np.savez(
        folder / "provenance.npz",
        recordings=np.array(names()),
        shifted=np.zeros(PATIENTS, bool),
        recording=np.repeat(np.arange(PATIENTS), 3),
        window=np.zeros(30, np.int64),
        channel=np.tile(np.arange(3), PATIENTS),
    )
    np.savez(
        folder / "tokens.npz",
        channel=np.array([-1, -1]),
        first=np.array([0, 50]),
        last=np.array([49, 99]),
    )
    return folder


def write_member(folder: Path) -> Path:
    """Write a ReLU autoencoder without a checksum, as earlier versions did."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(2)
    shapes = {"W_enc": (4, 6), "b_enc": (6,), "W_dec": (6, 4), "b_dec": (4,)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(arrays, folder / "sae.safetensors")
    (folder / "config.json").write_text(json.dumps({"kind": "relu", "lambda_sparsity": 5.0}))
    return folder


TREE = {
    "extract": {
        "root_path": "tuhab_preprocessed",
        "checkpoint_path": "checkpoints/mine",
        "cache_layer": [-1, 0],
        "split": ["train", "val"],
        "dtype": "float32",
        "max_batches": 5,
    },
    "train": {
        "recipe": "april2024",
        "lambda_sparsity": [2, 5.5],
        "lr": ["auto", 1e-3],
        "seed": [0, 1],
        "kind": ["relu", "topk"],
        "k": 16,
        "num_steps": 1000,
        "live": False,
        "run_dir": "runs/mine",
    },
    "demo": {"root_path": "data", "patients": 12, "minutes": 0.5},
    "plot": {"run": "runs/mine"},
    "evaluate": {"run": "runs/mine", "root_path": "data", "report": True},
}
YAML = """\
extract:
  root_path: "tuhab_preprocessed"  # with λ
  cache_layer: [-1, 0]
  split: [train, val]
  dtype: float32
train: &a
  lambda_sparsity: [2, 5.5]
  lr: 1e-3
  seed:
    - 0
    - 1
  num_steps: 1_000
  run_dir: 'runs/mine'
demo: {root_path: data, patients: 12, minutes: .5}
"""
COMMANDS = [
    ["extract", "--root_path", "data", "--checkpoint_path", "x", "--cache-layer", "-1", "0"],
    [
        "train",
        "--store=embeddings/store",
        "--lambda_sparsity",
        "1",
        "2.5",
        "--lr",
        "1e-3",
        "--wandb",
    ],
    ["evaluate", "--run", "runs/demo", "--root_path", "data", "--no_report"],
    ["demo", "--root_path", "data", "--minutes", ".5", "--patients", "10"],
    ["plot", "--run", "runs/demo"],
    ["steer", "--run", "runs/demo", "--root_path", "data", "--feature", "3", "5"],
    ["view", "x.npy", "y.npy", "--member", "runs/demo/members/lambda=5", "--out", "views"],
    ["verify", "a", "b"],
    ["prepare", "x.edf", "--out", "y"],
]
