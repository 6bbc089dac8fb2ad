"""The command line: `python -m minsae_jax VERB [flags]`, installed as `minsae`.

Each verb is parsed into its settings, calls its function in `api`, and prints the result.
"""

from pathlib import Path

import minsae_jax
from minsae_jax import api, cli
from minsae_jax.eeg.synthetic import DemoConfig
from minsae_jax.encoder.config import ExtractConfig
from minsae_jax.evaluation.config import EvaluateConfig
from minsae_jax.sae.config import PlotConfig, TrainConfig

ABOUT = """
Sparse autoencoders on the activations of EEG transformers, many at a time.

`minsae VERB --help` shows the flags of a verb; `minsae --version` shows the version.
"""


def main(args: list[str]) -> None:
    if args == ["--version"]:
        print(f"minsae_jax {minsae_jax.__version__}")
    else:
        cli.call_verb(VERBS, args, "minsae", ABOUT)


def demo(config: DemoConfig) -> None:
    """Write synthetic EEG recordings with labelled events, in the layout of the TUH corpus."""
    print(api.write_demo(config))


def extract(config: ExtractConfig) -> None:
    """Run recordings through the encoder and write the activations of its layers to disk."""
    # A cluster must be joined before the encoder's parameters are put on a device.
    api.start(distributed=config.distributed)
    encoder = api.load_encoder(str(config.checkpoint_path), config.config_path)
    for line in api.extract(encoder, config):
        print(line)


def train(config: TrainConfig) -> None:
    """Train a sweep of sparse autoencoders, one for each combination of λ, lr, seed and size."""
    print(api.train(config))


def evaluate(config: EvaluateConfig) -> None:
    """Measure a run on held-out recordings, recommend an SAE, and report its features."""
    evaluation = api.evaluate(config)

    from minsae_jax.evaluation.evaluate import summary

    print(summary(evaluation))
    if config.report:
        print(f"open {Path(str(config.run)) / 'report' / 'index.html'}")


def plot(config: PlotConfig) -> None:
    """Draw the metrics of a run over its steps, finished or not."""
    print(api.plot(config))


VERBS = {
    "demo": cli.Verb(DemoConfig, demo),
    "extract": cli.Verb(ExtractConfig, extract),
    "train": cli.Verb(TrainConfig, train),
    "evaluate": cli.Verb(EvaluateConfig, evaluate),
    "plot": cli.Verb(PlotConfig, plot),
}


def entry() -> None:
    """Run the installed command `minsae`."""
    cli.run(main)


if __name__ == "__main__":
    entry()
