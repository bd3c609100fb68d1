"""The part of a training that is the same whatever is trained: averages, checkpoints, logs, Lightning's trainer."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning as L

from latentsmith.config import Config
from latentsmith.data.loader import RunSamples

from . import setup
from .checkpointing import Checkpointing
from .fit import Data, fit
from .module import TrainingModule
from .report import RunReport
from .run_folder import CHECKPOINTS, checkpoint_to_resume


def fit_as_configured(
    config: Config,
    module: TrainingModule,
    samples: RunSamples,
    max_steps: int,
    folder: Path,
    *,
    metadata: Mapping[str, str],
    head: Sequence[str],
    callbacks: Sequence[L.Callback] = (),
) -> None:
    """Train `module` on `samples` up to max_steps, as `trainer` and `exp_manager` say, in the run folder `folder`.

    head: lines that say what is trained, for its report.
    """
    manager = config.exp_manager
    if manager.ema.enable:
        ema = manager.ema
        module.keep_averages(ema.decay, every_n_steps=ema.every_n_steps, cpu_offload=ema.cpu_offload)
    checkpointing = Checkpointing(
        folder / CHECKPOINTS,
        manager.checkpoint_callback_params.every_n_train_steps,
        manager.checkpoint_callback_params.save_top_k,
        metadata,
        manager.checkpoint_callback_params.every_n_minutes,
        resume=checkpoint_to_resume(config, folder),
        enabled=manager.create_checkpoint_callback,
    )
    fit(
        module,
        Data(samples, config.model.micro_batch_size, config.model.data.num_workers),
        max_steps,
        folder,
        checkpointing,
        log_every_n_steps=config.trainer.log_every_n_steps,
        tensorboard=manager.create_tensorboard_logger,
        wandb=dict(manager.wandb_logger_kwargs) if manager.create_wandb_logger else None,
        progress_bar=config.trainer.enable_progress_bar,
        nonfinite_limit=manager.nonfinite_limit,
        callbacks=[*callbacks, RunReport(folder, head)],
        **setup.trainer_options(config, setup.process_count(config)),
    )
