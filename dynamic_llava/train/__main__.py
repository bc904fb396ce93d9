"""`python -m dynamic_llava.train --config configs/train/shapes.yaml key=value ...`: the sparsification stage."""

from __future__ import annotations

import argparse
import sys

from .arguments import StageConfig, load_config


def main(arguments: list[str] | None = None) -> int:
    """Train, save, and report where the configuration asks for it. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dynamic_llava.train", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file, see configs/train/")
    parser.add_argument("overrides", nargs="*", help="key=value, on top of the file")
    parsed = parser.parse_args(arguments)
    try:
        config = load_config(parsed.config, parsed.overrides)
        run(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(config: StageConfig) -> None:
    """The whole stage: data where it is embedded, training, checkpoint, report."""
    from . import stage

    if config.data.shapes is not None:
        from ..data.shapes import build_shapes

        with config.training.main_process_first(desc="drawing the shapes"):
            build_shapes(config.data.image_folder, **config.data.shapes)
    stage.train(config)
    if config.data.report and config.training.process_index == 0:
        from ..eval.report import main as report

        arguments = {
            "run": config.training.output_dir,
            "base": config.model.base_model,
            "data-root": config.data.image_folder,
            "limit": config.data.report_questions,
            "descriptions": config.data.report_descriptions,
        }
        if report([f"--{key}={value}" for key, value in arguments.items() if value is not None]):
            raise ValueError(f"the report on {config.training.output_dir} failed; the run itself is saved.")


if __name__ == "__main__":
    sys.exit(main())
