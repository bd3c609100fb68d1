"""Statistics of a reference set in one file: mean and covariance of features, and what made them.

Files as pytorch-fid and clean-fid write them (.npz with `mu` and `sigma`) are read too. They do not say what made them,
so they are only taken for FID, and that is noted in the result.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latentsmith.files.atomic import atomic_open
from latentsmith.files.errors import BadInput

from .frechet import Moments

FOREIGN_COUNT = 2  # any count above 1: a foreign file states the covariance, not how many images it is of


def is_statistics(source: Any) -> bool:
    return isinstance(source, str | Path) and Path(source).suffix == ".npz"


def save_statistics(path: Path, moments: Moments, identity: Mapping[str, Any]) -> None:
    """Write moments as `mu` and `sigma`, which other tools read, with `count` and `identity`."""
    with atomic_open(path) as file:
        arrays = {"mu": moments.mean, "sigma": moments.covariance, "count": np.array(moments.count)}
        np.savez(file, **arrays, identity=np.array(json.dumps(dict(identity))))  # type: ignore[arg-type]


def load_statistics(path: str | Path, identity: Mapping[str, str]) -> tuple[Moments, str]:
    """Return the moments in a file, and a line on where they are from.

    identity: of the extractor that will be compared with them. Raises BadInput for statistics of another extractor.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path}: cannot be read as statistics, .npz with mu and sigma ({str(error)[:60]})") from None
    if not {"mu", "sigma"} <= held.keys():
        raise BadInput(f"{path}: holds {', '.join(held) or 'nothing'}; statistics have mu and sigma")
    mean, covariance = (np.asarray(held[name], dtype=np.float64) for name in ("mu", "sigma"))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not np.isfinite(covariance).all():
        raise BadInput(f"{path}: mu {mean.shape} and sigma {covariance.shape} are not those of one set of features")
    if "identity" not in held:
        if identity["extractor"] != "inception":
            raise BadInput(f"{path}: statistics without an extractor are taken as Inception's; {identity['extractor']} "
                           "needs its own: name the reference images")  # fmt: skip
        moments = Moments(FOREIGN_COUNT, mean, covariance * (FOREIGN_COUNT - 1))
        return moments, f"{path}: does not state its extractor and resize; taken as Inception's"
    made = json.loads(str(held["identity"]))
    for name, now in identity.items():
        if made.get(name) != now:
            raise BadInput(f"{path}: made with {name} {made.get(name)}, not {now}; name the reference images instead")
    count = int(held["count"])
    return Moments(count, mean, covariance * (count - 1)), f"{count} images of {made.get('of', 'unknown origin')}"
