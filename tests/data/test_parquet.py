"""Parquet tables: rows in order from any on, every way of holding an image, and what is none."""

import pytest

from latentsmith.cli import main
from latentsmith.data.errors import BadSample
from latentsmith.data.sources import open_source
from latentsmith.files.errors import BadInput

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def write(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


@pytest.fixture
def rows(png):
    return [{"image": {"bytes": png(seed=n), "path": None}, "text": f"caption {n}", "score": n / 2, "tags": [n]}
            for n in range(10)]  # fmt: skip


def test_rows_in_order_and_from_any_on(tmp_path, rows):
    write(tmp_path / "b.parquet", rows[6:])
    write(tmp_path / "a.parquet", rows[:6], row_group_size=2)
    source = open_source(tmp_path)
    assert len(source) == 10
    for start in range(11):
        found = list(source.items(start))
        assert [item.caption() for item in found] == [row["text"] for row in rows[start:]]
        assert [item.image() for item in found] == [row["image"]["bytes"] for row in rows[start:]]
    assert found == [] and dict(next(source.items(3)).extra) == {"score": 1.5}
    assert next(source.items(7)).name == "row 1 of b.parquet"
    assert source.fingerprint() == open_source(tmp_path).fingerprint()


def test_files_come_in_the_order_of_their_folders(tmp_path, rows):
    for name, row in (("a-b/x", rows[1]), ("a/x", rows[0])):
        write(tmp_path / f"{name}.parquet", [row])
    assert [item.caption() for item in open_source(tmp_path).items()] == ["caption 0", "caption 1"]


@pytest.mark.parametrize("column", ["image", "jpg", "IMAGE_BYTES"])
def test_bytes_or_paths(tmp_path, png, column):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.png").write_bytes(png())
    for value in (png(), "x.png", {"bytes": None, "path": "x.png"}):
        path = write(tmp_path / "in" / "t.parquet", [{column: value, "caption": "c"}])
        assert next(open_source(path).items()).image() == png()
    for value, reason in (
        ("gone.png", "gone.png"),
        (None, "holds no image"),
        ({"bytes": b"", "path": ""}, "holds no"),
    ):
        path = write(tmp_path / "in" / "t.parquet", [{column: value, "caption": "c"}])
        with pytest.raises(BadSample, match=reason):
            next(open_source(path).items()).image()


def test_the_command(tmp_path, rows, capsys):
    rows[3]["text"] = None
    write(tmp_path / "in" / "t.parquet", rows)
    assert main(["data", "import", str(tmp_path / "in"), str(tmp_path / "out"), "--where", "score>=1"]) == 0
    output = capsys.readouterr().out
    assert (
        "7 samples in 1 shards, 3 set aside" in output and "2 not score>=1" in output and "1 missing caption" in output
    )


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            {"url": "http://x/y.jpg", "text": "t"},
            "holds addresses of images, not images; fetch them",
        ),
        ({"pixels": b"x", "text": "t"}, "no column for the image"),
        ({"image": b"x", "words": "t"}, "no column for the caption among image, words"),
    ],
)
def test_tables_without_what_is_needed(tmp_path, row, line):
    with pytest.raises(BadInput, match=line):
        open_source(write(tmp_path / "t.parquet", [row]))


def test_what_is_no_parquet(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(BadInput, match="not readable as parquet"):
        open_source(tmp_path / "t.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(BadInput, match="parquet needs pyarrow; pip install"):
        open_source(tmp_path / "t.parquet")
