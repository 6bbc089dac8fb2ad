"""Conversion of CBraMod: forms it is read from, settings it takes, and what it refuses."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from convert import verify
from convert.__main__ import main
from convert.encoder import convert, convert_encoder, read_source
from minsae_jax import UserError
from tests.conftest import FIXTURES

SOURCE = FIXTURES / "cbramod"
FLAGS = {"n_vars": 4, "seq_len": 600, "n_heads": 4}


@pytest.fixture
def state():
    return load_file(SOURCE / "model.safetensors")


@pytest.fixture
def from_state(tmp_path):
    """from_state(state dict, flags) converts a .pth file of it."""

    def run(state, flags=FLAGS, **kwargs):
        torch.save(state, tmp_path / "x.pth")
        return convert(read_source(tmp_path / "x.pth", flags=flags, **kwargs)).encoder

    return run


@pytest.fixture
def edited_folder(tmp_path):
    """edited_folder(key=value) is Braindecode's folder with another config."""

    def edit(**changes):
        folder = tmp_path / "edited"
        shutil.copytree(SOURCE, folder, dirs_exist_ok=True)
        config = json.loads((SOURCE / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return edit


def test_command_converts_and_verifies_a_folder_of_braindecode(tmp_path, capsys):
    out = tmp_path / "encoder"
    main(["encoder", str(SOURCE), "--verify", "--out", str(out)])
    printed = capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert config["source_program"] == "cbramod"
    assert config["sources"]["n_heads"] == "config.json"
    assert config["sources"]["d_model"] == "state dict"
    n_parameters = sum(t.numel() for t in load_file(SOURCE / "model.safetensors").values())
    assert f"{n_parameters:,} parameters" in printed
    assert "600 samples x 4 channels in µV / 100 at 200 Hz -> 12 tokens" in printed
    rows = [line.split()[:-3] for line in printed.splitlines() if re.search(r"e-0\d ", line)]
    assert rows == [["layer", "0"], ["layer", "1"], ["layer", "2"], ["head"]]


def test_verification_fails_for_wrong_weights():
    source = read_source(SOURCE)
    encoder = convert(source).encoder
    tensors = dict(source.checkpoint.tensors)
    tensors["encoder.layers.1.linear2.bias"] = tensors["encoder.layers.1.linear2.bias"] + 1e-3
    differences = verify.verify(encoder, tensors, verify.read_windows(encoder, None))
    assert [d.passes for d in differences] == [True, False, False, False]


def test_names_of_all_programs_give_the_same_encoder(from_state, state):
    """The authors' file, DataParallel, and fine-tuned models of the authors and Braindecode."""
    expected = convert_encoder(SOURCE).encoder.fingerprint
    assert from_state(state).fingerprint == expected
    assert from_state({f"module.{k}": t for k, t in state.items()}).fingerprint == expected
    assert from_state({"model_state_dict": state}).fingerprint == expected
    task_head = {"final_layer.1.weight": torch.zeros(2, 3)}
    assert from_state(state | task_head).fingerprint == expected
    backbone = {f"backbone.{k}": t for k, t in state.items()}
    fine_tuned = from_state(backbone | {"classifier.0.weight": torch.zeros(2, 3)})
    assert fine_tuned.fingerprint == expected


def test_encoder_beside_that_of_a_fine_tuned_model_is_refused(from_state, state):
    with pytest.raises(UserError, match="contains several CBraMods, one in 'backbone'"):
        from_state(state | {f"backbone.{k}": t + 1 for k, t in state.items()})


def test_head_is_optional(from_state, state):
    without = {key: tensor for key, tensor in state.items() if not key.startswith("proj_out.")}
    encoder = from_state(without)
    assert not encoder.architecture.has_head
    assert encoder.reconstruction is None
    assert encoder.waveform(np.ones(40, np.float32)) is None
    assert from_state(state, without_head=True).fingerprint == encoder.fingerprint
    with pytest.raises(UserError, match="no reconstruction head"):
        encoder(np.zeros((1, 600, 4), np.float32))


def test_flags_precede_the_config_of_the_folder():
    source = read_source(SOURCE, flags={"n_vars": 30, "seq_len": 2000})
    assert source.sources["n_vars"] == "flags"
    assert source.sources["n_heads"] == "config.json"
    spec = convert(source).encoder.spec
    assert (spec.n_vars, spec.seq_len, spec.n_sequences) == (30, 2000, 1)
    assert spec.sampling_rate == 200
    tokens = spec.tokens
    assert tokens.channel.tolist() == [channel for channel in range(30) for _ in range(10)]
    assert tokens.first[:10].tolist() == list(range(0, 2000, 200))
    assert (tokens.last - tokens.first == 199).all()


def test_all_wrong_keys_are_in_one_error(from_state, state):
    del state["encoder.layers.1.norm2.bias"]
    state["encoder.layers.2.norm3.bias"] = torch.zeros(3)
    state["encoder.layers.0.self_attn_s.in_proj_bias"] = torch.zeros(5)
    state["patch_embedding.proj_in.3.weight"] = torch.zeros(5, 5, 3)
    state["encoder.layers.2.linear1.bias"][0] = float("nan")
    with pytest.raises(UserError) as e:
        from_state(state)
    for message in (
        "nothing fills layers/1/norm_ff/bias",
        "unknown key encoder.layers.2.norm3.bias",
        "in_proj_bias is float32[5]",
        "proj_in.3.weight is float32[5, 5, 3]",
        "layers.2.linear1.bias contains NaN",
    ):
        assert message in str(e.value)


def test_settings_that_make_no_cbramod_are_refused(from_state, state):
    for flags, message in (
        ({}, "another size than the published one: add --n_heads"),
        (FLAGS | {"seq_len": 700}, "seq_len 700 is not a multiple of the patch length 200"),
        (FLAGS | {"n_heads": 5}, "n_heads 5 must be even and divide d_model 40"),
        (FLAGS | {"n_vars": 1 << 25}, "are too large"),
        (FLAGS | {"stride": 3}, "--stride does not apply to CBraMod"),
    ):
        with pytest.raises(UserError, match=message):
            from_state(state, flags)
    with pytest.raises(UserError, match="--program do not apply"):
        from_state(state, program="supervised")
    mask = {"patch_embedding.mask_encoding": torch.zeros(200)}
    with pytest.raises(UserError, match=r"has no .*proj_in.0.weight, so it is not a"):
        from_state(mask)


def test_other_variants_of_braindecode_are_refused(edited_folder):
    for changes, message in (
        ({"activation": "torch.nn.modules.activation.ReLU"}, "activation .*ReLU.* not supported"),
        ({"channels_kernel_stride_padding_norm": [[5, 49, 50, 24, [5, 5]]]}, "convolutions"),
        ({"n_times": "long"}, "seq_len must be a whole number above 0, got 'long'"),
    ):
        with pytest.raises(UserError, match=message):
            convert_encoder(edited_folder(**changes))


def test_export_to_pytorch_is_refused(tmp_path):
    with pytest.raises(UserError, match="only PatchTST encoders can be written"):
        main(["encoder", str(SOURCE), "--to", "pytorch", "--out", str(tmp_path / "x.pth")])
    assert list(tmp_path.iterdir()) == []


def test_mutated_state_dicts_are_one_line_or_converted(from_state, state):
    rng = np.random.default_rng(0)
    n_refused = 0
    for _ in range(150):
        mutated = dict(state)
        for key in rng.choice(sorted(state), size=int(rng.integers(1, 4)), replace=False):
            mutate(mutated, key, rng)
        try:
            from_state(mutated)
        except UserError:  # always one line
            n_refused += 1
    assert n_refused > 100


def mutate(state, key, rng):
    tensor = state[key]
    mutants = [
        None,
        tensor[None],
        tensor.flatten(),
        torch.zeros(0),
        tensor[:-1],
        tensor.repeat(2, *[1] * (tensor.ndim - 1)),
        tensor.to(torch.int32),
        torch.full_like(tensor, float("inf")),
    ]
    mutant = mutants[rng.integers(len(mutants))]
    if mutant is None:
        del state[key]
    else:
        state[key] = mutant
