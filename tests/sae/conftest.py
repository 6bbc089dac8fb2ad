"""A short run of four members on the small store, and the CSV files of another run.

It runs on one device, which compiles fastest; tests of meshes choose their own.
"""

import numpy as np
import pytest
import yaml
from PIL import Image

from minsae_jax.sae import logger
from minsae_jax.sae.config import TrainConfig

INTERVALS = 70


@pytest.fixture(autouse=True)
def quick_runs(shared_programs):
    """Share programs, and do not draw pareto.png, which takes as long as many steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logger, "draw_pareto", lambda path, *_: Image.new("1", (8, 6)).save(path))
        yield


@pytest.fixture
def settings(small_store, tmp_path):
    return TrainConfig(
        store=str(small_store),
        run_dir=str(tmp_path / "run"),
        lambda_sparsity=(0.1, 3.0),
        lr=(3e-3,),
        num_steps=40,
        feature_dim_factor=(2.0, 3.0),
        batch_size=32,
        eval_window=8,
        checkpoint_every=10,
        mesh="1x1",
    )


@pytest.fixture
def plain_run(tmp_path):
    """Two members of 8 and 16 features, 3 of them never active.

    A log interval is 1,000 tokens, the last one 500.
    """
    folder = tmp_path / "run"
    rng = np.random.default_rng(0)
    tokens = np.minimum(1000 * np.arange(1, INTERVALS + 1), 1000 * INTERVALS - 500)
    for d_sae in (16, 8):
        member = folder / f"members/lambda=10,d_sae={d_sae}"
        member.mkdir(parents=True)
        l1 = "nan" if d_sae == 16 else "2"
        metrics = ["step,tokens,loss,mse,l1"]
        active = ["step," + ",".join(f"feat_{i}" for i in range(d_sae))]
        for i, total in enumerate(tokens):
            metrics.append(f"{10 * (i + 1)},{total},1,{1 / (i + 1)},{l1}")
            counts = [total, 0, 0, 0, *rng.integers(1, 501, d_sae - 3)]
            active.append(",".join(map(str, counts)))
        (member / "metrics.csv").write_text("\r\n".join(metrics) + "\r\n", newline="")
        (member / "act_freqs.csv").write_text("\r\n".join(active) + "\r\n", newline="")
    train = {"recipe": "minsae", "lambda_sparsity": [10.0], "lr": [0.001]}
    train |= {"feature_dim_factor": [2.0, 1.0]}
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": train}))
    return folder
