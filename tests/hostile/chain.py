"""All verbs on small data in one process: a program that `surroundings` starts."""

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def jumping(clock: Callable[[], float]) -> Callable[[], float]:
    """Return a clock that goes back by an hour at every 40th look.

    Not forth: Orbax gives up a save that seems to take many minutes.
    """
    looks = count()

    def read() -> float:
        return clock() - 3600 * (next(looks) // 40)

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
    parser = argparse.ArgumentParser(prog="tests/hostile/chain.py", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("log", type=Path, help="file for the traceback of an error")
    parser.add_argument("--jumping", action="store_true", help="let the clock jump")
    parser.add_argument("--verbs", nargs="+", help="only these")
    args = parser.parse_args()
    if args.jumping:
        time.time = jumping(time.time)
    try:
        import convert.__main__
        from minsae_jax import cli
        from minsae_jax.__main__ import main as minsae

        for words in commands(args.folder):
            if args.verbs and words[0] not in args.verbs:
                continue
            if words[0] == "convert":
                cli.run(convert.__main__.main, list(words[1:]))
            else:
                cli.run(minsae, list(words))
    except BaseException:
        args.log.write_text(traceback.format_exc(), encoding="utf-8", errors="replace")
        raise


if __name__ == "__main__":
    main()
