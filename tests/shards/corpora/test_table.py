import json

import pytest

from shards.corpora.item import Caption, Item
from shards.errors import UserError
from tests.shards import tiny_corpora as tiny
from tests.shards.corpora.reading import load_corpus, read, splits

ROWS = [
    {"image": "p/1.png", "audio": "s/1a.wav", "text": "one", "speaker": "anna", "split": "train"},
    {"image": "p/2.png", "audio": "s/2.wav", "split": "test"},
    {"image": "./p/1.png", "audio": "s/1b.wav"},
]


def expected_items(root):
    first = Caption("s/1a.wav", root / "s/1a.wav", "one", "anna"), Caption("s/1b.wav", root / "s/1b.wav")
    return [
        Item("p/1.png", "train", root / "p/1.png", first),
        Item("p/2.png", "test", root / "p/2.png", (Caption("s/2.wav", root / "s/2.wav"),)),
    ]


def test_table_csv(tmp_path):
    root = tiny.table(tmp_path, ROWS)
    assert read("table", "--root", root) == expected_items(root)
    assert read("table", "--root", root / "table.csv") == expected_items(root)


def test_table_json_lines_and_tsv(tmp_path):
    root = tiny.table(tmp_path, ROWS)
    (root / "table.csv").unlink()
    (root / "t.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    assert read("table", "--root", root) == expected_items(root)
    (root / "t.tsv").write_text("image\taudio\np/1.png\ts/1a.wav\n")
    with pytest.raises(UserError, match="has 2 tables"):
        read("table", "--root", root)
    assert [item.split for item in read("table", "--root", root / "t.tsv")] == ["train"]


def test_the_language_of_a_caption_is_optional(tmp_path):
    rows = [{"image": "1.png", "audio": f"{n}.wav"} for n in range(3)]
    root = tiny.table(tmp_path, rows)
    (root / "table.csv").write_text("image,audio,language\n1.png,0.wav,en\n1.png,1.wav, de \n1.png,2.wav,\n")
    assert [caption.language for caption in read("table", "--root", root)[0].captions] == ["en", "de", None]
    (root / "table.csv").unlink()
    (root / "t.jsonl").write_text("".join(json.dumps(row | {"language": code}) + "\n" for row, code in
                                          zip(rows, ("pt-br", None, ""), strict=True)))  # fmt: skip
    assert [caption.language for caption in read("table", "--root", root)[0].captions] == ["pt-br", None, None]


def test_table_with_byte_order_mark_quotes_and_unusual_line_ends(tmp_path):
    root = tiny.table(tmp_path, ROWS[:1])
    row = {"image": "p/1.png", "audio": "s/1a.wav", "text": "a\u2028b\u2029c\u0085d"}
    (root / "t.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert read("table", "--root", root / "t.jsonl")[0].captions[0].text == row["text"]
    (root / "table.csv").write_bytes(
        b'\xef\xbb\xbfimage,audio,text\r\np/1.png,s/1a.wav,"red, and\nblue"\r\n'  # byte-order mark, quotes, CR LF
    )
    assert read("table", "--root", root / "table.csv")[0].captions[0].text == "red, and\nblue"


def test_table_absolute_paths(tmp_path):
    root = tiny.table(tmp_path / "data", ROWS[:1])
    (tmp_path / "t.csv").write_text(f"image,audio\n{root}/p/1.png,{root}/s/1a.wav\n")
    assert read("table", "--root", tmp_path / "t.csv")[0].picture == root / "p/1.png"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.csv", "image,audio\n", "has no rows"),
        ("t.csv", "image,audio\n1.png,\n", "line 2: audio is empty"),
        ("t.csv", "image,audio,split\n1.png,1.wav,train\n1.png,2.wav,dev\n", r"1\.png is missing \(and 2 more\)"),
        ("t.csv", b"image,audio\n\xff.png,1.wav\n", "not UTF-8"),
        ("t.csv", 'image,audio,text\n1.png,1.wav,a\n2.png,2.wav,"b\n3.png,3.wav,c\n', "line 3: unexpected end of data"),
        ("t.csv", 'image,audio,text\n1.png,1.wav,"a"b\n', "line 2: .* expected after"),
        pytest.param("t.csv", f"image,audio\n1.png,{'a' * 200_000}\n", "line 2: field larger than", id="long"),
        pytest.param("t.jsonl", "[" * 100_000, "line 1: not JSON", id="deep"),
        ("t.jsonl", '{"image": "\\ud83d/1.png", "audio": "1.wav"}\n', "line 1: image is .*, which cannot be stored"),
        ("t.jsonl", '{"image": "1.png", "audio": "1.wav"}\n{\n', "line 2: not JSON"),
        ("t.jsonl", "[1]\n", "line 1: a list, expected an object: each line is an object like"),
        ("t.jsonl", '{"image": "1.png"}\n', "line 1: audio is missing; --skip-bad"),
        ("t.csv", "image,audio\n1.png,1.wav\n", r"1\.png is missing \(and 1 more\)"),
        ("t.xlsx", "", "has 0 tables"),
    ],
)
def test_table_mistakes(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=reason):
        read("table", "--root", tmp_path)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("column", ["image", "audio", "text", "speaker", "split", "language"])
@pytest.mark.parametrize(
    ("value", "called"),
    [
        ("NaN", "NaN"),
        ("-Infinity", "-Infinity"),
        ("true", "true"),
        ("7.5", "the number 7.5"),
        ('["a"]', "a list"),
        ('{"a": 1}', "an object"),
        ('"\\u0000"', "'\\x00', which cannot be stored as text"),
    ],
)
def test_json_values_that_are_no_text_are_named_or_dropped(tmp_path, column, value, called):
    root = tiny.table(tmp_path, ROWS)
    row = json.dumps({"image": "p/1.png", "audio": "x.wav"})[:-1]
    row = row.replace(f'"{column}"', '"other"') + f', "{column}": {value}}}'
    table = root / "t.jsonl"
    table.write_text(lines(*ROWS[:2]) + row + "\n")
    with pytest.raises(UserError) as caught:
        read("table", "--root", table)
    assert f"{table} line 3: {column} is {called}, expected text" in str(caught.value)
    corpus = load_corpus("table", "--root", table, "--skip-bad")
    assert splits(corpus.items) == {"train": 1, "test": 1}
    assert [(one.name, one.captions) for one in corpus.dropped] == [(f"{table} line 3", 1)]


def test_a_speakers_number_is_taken_as_csv_has_it(tmp_path):
    root = tiny.table(tmp_path, ROWS[:1])
    (root / "t.jsonl").write_text(lines({"image": "p/1.png", "audio": "s/1a.wav", "speaker": 7, "text": None}))
    (caption,) = read("table", "--root", root / "t.jsonl")[0].captions
    assert (caption.speaker, caption.text) == ("7", None)


@pytest.mark.parametrize(
    "row",
    [
        '{"image": "p/1.png", "audio": "s/1a.wav", "audio": "s/1b.wav"}',
        '{"image": "p/1.png", "audio": "s/1a.wav", "Audio": "s/1b.wav"}',
        '{"image": "p/1.png", "audio": "s/1a.wav", " split": "dev", "split": "test"}',
    ],
)
def test_a_key_that_comes_twice(tmp_path, row):
    root = tiny.table(tmp_path, ROWS)
    (root / "t.jsonl").write_text(lines(ROWS[1]) + row)
    with pytest.raises(UserError, match=r"t\.jsonl line 2: the key '(audio|split)' is repeated"):
        read("table", "--root", root / "t.jsonl")
    assert len(load_corpus("table", "--root", root / "t.jsonl", "--skip-bad").items) == 1


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_splits_that_differ_in_capitals(tmp_path, name):
    root = tiny.table(tmp_path, ROWS)
    rows = [("p/1.png", "s/1a.wav", "train"), ("p/2.png", "s/2.wav", "Train")]
    text = "image,audio,split\n" + "".join(f"{','.join(row)}\n" for row in rows)
    if name == "t.jsonl":
        text = lines(*(dict(zip(("image", "audio", "split"), row, strict=True)) for row in rows))
    (root / name).write_text(text)
    first = 2 if name == "t.csv" else 1
    where = rf"'train' \({name} line {first}\) and 'Train' \({name} line {first + 1}\) differ only in case"
    for skip in ([], ["--skip-bad"]):
        with pytest.raises(UserError, match=where):
            read("table", "--root", root / name, *skip)
    (root / name).write_text(text.replace("Train", " train "))
    assert splits(read("table", "--root", root / name)) == {"train": 2}


def test_a_split_that_no_shard_can_be_named_after(tmp_path):
    root = tiny.table(tmp_path, ROWS[:1])
    (root / "t.csv").write_text("image,audio,split\np/1.png,s/1a.wav,train set\n")
    with pytest.raises(UserError, match=r"t\.csv line 2: split is 'train set', expected a name of letters"):
        read("table", "--root", root / "t.csv")


ROW = "p/1.png", "s/1a.wav", "a dog", "anna", "dev"
HEADERS = {
    "a semicolon": (".csv", "image;audio;text;speaker;split", ";"),
    "a tab": (".csv", "image\taudio\ttext\tspeaker\tsplit", "\t"),
    "a comma": (".tsv", "image,audio,text,speaker,split", ","),
    "blanks": (".csv", "image, audio, text, speaker, split", ", "),
    "capitals": (".csv", "Image,AUDIO,Text,Speaker,Split", ","),
    "quotes": (".csv", '"image","audio","text","speaker","split"', ","),
    "a byte-order mark": (".csv", "\ufeffimage,audio,text,speaker,split", ","),
    "Excel's sep": (".csv", "sep=;\nimage;audio;text;speaker;split", ";"),
    "Excel's sep, a comma": (".csv", "sep=,\r\nimage,audio,text,speaker,split", ","),
    "Excel's sep, a tab": (".csv", "SEP=\t\nimage\taudio\ttext\tspeaker\tsplit", "\t"),
    "a blank line": (".csv", "\n \nimage,audio,text,speaker,split", ","),
    "another order": (".csv", "image,x,audio,text,speaker,,split", ",", ("p/1.png", "", *ROW[1:4], "", "dev")),
}


@pytest.mark.parametrize("form", HEADERS.values(), ids=HEADERS)
def test_headers_of_other_forms(tmp_path, form):
    ending, header, separator, *row = form
    tiny.table(tmp_path, ROWS[:1])
    table = tmp_path / f"t{ending}"
    table.write_text(
        f"{header}\n{separator.join(*row or [ROW])}\n\n{separator.strip() * 3}\n", encoding="utf-8", newline=""
    )
    (item,) = load_corpus("table", "--root", table).items if separator.strip() else read("table", "--root", table)
    assert (item.split, *item.captions) == ("dev", Caption("s/1a.wav", tmp_path / "s/1a.wav", "a dog", "anna"))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("image,audio,audio", "line 1: column audio occurs 2 times"),
        ("image,Audio, audio", "line 1: column audio occurs 2 times"),
        ("image,audio,notes,notes", "line 1: column notes occurs 2 times"),
        ("sep=;\nimage;audio;image", "line 2: column image occurs 2 times"),
        (
            "image_path,wav,caption",
            "line 1: no column image and no column audio: it has 'image_path', 'wav', 'caption'",
        ),
        ("image;wav", "line 1: no column image .* it has 'image;wav'; .* separated by commas"),
        ("image|audio", r"line 1: no column image and no column audio: it has 'image\|audio'"),
        ("", "line 1: no column image and no column audio: it has nothing"),
        ('"image,audio', "quote not closed"),
        (",".join(f"c{n}" for n in range(20)), "'c11' and 8 more"),
    ],
)
def test_mistakes_in_headers(tmp_path, header, reason):
    (tmp_path / "t.csv").write_text(f"{header}\n")
    with pytest.raises(UserError, match=reason):
        read("table", "--root", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("image,audio,texts\np/1.png,s/1a.wav,a dog\n", "'texts'"), (lines({**ROWS[0], "duration": 3}), "'duration'")],
)
def test_columns_that_are_not_read_are_reported(tmp_path, caplog, text, message):
    root = tiny.table(tmp_path, ROWS[:1])
    table = root / ("t.jsonl" if text[0] == "{" else "t.csv")
    table.write_text(text)
    read("table", "--root", table)
    assert f"{message}; known columns: image, audio, text" in caplog.text


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("p/2.png,s/2.wav", "line 3: number of fields differs from line 1"),
        ("p/2.png,s/2.wav,a dog, running", "line 3: number of fields differs from line 1"),
        ("p/2.png,,a dog", "line 3: audio is empty"),
        ("https://example.org/a.jpg,s/2.wav,", "line 3: image is the URL 'https://example.org/a.jpg'"),
    ],
)
def test_bad_rows_are_named_or_dropped(tmp_path, line, reason):
    root = tiny.table(tmp_path, ROWS)
    table = root / "t.csv"
    table.write_text(f'image,audio,text\np/1.png,s/1a.wav,"one"\n{line}\np/2.png,s/2.wav,two\n')
    with pytest.raises(UserError, match=reason):
        read("table", "--root", table)
    corpus = load_corpus("table", "--root", table, "--skip-bad")
    assert [item.image_id for item in corpus.items] == ["p/1.png", "p/2.png"]
    assert [one.name for one in corpus.dropped] == [f"{table} line 3"]


def test_a_table_without_usable_rows(tmp_path):
    (tmp_path / "t.csv").write_text("image,audio\na.jpg,\n")
    with pytest.raises(UserError, match=r"no sample is left to write: .*t\.csv line 2: audio is empty"):
        load_corpus("table", "--root", tmp_path, "--skip-bad")
