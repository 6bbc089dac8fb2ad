"""All verbs on small data in one process, in the folder given as the first argument.

It is a program of its own, so that tests can start it in odd surroundings. A second argument is a
file for what would be printed; "jumping" as the third lets the clock jump.
"""

import sys
import time
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def jumping(clock: Callable[[], float]) -> Callable[[], float]:
    """Return a clock that goes five minutes back at every third look, and then forth again.

    Orbax gives up a save that seems to take over ten minutes, in one line.
    """
    looks = count()

    def read() -> float:
        late = next(looks) % 3 == 0
        return clock() - 300 * late

    return read


def commands(folder: Path) -> list[tuple[str, ...]]:
    """Return every verb's command line; paths contain the name of the folder."""
    data = str(folder / "data")
    encoder = str(folder / "encoder")
    store = str(folder / "store")
    run = str(folder / "run")
    checkpoint = str(ROOT / "tests/fixtures/tuhab_patch_100/checkpoint.pth")
    source = str(folder / "source")
    recordings = str(folder / "recordings")
    train = (
        *(
            "train",
            "--store",
            store,
            "--checkpoint_path",
            encoder,
            "--run_dir",
            run,
            "--lr",
            ".003",
        ),
        *("--lambda_sparsity", "0.1", "1", "--feature_dim_factor", "0.5", "--num_steps", "8"),
        *("--batch_size", "256", "--eval_window", "4", "--checkpoint_every", "4"),
    )
    splits = ("--split", "train", "val", "test", "--batch_size", "4", "--max_batches", "6")
    return [
        ("demo", "--root_path", data, "--patients", "10", "--minutes", ".5"),
        ("demo", "--root_path", source, "--patients", "10", "--minutes", ".5", "--edf"),
        ("prepare", source, "--out", recordings, "--reference", "none"),
        ("convert", "encoder", checkpoint, "--out", encoder),
        ("extract", "--root_path", data, "--checkpoint_path", encoder, "--out", store, *splits),
        (*train, "--eval_every", "8"),
        ("evaluate", "--run", run, "--root_path", data),
        ("plot", "--run", run),
        ("convert", "sae", f"{run}/members/lambda=1", "--to", "saelens", "--out", f"{run}/sae"),
        ("verify", str(folder)),
    ]


def main() -> None:
    folder, log, *clock = sys.argv[1:]
    if clock:
        time.time = jumping(time.time)
    try:
        import convert.__main__
        from minsae_jax import cli
        from minsae_jax.__main__ import main as minsae

        for words in commands(Path(folder)):
            if words[0] == "convert":
                cli.run(convert.__main__.main, list(words[1:]))
            else:
                cli.run(minsae, list(words))
    except BaseException:
        Path(log).write_text(traceback.format_exc(), encoding="utf-8", errors="replace")
        raise


if __name__ == "__main__":
    main()
