"""What would end a run, or make it pointless, and can be seen before a model is loaded."""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch import nn, optim
from torch.utils.cpp_extension import get_default_build_root
from transformers import Trainer, get_scheduler
from transformers.integrations import get_available_reporting_integrations

from ..data import ConversationDataset, MixtureDataset
from ..data.judged import sees_any, unseeing_predictors
from .arguments import StageArguments
from .config import StageConfig

# Seconds for which a lock that no process of this machine holds is waited on: on one machine it is a leftover, and
# with several another one may be building in a home folder that they share.
PATIENCE, PATIENCE_OF_SEVERAL = 5, 600


def check_machine(args: StageArguments) -> None:
    """`ValueError` for what this machine cannot do, or has not installed."""
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16=true needs a GPU; on a CPU set bf16=true, or leave it out.")
    missing = [name for name in args.report_to if name not in get_available_reporting_integrations()]
    if missing:
        raise ValueError(
            f"report_to={','.join(missing)} is not installed (or not known); pip install it, or leave it out."
        )
    _check_optimizer(args)


def _check_optimizer(args: StageArguments) -> None:
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
        get_scheduler(
            args.lr_scheduler_type,
            optim.SGD([nn.Parameter()], lr=args.learning_rate),
            num_warmup_steps=0,
            num_training_steps=2,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (ImportError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"optim={args.optim.value} (optim_args={args.optim_args}) with lr_scheduler_type="
            f"{args.lr_scheduler_type.value} (lr_scheduler_kwargs={args.lr_scheduler_kwargs}) cannot be had: {error}"
        ) from error


def check_judged(config: StageConfig, dataset: ConversationDataset | MixtureDataset) -> None:
    """`ValueError` where a predictor that is on would see nothing to judge, and so be saved as it began."""
    sparsity = config.sparsity
    judged, pictured = sees_any(
        dataset, sparsity.min_output_length, answers=sparsity.output_predictor, images=sparsity.image_predictor
    )
    refuse_unjudged(config, judged, pictured)


def refuse_unjudged(config: StageConfig, judged: bool, pictured: bool) -> None:
    """`ValueError` where a predictor is on and no answer is `judged`, or no sample `pictured`."""
    for problem in unseeing_predictors(config.sparsity, config.data, judged, pictured):
        raise ValueError(problem)


def check_build_locks() -> None:
    """`ValueError` for a lock under which a process that is gone was building one of torch's extensions.

    DeepSpeed builds its own on first use, and torch waits for a lock for ever.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    several = os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1")
    for lock in sorted(root.glob("**/lock")):
        end = time.monotonic() + (PATIENCE_OF_SEVERAL if several else PATIENCE)
        while lock.exists() and not _is_held(lock):
            if time.monotonic() > end:
                raise ValueError(
                    f"{lock} was left behind by a process that is gone, and DeepSpeed would wait for it for ever; "
                    f"remove it (rm {lock}) and start again."
                )
            time.sleep(0.2)


def _is_held(lock: Path) -> bool:
    """Whether a process of this machine has the file open, or that cannot be known."""
    processes = Path("/proc")
    if not (processes / "self" / "fd").is_dir():
        return True
    target = str(lock.resolve())
    for descriptors in processes.glob("[0-9]*/fd"):
        try:
            if any(os.readlink(descriptor) == target for descriptor in descriptors.iterdir()):
                return True
        except OSError:
            # It has ended, or is another user's.
            continue
    return False
