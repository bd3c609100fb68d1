"""CSV and JSON tables as spreadsheets and scripts leave them: read right, or refused with the line."""

import json

import pytest

from latentsmith.data.errors import BadSample
from latentsmith.data.ingest import import_dataset
from latentsmith.data.shards import ShardSet
from latentsmith.data.sources import open_source
from latentsmith.files.errors import BadInput


def rows_of(path):
    return [(item.name, item.caption()) for item in open_source(path).items()]


@pytest.mark.parametrize(
    "text",
    [
        "file_name,text\n1.png,a car\n",
        "file_name;text\r\n1.png;a car\r\n",
        "file_name\ttext\n1.png\ta car\n",
        "File_Name, Text ,\n1.png, a car,\n",
        "TEXT|FILE_NAME\na car|1.png\n",
        'sep=;\n"file_name";"text"\n\n"1.png";"a car"',
        "file_name,text\r1.png,a car\r",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_ways_to_write_one_row(text, encoding, tmp_path):
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    ((name, caption),) = rows_of(tmp_path / "t.csv")
    assert (name, caption.strip()) == ("1.png", "a car")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            '1.png,a car\n2.png,"a sunset\n3.png,a dog\n4.png,a cat\n',
            r"line 3 is not CSV \(a quote is opened and never closed",
        ),
        (
            '1.png,"a sunset\n2.png,a dog\n3.png,a cat"\n',
            "line 2 opens a quote that is not closed before the next rows",
        ),
        ('1.png,"a sunset\n2.png,a dog\n3.png,"a cat"\n', r"line 2 is not CSV \(text after a closing quote"),
        ('1.png,"a \\"red\\" car"\n', 'line 2 is not CSV .*a quote inside quotes is written twice: ""'),
        ('1.png,"a \\"red\\", shiny car"\n', "line 2 "),
        ("1.png,one\n\n2.png\n", "line 4 has not the header's 2 fields"),
    ],
)
@pytest.mark.parametrize("delimiter", [",", ";"])
def test_quotes_that_do_not_match(rows, message, delimiter, tmp_path):
    (tmp_path / "t.csv").write_text("file_name,text\n".replace(",", delimiter) + rows.replace(",", delimiter))
    with pytest.raises(BadInput, match=message) as error:
        list(open_source(tmp_path / "t.csv").items())
    assert "\\" not in str(error.value)


def test_a_tsv_is_a_table_too(tmp_path):
    (tmp_path / "t.tsv").write_text("file_name\ttext\n1.png\ta car, red\n")
    assert rows_of(tmp_path / "t.tsv") == [("1.png", "a car, red")]


def test_two_columns_of_one_name(tmp_path):
    (tmp_path / "t.csv").write_text("file_name,text,Text\n1.png,a,b\n")
    with pytest.raises(BadInput, match="two columns are named 'Text'"):
        open_source(tmp_path / "t.csv")


def test_a_caption_of_several_lines_stays_one(tmp_path):
    (tmp_path / "t.csv").write_bytes(b'file_name,text\r\n1.png,"two\r\nlines, and ""quotes"""\r\n2.png,5" disk\r\n')
    assert rows_of(tmp_path / "t.csv") == [("1.png", 'two\nlines, and "quotes"'), ("2.png", '5" disk')]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_byte_that_is_not_utf_8_names_the_row(suffix, tmp_path):
    table = (
        b"file_name,text\n1.png,a caf\xe9\n" if suffix == "csv" else b'{"file_name": "1.png", "text": "a caf\xe9"}\n'
    )
    (tmp_path / f"t.{suffix}").write_bytes(table)
    (item,) = open_source(tmp_path / f"t.{suffix}").items()
    with pytest.raises(BadSample, match=r't\.\w+: not UTF-8 text \(byte 0xE9 after "a caf"\)') as error:
        item.caption()
    assert error.value.reason == "caption not UTF-8"


def test_odd_file_names(tmp_path, png):
    """Windows paths; numbers and addresses are named; a path out of the folder stays out in either spelling."""
    (tmp_path / "in" / "images").mkdir(parents=True)
    (tmp_path / "in" / "images" / "1.png").write_bytes(png())
    (tmp_path / "2.png").write_bytes(png())
    names = ["images\\1.png", 1, "https://example.com/x.png", "..\\2.png", "C:\\2.png"]
    rows = [{"file_name": name, "text": "words", "score": float("nan")} for name in names]
    (tmp_path / "in" / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = import_dataset(tmp_path / "in" / "t.jsonl", tmp_path / "out")
    assert (report.good, report.reasons) == (1, {"outside the source folder": 2, "missing image": 2})
    details = " ".join(entry["detail"] for entry in json.loads(report.path.read_text())["samples"])
    assert "is the number 1, not a file name" in details and "is an address; fetch it with img2dataset" in details
    stored = json.loads(ShardSet(tmp_path / "out")[0].text("json"), parse_constant=pytest.fail)
    assert stored["score"] is None


def test_json_of_a_tar_that_cannot_be_read(tmp_path):
    from latentsmith.data.shards import ShardWriter

    with ShardWriter(tmp_path) as writer:
        writer.write("a", {"png": b"x", "json": b'{"caption": "a'})
        writer.write("b", {"png": b"x", "json": b'{"caption": "a', "txt": b"words", "caption": b"others"})
    first, second = open_source(tmp_path).items()
    with pytest.raises(BadSample, match=r"a: there is no \.txt, and the \.json cannot be read"):
        first.caption()
    assert second.caption() == "words"
