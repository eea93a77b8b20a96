"""`sensorium new-model CONFIG`: writes the beginning of a model file, and its test."""

from __future__ import annotations

import argparse
from pathlib import Path

from sensorium import logger as package_logger
from sensorium.errors import ConfigError


def fill(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "source", metavar="CONFIG", help="a checkpoint's folder, the path of a config.json, or a model type"
    )
    parser.add_argument("--out", metavar="FILE", help="the model file; its test goes beside it [the type's name].py")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Write both files, and say what runs already and what is left to do."""
    package_logger.configure(package_logger.LogSettings("ERROR"))
    from sensorium.entrypoints.new_model.anatomy import read  # loads torch and transformers
    from sensorium.entrypoints.new_model.report import already, summary
    from sensorium.entrypoints.new_model.skeleton import file_of_test, model_file

    anatomy = read(parsed.source)
    print(already(anatomy))
    path = Path(parsed.out or f"{anatomy.model_type.replace('-', '_').replace('.', '_')}.py")
    test = path.with_name(f"test_{path.name}")
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise ConfigError(f"--out: got {path.name!r}, expected a module's name with .py at its end. Change it.")
    for each in (path, test):
        if each.exists():
            raise ConfigError(
                f"--out: got {each}, which is there already, expected a new file. Name another, or move it."
            )
    try:
        path.write_text(model_file(anatomy), encoding="utf-8")
        test.write_text(file_of_test(anatomy, path.name), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out: {path} can't be written ({error.strerror}). Name another file.") from error
    print("\n".join(summary(anatomy, path, test)))
    return 0
