"""NeMo's lists of tars."""

from pathlib import Path

from latentsmith.files.array_pickles import load_plain
from latentsmith.files.errors import BadInput


def read_wdinfo(path: Path) -> list[str]:
    """The tars that a `wdinfo.pkl` lists, as it names them. Raises BadInput for a file that is none."""
    try:
        info = load_plain(path.read_bytes(), str(path))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    tars = info.get("tar_files") if isinstance(info, dict) else None
    if not isinstance(tars, list) or not tars or not all(isinstance(tar, str) for tar in tars):
        raise BadInput(f"{path}: not a wdinfo.pkl: it has no list tar_files of names")
    return tars
