"""The command line: `python -m minsae_jax VERB [flags]`, installed as `minsae`.

Each verb is parsed into its settings, calls its function in `api`, and prints the result.
"""

import sys

import minsae_jax
from minsae_jax.interrupts import exit_during_imports

exit_during_imports()

from minsae_jax import api, cli
from minsae_jax.eeg.prepare.config import PrepareConfig
from minsae_jax.eeg.synthetic import DemoConfig
from minsae_jax.encoder.config import ExtractConfig
from minsae_jax.errors import UserError
from minsae_jax.evaluation.config import EvaluateConfig
from minsae_jax.evaluation.steering.config import SteerConfig
from minsae_jax.integrity.config import VerifyConfig
from minsae_jax.report.view_config import ViewConfig
from minsae_jax.sae.config import PlotConfig, TrainConfig

ABOUT = """
Sparse autoencoders on the activations of EEG transformers, many at a time.

`minsae VERB --help` shows the flags of a verb; `minsae --version` shows the version.
"""


def main(args: list[str]) -> None:
    if args == ["--version"]:
        print(f"minsae_jax {minsae_jax.__version__}")
        return
    run, config = cli.parse_verb(VERBS, args, "minsae", ABOUT)
    run(config)


def demo(config: DemoConfig) -> None:
    """Write synthetic EEG recordings with labelled events, in the layout of the TUH corpus."""
    written = api.write_demo(config)
    if written.is_new:
        print(
            f"wrote {written.n_recordings} recordings of {written.n_patients} patients "
            f"({written.hours:.1f} hours, {written.n_events} planted events) to {written.folder}"
        )
    else:
        print(f"the demo recordings are already in {written.folder}")


def prepare(config: PrepareConfig) -> None:
    """Convert EEG files (EDF, BrainVision, EEGLAB, BIDS, …) into recordings for `extract`."""
    prepared = api.prepare(config)
    for finding in prepared.findings():
        print(finding)
    print(prepared.summary())


def extract(config: ExtractConfig) -> None:
    """Run recordings through the encoder and write the activations of its layers to disk."""
    if config.distributed:
        cli.watch_cluster()
    # A cluster must be joined before the encoder's parameters are put on a device.
    api.start(distributed=config.distributed)
    encoder = api.load_named_encoder(config)
    if encoder is None:
        raise UserError("minsae extract requires --checkpoint_path or --model")
    for store in api.extract(encoder, config):
        status = "already complete" if store.was_complete else "written"
        print(
            f"{store.folder}: {status}, {store.n_windows:,} windows of split {store.split} "
            f"(recordings: {store.n_recordings:,}, patients: {store.n_patients:,}), "
            f"{store.total_tokens:,} tokens of d_model {store.d_model}"
        )


def train(config: TrainConfig) -> None:
    """Train a sweep of sparse autoencoders, one for each combination of λ, lr, seed and size."""
    if config.distributed:
        cli.watch_cluster()
    run = api.train(config)
    status = "already finished" if run.was_finished else "finished"
    print(f"the run {run.folder} is {status}\n{run.summary()}")


def evaluate(config: EvaluateConfig) -> None:
    """Measure a run on held-out recordings, recommend an SAE, and report its features."""
    evaluation = api.evaluate(config)
    print(evaluation.summary())
    if config.report:
        print(f"open {evaluation.inputs.out / 'report' / 'index.html'}")


def steer(config: SteerConfig) -> None:
    """Scale features of an SAE in the encoder, and measure the change of its output and probes."""
    steering = api.steer(config)
    print(steering.summary())
    print(f"open {steering.folder / 'steering.png'}")


def view(config: ViewConfig) -> None:
    """Show features over whole recordings, also ones that were never extracted, in a browser."""
    for page in api.view(config):
        print(f"open {page.path} ({page.n_bytes / 1e6:.1f} MB)")


def plot(config: PlotConfig) -> None:
    """Draw the metrics of a run over its steps, finished or not."""
    files = api.plot(config)
    print(f"wrote {files.metrics} and {files.densities}")


def verify(config: VerifyConfig) -> None:
    """Read all files of stores, encoders, runs, evaluations and recordings, and report damage."""
    verification = api.verify(config)
    problems = verification.problems
    for problem in problems:
        print(problem, file=sys.stderr)
    print(verification.summary())
    if problems:
        sys.exit(2)


VERBS = {
    "demo": cli.Verb(DemoConfig, demo),
    "prepare": cli.Verb(PrepareConfig, prepare),
    "extract": cli.Verb(ExtractConfig, extract),
    "train": cli.Verb(TrainConfig, train),
    "evaluate": cli.Verb(EvaluateConfig, evaluate),
    "steer": cli.Verb(SteerConfig, steer),
    "view": cli.Verb(ViewConfig, view),
    "plot": cli.Verb(PlotConfig, plot),
    "verify": cli.Verb(VerifyConfig, verify),
}


def entry() -> None:
    """Run the installed command `minsae`."""
    cli.run(main)


if __name__ == "__main__":
    entry()
