"""`latentsmith precache`."""

from __future__ import annotations

from .options import Config, OutFolder, Overrides, load


def precache(out: OutFolder, config: Config = None, overrides: Overrides = None) -> None:
    """Encode the images and captions of a set once: training on the result needs neither VAE nor text encoder.

    \b
    Examples:
      latentsmith precache --config sd1 --out cache model.data.train.dataset_path=shards \\
          model.first_stage_config.from_pretrained=vae.safetensors
      latentsmith train --config sd1 model.data.train.dataset_path=cache \\
          model.first_stage_key=image_encoded model.cond_stage_key=captions_encoded
    """
    loaded = load(config, overrides)
    from latentsmith.data.precache import precache as run

    run(loaded, out)
