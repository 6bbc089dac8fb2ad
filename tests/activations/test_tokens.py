"""Places of tokens: against the samples that move them, their file, and stores without one."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from minsae_jax import TokenGrid, UserError
from minsae_jax.activations.tokens import TOKENS, read_tokens
from minsae_jax.encoder.patchtst.encoder import PatchTSTEncoder
from minsae_jax.encoder.patchtst.model import PatchTST, patches
from minsae_jax.evaluation.dataset import open_dataset
from tests.random_encoder import BASE


@pytest.mark.parametrize(
    "change",
    [
        {"seq_len": 53},  # the first three samples are in no patch
        {"use_cls_token": False, "stride": 8},
        {"end_padding": 6, "leftover": "end"},
    ],
    ids=str,
)
def test_grid_of_patchtst_is_that_of_the_samples_that_move_its_tokens(change):
    a = replace(BASE, n_layers=1, **change)
    model = PatchTST(a, rngs=nnx.Rngs(0))

    @jax.jit
    def embedded(x):
        return model.embed(patches(a, x))

    still = embedded(jnp.zeros((1, a.seq_len, a.n_vars)))
    one_moved = jnp.zeros((a.seq_len, a.seq_len, a.n_vars))
    one_moved = one_moved.at[jnp.arange(a.seq_len), jnp.arange(a.seq_len), 1].set(1.0)
    moves = np.asarray(jnp.abs(embedded(one_moved) - still).max(-1) > 0)  # [sample, channel, token]
    assert not moves[:, [0, 2]].any()
    grid = PatchTSTEncoder(a, nnx.to_pure_dict(nnx.state(model))).spec.tokens
    sample = np.arange(a.seq_len)[:, None]
    expected = (grid.first >= 0) & (grid.first <= sample) & (sample <= grid.last)
    # Padding copies the last sample, so that it moves every token that reaches beyond the window.
    expected[-1] |= grid.last >= a.seq_len
    np.testing.assert_array_equal(moves[:, 1], expected)


def test_starts_and_slots():
    grid = TokenGrid.patches(3, patch_len=10, stride=5, first_sample=2, n_channels=2, n_cls=1)
    assert grid.located.tolist() == [1, 2, 3, 4, 5, 6]
    assert grid.starts.tolist() == [2, 7, 12]
    assert grid.slot.tolist() == [-1, 0, 1, 2, 0, 1, 2]
    assert (grid.step, grid.longest) == (5, 10)
    uneven = TokenGrid(*map(np.array, ([-1, -1, -1], [0, 10, 30], [9, 19, 39])))
    assert (uneven.step, uneven.mean_step) == (None, 15)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (([0, 0], [0, 5], [4, 4]), "token 1 has channel 0 and samples 5 to 4"),
        (([0, -2], [0, 5], [4, 9]), "token 1 has channel -2"),
        (([0], [-1], [4]), "expected first <= last"),
        (([0], [-1], [-1]), "no token has samples"),
    ],
)
def test_wrong_arrays_are_refused(arrays, message):
    with pytest.raises(UserError, match=message):
        TokenGrid(*map(np.array, arrays))


def test_file_contains_the_grid(tmp_path):
    assert read_tokens(tmp_path) is None
    grid = TokenGrid.patches(3, patch_len=10, n_channels=2, n_cls=1)
    grid.write(tmp_path)
    read = read_tokens(tmp_path)
    for name in ("channel", "first", "last"):
        np.testing.assert_array_equal(getattr(read, name), getattr(grid, name))
    (tmp_path / TOKENS).write_bytes(b"PK")
    with pytest.raises(UserError, match=r"tokens.npz is damaged"):
        read_tokens(tmp_path)


def test_store_of_an_earlier_version_gets_its_grid_from_the_encoder(trained, tmp_path):
    source = trained.stores.with_name("store_test") / "l-1"
    folder = shutil.copytree(source, tmp_path / "store/l-1")
    written = read_tokens(folder)
    (folder / TOKENS).unlink()
    dataset = open_dataset(folder, -1, trained.encoder, trained.recordings)
    for name in ("channel", "first", "last"):
        np.testing.assert_array_equal(getattr(dataset.tokens, name), getattr(written, name))
    with pytest.raises(UserError, match=r"no tokens.npz.*--checkpoint_path"):
        open_dataset(folder, -1, None, trained.recordings)
