"""Two commands on the same folders at once: the second one waits, works, or is refused in one line.

The second is called in the middle of the first, in the same process: locks belong to an open
folder, so that two in one process exclude each other as those of two processes do.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

import minsae_jax as ms
from convert.encoder import convert_encoder
from convert.sae import convert_sae
from minsae_jax.activations.writer import StoreWriter
from minsae_jax.encoder.converted import save_encoder
from minsae_jax.integrity.folders import KnownFolder
from minsae_jax.sae.trainer import train
from tests.conftest import FIXTURES

pytestmark = pytest.mark.usefixtures("without_figure")

SPLITS = ("train", "val", "test")
NEW_RUN = "new_run"
# What a message says is in the way
WRITTEN = "is being written by another process"
READ = "is being read by another process"


@dataclass
class Place:
    """Recordings, an encoder, three stores and a finished run, and calls of each verb on them."""

    folder: Path

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def demo(self):
        root_path = self.path("data/tuhab_preprocessed")
        config = ms.DemoConfig(root_path=root_path, patients=10, minutes=0.5, overwrite=True)
        ms.write_demo(config)

    def edf(self):
        source = self.path("source")
        ms.write_demo(ms.DemoConfig(root_path=source, patients=10, minutes=0.5, edf=True))

    def prepare(self):
        config = ms.PrepareConfig(
            source=(self.path("source"),), out=self.path("prepared"), reference=("none",), jobs=1
        )
        ms.prepare(config)

    def extract_prepared(self):
        self._extract("prepared", "other", False)

    def extract(self):
        self._extract("data", "store", False)

    def extract_anew(self):
        self._extract("data", "store", True)

    def _extract(self, root: str, out: str, overwrite: bool):
        config = ms.ExtractConfig(
            root_path=self.path(root),
            checkpoint_path=self.path("encoder"),
            batch_size=4,
            out=self.path(out),
            split=SPLITS,
            overwrite=overwrite,
        )
        ms.extract(ms.load_encoder(self.path("encoder")), config)

    def train_config(self, run: str, overwrite: bool = False) -> ms.TrainConfig:
        return ms.TrainConfig(
            store=self.path("store"),
            run_dir=self.path(run),
            lambda_sparsity=(1.0,),
            feature_dim_factor=(0.5,),
            num_steps=4,
            eval_window=1,
            batch_size=64,
            mesh="1x1",
            overwrite=overwrite,
        )

    def train(self):
        train(self.train_config(NEW_RUN))

    def train_anew(self):
        train(self.train_config("run", overwrite=True))

    def evaluate(self):
        self._evaluate("run")

    def evaluate_new_run(self):
        self._evaluate(NEW_RUN)

    def _evaluate(self, run: str):
        config = ms.EvaluateConfig(
            run=self.path(run),
            store=self.path("store_test"),
            val_store=self.path("store_val"),
            root_path=self.path("data"),
            checkpoint_path=self.path("encoder"),
            substitution_windows=4,
            report=False,
        )
        ms.evaluate(config)

    def steer(self):
        config = ms.SteerConfig(
            run=self.path("run"),
            store=self.path("store_test"),
            val_store=self.path("store_val"),
            root_path=self.path("data"),
            checkpoint_path=self.path("encoder"),
            member="lambda=0.1",
            feature=(0,),
            windows=2,
        )
        ms.steer(config)

    def plot(self):
        ms.plot(ms.PlotConfig(run=self.path("run")))

    def plot_new_run(self):
        ms.plot(ms.PlotConfig(run=self.path(NEW_RUN)))

    def verify(self):
        self._verify("data", "store", "run")

    def verify_new_run(self):
        self._verify(NEW_RUN)

    def verify_prepared(self):
        self._verify("prepared")

    def _verify(self, *names: str):
        problems = ms.verify(ms.VerifyConfig(path=tuple(map(self.path, names)))).problems
        if problems:
            raise ms.UserError(problems[0])

    def convert_encoder(self):
        encoder, _ = convert_encoder(FIXTURES / "tuhab_patch_100/checkpoint.pth")
        save_encoder(self.path("encoder"), encoder)

    def convert_sae(self):
        convert_sae(self.path("run/members/lambda=1"), "saelens", self.path("sae"))


@pytest.fixture
def place(trained, tmp_path) -> Place:
    shutil.copytree(trained.recordings, tmp_path / "data/tuhab_preprocessed")
    shutil.copytree(trained.encoder_folder, tmp_path / "encoder")
    shutil.copytree(trained.run, tmp_path / "run")
    for split in ("", "_val", "_test"):
        store = trained.stores.with_name(trained.stores.name + split)
        shutil.copytree(store, tmp_path / f"store{split}")
    return Place(tmp_path)


def outcomes(place: Place, verbs: dict[str, str | None]) -> dict[str, str | None]:
    """Call verbs and return what refused each: the expected part of a line, or all of the message.

    None where it worked.
    """
    found: dict[str, str | None] = {}
    for verb, expected in verbs.items():
        message = None
        try:
            getattr(place, verb)()
        except ms.UserError as error:
            message = str(error)
        is_expected = message is not None and expected is not None and expected in message
        found[verb] = expected if is_expected else message
    return found


# First verb -> the function in which it is interrupted, and the second verbs with their outcomes
Interrupted = tuple[type, str, dict[str, str | None]]
PAIRS: dict[str, Interrupted] = {
    "demo": (Path, "rename", {"demo": WRITTEN, "extract": WRITTEN, "verify": WRITTEN}),
    "extract_anew": (
        StoreWriter,
        "write",
        {
            "extract": WRITTEN,
            "extract_anew": WRITTEN,
            "train": "is incomplete",
            "demo": READ,
            "verify": WRITTEN,
        },
    ),
    "verify": (
        KnownFolder,
        "check_whole",
        {"demo": READ, "extract": None, "verify": None, "plot": None},
    ),
    "plot": (Path, "replace", {"plot": WRITTEN, "verify": None}),
    "convert_encoder": (Path, "rename", {"convert_encoder": WRITTEN}),
    "convert_sae": (Path, "replace", {"convert_sae": WRITTEN}),
    "prepare": (
        Path,
        "replace",
        {
            "prepare": WRITTEN,
            "extract_prepared": "there is no file_lengths_map.csv",
        },
    ),
    "evaluate": (
        Path,
        "replace",
        {
            "evaluate": WRITTEN,
            "steer": WRITTEN,
            "train_anew": WRITTEN,
            "extract_anew": READ,
            "extract": None,
            "demo": READ,
            "verify": WRITTEN,
            "plot": None,
        },
    ),
    "steer": (
        Path,
        "rename",
        {"steer": WRITTEN, "evaluate": WRITTEN, "train_anew": WRITTEN, "extract_anew": READ},
    ),
}
SLOW = ("prepare", "evaluate", "steer")


@pytest.mark.parametrize(
    "first",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in PAIRS],
)
def test_second_command_works_or_is_refused(place, monkeypatch, first):
    owner, function, seconds = PAIRS[first]
    if first == "prepare":
        pytest.importorskip("mne")
        place.edf()
    original = getattr(owner, function)
    found: dict[str, str | None] = {}

    def interrupted(self, *args: object) -> object:
        monkeypatch.undo()
        found.update(outcomes(place, seconds))
        return original(self, *args)

    monkeypatch.setattr(owner, function, interrupted)
    getattr(place, first)()
    assert found == seconds
    # The first is not disturbed, and has released its locks.
    if first == "prepare":
        place.verify_prepared()
    place.verify()


def test_second_command_during_training(place):
    """The store may be read but not replaced; plots are drawn of a run that is being written."""
    seconds: dict[str, str | None] = {
        "train": WRITTEN,
        "evaluate_new_run": WRITTEN,
        "verify_new_run": WRITTEN,
        "extract": None,
        "extract_anew": READ,
        "plot_new_run": None,
    }
    found: dict[str, str | None] = {}

    def on_step(step: int) -> None:
        if step == 3:
            found.update(outcomes(place, seconds))

    train(place.train_config(NEW_RUN), on_step=on_step)
    assert found == seconds
    place.verify_new_run()
    place.verify()
