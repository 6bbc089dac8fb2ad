"""The command line: `python -m minsae_jax VERB [--config FILE] [flags]`, installed as `minsae`.

verbs:
  demo      write synthetic EEG with planted, labelled events
  extract   run recordings through the encoder and store the activations of its layers
  train     train a sweep of sparse autoencoders on a store
  evaluate  measure a sweep on held-out recordings, recommend a member, and show its features in a report
  plot      draw the course of a run

`VERB --help` tells a verb's flags. Flags override the file given by --config; --debug shows tracebacks.
"""

from functools import partial
from pathlib import Path

from minsae_jax import cli
from minsae_jax.eeg.synthetic import DemoConfig, write_demo
from minsae_jax.encoder.config import ExtractConfig
from minsae_jax.encoder.converted import Encoder, is_encoder, load_encoder
from minsae_jax.encoder.extract import extract
from minsae_jax.encoder.live import open_live
from minsae_jax.errors import UserError
from minsae_jax.evaluation.config import EvaluateConfig
from minsae_jax.files import lock_folder
from minsae_jax.parallel.processes import start_jax
from minsae_jax.sae.config import PlotConfig, TrainConfig, load_run_config
from minsae_jax.sae.plots import plot
from minsae_jax.sae.trainer import train
from minsae_jax.settings import Settings, load_sections, read_yaml

SECTIONS: dict[str, type] = {
    "demo": DemoConfig,
    "extract": ExtractConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "plot": PlotConfig,
}


def load_settings(cls: type[Settings], path: str | Path) -> Settings:
    """The settings of one verb from the section of that name. All sections are checked, so that no slip hides."""
    name = next(name for name, section_cls in SECTIONS.items() if section_cls is cls)
    return load_sections(path, SECTIONS).get(name, cls())


def main(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
        return
    verb, flags = args[0], args[1:]
    if verb == "demo":
        print(write_demo(_settings(DemoConfig, verb, flags)))
    elif verb == "extract":
        _extract(_settings(ExtractConfig, verb, flags))
    elif verb == "train":
        print(_train(_settings(TrainConfig, verb, flags)))
    elif verb == "evaluate":
        _evaluate(_settings(EvaluateConfig, verb, flags))
    elif verb == "plot":
        files = plot(_settings(PlotConfig, verb, flags))
        print(f"wrote {files.metrics} and {files.densities}")
    else:
        raise UserError(
            f"there is no verb {verb!r}: it is demo, extract, train, evaluate or plot; see python -m minsae_jax --help"
        )


def _settings(cls: type[Settings], verb: str, flags: list[str]) -> Settings:
    """The verb's settings: flags over the file given by --config over the defaults."""
    files, rest = [], []
    arguments = iter(flags)
    for argument in arguments:
        if argument == "--config":
            files.append(next(arguments, ""))
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            rest.append(argument)
    if len(files) > 1 or "" in files:
        raise UserError("--config takes one YAML file")
    default = load_settings(cls, files[0]) if files else None
    also = f"--config FILE reads the section {verb} of a YAML file, which flags override; --debug shows tracebacks."
    return cli.parse(cls, rest, f"minsae {verb}", default, also)


def _extract(settings: ExtractConfig) -> None:
    for name in ("root_path", "checkpoint_path"):
        if getattr(settings, name) is None:
            raise UserError(
                f"extract needs --{name}, as a flag or in the section extract of the --config file"
            )
    start_jax(distributed=settings.distributed)
    encoder = open_encoder(str(settings.checkpoint_path), settings.config_path)
    for told in extract(encoder, settings):
        print(told, flush=True)


def _train(settings: TrainConfig) -> str:
    start_jax(settings.deterministic, settings.distributed)
    if not settings.checkpoint_path:
        return train(settings)
    encoder = open_encoder(settings.checkpoint_path, settings.config_path)
    return train(
        settings,
        encoder.fingerprint,
        partial(open_live, encoder, settings) if settings.live else None,
    )


def _evaluate(settings: EvaluateConfig) -> None:
    config = Path(settings.run) / "config.yaml"
    if not config.is_file():
        raise UserError(f"{settings.run} holds no run: name one with --run")
    trained = load_run_config(Path(settings.run))
    checkpoint_path = settings.checkpoint_path or trained.checkpoint_path
    if checkpoint_path is None:
        raise UserError("evaluate needs --checkpoint_path, since the run does not name its encoder")
    # scipy is imported for this verb only
    from minsae_jax.evaluation.evaluate import evaluate
    from minsae_jax.report.report import write_report

    start_jax()
    encoder = open_encoder(checkpoint_path, settings.config_path or trained.config_path)
    with lock_folder(Path(settings.run)):
        evaluation = evaluate(settings, encoder, trained)
        print(evaluation.summary(), flush=True)
        if settings.report:
            print(f"open {write_report(settings, evaluation)}")


def open_encoder(checkpoint_path: str, config_path: str | None = None) -> Encoder:
    """A converted encoder, held against the YAML where one is given; or any other, converted in memory."""
    path = Path(checkpoint_path)
    is_source = path.suffix in (".pth", ".pt") or path.is_file() or (path / "config.json").is_file()
    if is_source and not is_encoder(path):
        from convert.encoder import convert_encoder  # torch is imported for PyTorch files only

        return convert_encoder(path, config_path)[0]
    encoder = load_encoder(path)
    if config_path:
        from convert.architecture import check_yaml

        check_yaml(encoder.architecture, read_yaml(config_path))
    return encoder


def entry() -> None:
    """The installed command `minsae`."""
    cli.run(main)


if __name__ == "__main__":
    entry()
