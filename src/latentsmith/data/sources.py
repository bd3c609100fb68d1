"""Find out what a source of images and captions is: a folder, a table, tars; and which of its files are meant.

There are two errors. BadInput: the source itself is wrong (no images, a garbled line of a table, a damaged tar).
BadSample, raised when an item is read: this one sample is wrong.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from latentsmith.files.errors import BadInput
from latentsmith.files.images import HEAD, is_image
from latentsmith.files.pickles import load_plain
from latentsmith.files.regular import JSON, check_regular, open_regular

from .errors import BadSample
from .sample_io import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS
from .shards import SET_FILE, UNFINISHED_FILE, expand_braces, read_set_file
from .source_kinds import SHOWN, FolderSource, RefusedFiles, Source, TableSource, TarSource, extension_of
from .storage import (
    INSIDE,
    Access,
    LocalStorage,
    RemoteStorage,
    Storage,
    is_remote,
    link_refused,
    storage_at,
)
from .tables import ParquetTable, Table, TextTable
from .tar_index import index_path, refuse_packed

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # as HF's imagefolder has them
TABLE_EXTENSIONS = ("jsonl", "csv", "tsv", "parquet")
TEXT_EXTENSIONS = ("json", "md", "yaml", "yml", "html", "py", "tar", "npy", "npz", *TABLE_EXTENSIONS)  # never sniffed
SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?=[-_.\d]|$)", re.IGNORECASE)


def open_source(path: str | os.PathLike[str], access: Access = INSIDE, captions: bool = True) -> Source:
    """Return the source at `path`, here or at an address that fsspec opens.

    It may be a folder (with `metadata.jsonl`, `.csv` or `.parquet`, or captions beside the images, or tars), a .jsonl
    or .csv file, a .parquet, a folder or pattern of them, a tar, a pattern of tars, or, here, NeMo's wdinfo.pkl beside
    them. Raises BadInput if it is none of these or has nothing in it.

    access: which files out of the source's folder may be read; the others are samples that raise BadSample.
    captions: whether they are needed.
    """
    path = _without_file_protocol(path)
    name, suffix = str(path), PurePosixPath(path).suffix.lower()
    folder, last = os.path.split(path)
    is_pattern = bool(set("*{").intersection(last))
    if suffix == ".parquet" and is_pattern:
        return _parquet_pattern(storage_at(folder, access), last)
    if suffix == ".tar" or (is_remote(path) and is_pattern):
        if not is_remote(path):
            _check_pattern(name, access)
        return TarSource(path)
    if suffix[1:] in TABLE_EXTENSIONS and not _is_folder(path):
        storage = storage_at(folder, access, named=last)
        if not storage.exists(last):
            raise BadInput(f"{path}: no such folder or file")
        return TableSource(storage, _table(storage, last), captions)
    if is_remote(path) or Path(path).is_dir():
        return folder_source(path, access, captions)
    if not Path(path).exists():
        raise BadInput(f"{path}: no such folder or file")
    if suffix == ".pkl":
        open_regular(path, JSON).close()
        beside, tars = Path(path).parent, read_wdinfo(Path(path))
        _check_tars(LocalStorage(beside, access), tars)
        return TarSource([beside / tar for tar in tars])
    refuse_packed(folder, [last])
    raise BadInput(
        f"{path}: not a source; it takes a folder of images, a .jsonl or .csv table, or WebDataset .tar files"
    )


def _table(storage: Storage, name: str) -> Table:
    return ParquetTable(storage, [name]) if extension_of(name) == "parquet" else TextTable(storage, name)


def _parquet_pattern(storage: Storage, pattern: str) -> Source:
    """Return the source of the parquet files in one folder whose names fit a pattern."""
    patterns = expand_braces(pattern)
    names = sorted(name for name in storage.sizes() if any(fnmatchcase(name, each) for each in patterns))
    if not names:
        raise BadInput(f"{storage.address}/{pattern}: no such files")
    return TableSource(storage, ParquetTable(storage, names))


def _is_folder(path: str | os.PathLike[str]) -> bool:
    return RemoteStorage(str(path)).is_folder() if is_remote(path) else Path(path).is_dir()


def _without_file_protocol(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return the path of a `file://` address: fsspec would follow its links and wait for its FIFOs."""
    for protocol in ("file://", "local://"):
        if isinstance(path, str) and path.startswith(protocol):
            return path.removeprefix(protocol)
    return path


def _check_tars(storage: LocalStorage, names: Iterable[str]) -> None:
    """Raise BadInput for a tar, or an index beside one, that may not be read or is no regular file."""
    for tar in names:
        for name in (tar, str(index_path(Path(tar)))):
            with suppress(FileNotFoundError):  # ShardSet reports a tar that is missing
                check_regular(storage.resolve(name), storage.folder / name)


def _check_pattern(pattern: str, access: Access) -> None:
    """Call `_check_tars` for a tar that the user named, or those that a pattern names."""
    for path in map(Path, expand_braces(pattern)):
        if "*" not in path.name:
            _check_tars(LocalStorage(path.parent, access, named=path.name), [path.name])
        else:
            _check_tars(LocalStorage(path.parent, access), [tar.name for tar in path.parent.glob(path.name)])


def folder_source(path: str | os.PathLike[str], access: Access = INSIDE, captions: bool = True) -> Source:
    """Return the source that a folder is, by the files in it."""
    storage = storage_at(path, access)
    if storage.exists(SET_FILE) or storage.exists(UNFINISHED_FILE):
        if isinstance(storage, LocalStorage) and storage.exists(SET_FILE):
            open_regular(storage.resolve(SET_FILE), JSON, storage.folder / SET_FILE).close()
            _check_tars(storage, [record.file for record in read_set_file(storage.folder)])
        return TarSource(path)
    sizes = storage.sizes()
    refused = {name: link_refused(f"{storage.address}/{name}") for name in storage.refused}
    images = [name for name in sorted(sizes, key=PurePosixPath) if _is_image(storage, name)]
    if table := _table_of(storage, sizes):
        source = TableSource(storage, _table(storage, table), captions, images)
        return _with_refused(source, source.unlisted() | refused)
    if images:
        found = FolderSource(storage, sizes, images)
        if captions and not found.captions:
            _check_captions(storage, sizes, images)
        return _with_refused(found, refused)
    top = [name for name in sizes if "/" not in name]
    refuse_packed(storage.address, top)
    # img2dataset leaves a .parquet beside each of its tars
    if tars := [name for name in top if extension_of(name) == "tar"]:
        if isinstance(storage, LocalStorage):
            _check_tars(storage, tars)
        return TarSource(path)
    if parquets := [name for name in sorted(sizes, key=PurePosixPath) if extension_of(name) == "parquet"]:
        _check_splits(storage, parquets)
        return _with_refused(TableSource(storage, ParquetTable(storage, parquets), captions), refused)
    if refused:
        raise next(iter(refused.values()))
    raise BadInput(f"{storage.address}: no images here; known extensions: {', '.join(IMAGE_EXTENSIONS[:12])}")


def _is_image(storage: Storage, name: str) -> bool:
    """Return whether a file is an image by its extension, or, here, by its first bytes."""
    extension = extension_of(name)
    if extension in IMAGE_EXTENSIONS or extension in CAPTION_EXTENSIONS or extension in TEXT_EXTENSIONS:
        return extension in IMAGE_EXTENSIONS
    return is_image(storage.head(name, HEAD))


def _table_of(storage: Storage, names: Iterable[str]) -> str | None:
    """Return the folder's metadata table. Raises BadInput if it has two, or its subfolders have them."""
    tables = sorted((name for name in names if PurePosixPath(name).name.lower() in TABLES), key=PurePosixPath)
    top = [name for name in tables if "/" not in name]
    if len(top) > 1:
        raise BadInput(f"{storage.address}: has two tables, {top[0]} and {top[1]}; name the one to read")
    if tables and not top:
        folders = " and ".join(str(PurePosixPath(name).parent) for name in tables[:SHOWN])
        raise BadInput(f"{storage.address}: its tables are in {folders}; import each of these folders by itself")
    return top[0] if top else None


def _check_captions(storage: Storage, names: Iterable[str], images: Sequence[str]) -> None:
    """Raise BadInput for images without one caption file where something else may hold their captions."""
    others = sorted(name for name in names if extension_of(name) in (*TABLE_EXTENSIONS, "tar", "json"))
    if others:
        what = f"{len(images):,} images without caption files, but {others[0]} is there"
        raise BadInput(
            f"{storage.address}: {what}; name it as the source, or as metadata{PurePosixPath(others[0]).suffix}"
        )


def _check_splits(storage: Storage, parquets: Sequence[str]) -> None:
    """Raise BadInput for the parquet files of several splits: a training set must not hold the test set."""
    splits: dict[str, str] = {}
    for name in parquets:
        parts = PurePosixPath(name).parts
        if found := next((match for part in parts if (match := SPLIT.match(part))), None):
            below = str(PurePosixPath(*parts[:-1])) + "/" if len(parts) > 1 else ""
            is_folder = found.string != parts[-1]
            splits.setdefault(found[1].lower(), f"{below}{'' if is_folder else found[1]}*.parquet")
    if len(splits) > 1:
        one = splits.get("train") or next(iter(splits.values()))
        raise BadInput(f"{storage.address}: has the splits {', '.join(splits)}; import one: '{storage.address}/{one}'")


def _with_refused(source: Source, causes: Mapping[str, BadSample]) -> Source:
    return RefusedFiles(source, causes) if causes else source


def read_wdinfo(path: Path) -> list[str]:
    """Return the tars that a `wdinfo.pkl` lists, as it names them. Raises BadInput for a file that is none."""
    try:
        info = load_plain(path.read_bytes(), str(path))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    tars = info.get("tar_files") if isinstance(info, dict) else None
    if not isinstance(tars, list) or not tars or not all(isinstance(tar, str) for tar in tars):
        raise BadInput(f"{path}: not a wdinfo.pkl: it has no list tar_files of names")
    return tars
