"""`atelier score`: where pictures and prompts are found, the table, the rows, the gallery."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from cli.main import main
from common.errors import DataError
from data.image_records import image_records

HOSTILE = "<script>alert(1)</script>\"' onload=x & {{ 7 * 7 }}"
REWARDS = '''
from rewards import Score
HOSTILE = __HOSTILE__

def seen(images, prompts, boost=0.0):
    """The red of the picture, with a box around its right half."""
    scores = []
    for image in images:
        width, height = image.size
        box = [width / 2, 0, width, height]
        details = {
            "objects": [
                {"label": HOSTILE, "color": "red", "score": 1, "box": box},
                {"label": "broken", "box": ["x", 0, 1, float("nan")]},
                "broken",
            ],
            "lines": [{"text": "CAB", "box": [0, 0, 2 * width, height / 4]}],
            "size": [width, height],
            "not_comparable": "made up",
        }
        scores.append(Score(image.getpixel((0, 0))[0] / 255 + boost, HOSTILE, details))
    return scores

def odd(images, prompts):
    return [None if prompt == "p1" else 2.0 for prompt in prompts]

def tagged(images, tag):
    return [float(t) for t in tag]
'''.replace("__HOSTILE__", repr(HOSTILE))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARDS)
    return tmp_path


def paint(path, red=255, size=(40, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (red, 0, 0)).save(path)


def rows_of(folder, name="scores"):
    text = (folder / name / "scores.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


# --- where pictures and prompts are ---------------------------------------------------------------


def told(records):
    return [(r["image"], r["prompt"]) for r in records]


def test_a_jsonl_file_names_pictures_beside_it(folder):
    lines = [{"image": "a/0.png", "prompt": "x", "tag": 3}, {"file_name": "1.png"}]
    (folder / "d").mkdir()
    (folder / "d" / "list.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    records = image_records(folder / "d" / "list.jsonl", prompt="y")
    assert told(records) == [("a/0.png", "x"), ("1.png", "y")]
    assert records[0]["path"] == folder / "d" / "a" / "0.png"
    assert records[0]["tag"] == 3
    (folder / "d" / "list.jsonl").rename(folder / "d" / "metadata.jsonl")
    assert image_records(folder / "d", prompt="y") == records


def test_a_line_of_jsonl_ends_at_a_line_feed_alone(folder):
    prompt = "x\u2028y\u0085z"
    row = json.dumps({"image": "0.png", "prompt": prompt}, ensure_ascii=False)
    (folder / "list.jsonl").write_text(f"{row}\r\n{row}", encoding="utf-8", newline="")
    assert told(image_records(folder / "list.jsonl")) == [("0.png", prompt)] * 2


def test_genevals_layout(folder):
    for i in (1, 0):
        for sample in (0, 1):
            paint(folder / "g" / f"{i:05d}" / "samples" / f"{sample:04d}.png")
        metadata = {
            "tag": "colors",
            "include": [{"class": "car", "count": 1}],
            "prompt": f"car {i}",
        }
        (folder / "g" / f"{i:05d}" / "metadata.jsonl").write_text(json.dumps(metadata))
    records = image_records(folder / "g")
    assert told(records) == [
        ("00000/samples/0000.png", "car 0"), ("00000/samples/0001.png", "car 0"),
        ("00001/samples/0000.png", "car 1"), ("00001/samples/0001.png", "car 1"),
    ]  # fmt: skip
    assert records[0]["metadata"]["tag"] == "colors"


def test_a_folder_with_prompts_in_text_files(folder):
    paint(folder / "f" / "b.png")
    paint(folder / "f" / "a.webp")
    (folder / "f" / "a.txt").write_text("a prompt\n")
    assert told(image_records(folder / "f", "rest")) == [("a.webp", "a prompt"), ("b.png", "rest")]
    with pytest.raises(DataError, match=r"b\.png: no prompt"):
        image_records(folder / "f")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "bad.jsonl:1: not JSON"),
        ("[]", "bad.jsonl:1: not an object"),
        ('{"prompt": "x"}', "bad.jsonl:1: no picture"),
        ('{"image": "x", "prompt": "x"}\n{"image": 3, "prompt": "x"}', "bad.jsonl:2: no picture"),
        ('{"image": "x.png"}', "bad.jsonl:1: no prompt"),
        ("", "no pictures"),
        ("\xff", "UTF-8"),
        ('{"image": "x", "prompt": "cut \\ud83d"}', "bad.jsonl:1: half a surrogate"),
    ],
)
def test_wrong_lists_are_explained(folder, text, word):
    (folder / "bad.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=word):
        image_records(folder / "bad.jsonl")
    with pytest.raises(DataError, match="no such"):
        image_records(folder / "gone")
    paint(folder / "alone.png")
    with pytest.raises(DataError, match="give the folder"):
        image_records(folder / "alone.png")


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def pictures(folder):
    lines = []
    for i, red in enumerate((255, 0, 51)):
        paint(folder / "pics" / f"{i}.png", red)
        lines.append({"image": f"{i}.png", "prompt": f"p{i}", "tag": i})
    (folder / "pics" / "torn.png").write_bytes((folder / "pics" / "0.png").read_bytes()[:60])
    lines.append({"image": "torn.png", "prompt": HOSTILE, "tag": 9})
    (folder / "pics" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "pics"


def test_table_rows_and_a_picture_that_is_refused(pictures, folder, capsys):
    arguments = ["-r", "mine.py:seen", "-r", "mine.py:odd", "--arg", "seen.boost=1"]
    assert main(["score", "pics", *arguments]) == 0
    captured = capsys.readouterr()
    lines = [line.split() for line in captured.out.splitlines()]
    assert lines[0] == ["reward", "mean", "sd", "min", "max", "scored", "ms/image"]
    assert lines[1][:6] == ["seen", "1.400", "0.432", "1.000", "2.000", "3/4"]
    assert lines[2][:6] == ["odd", "2.000", "0.000", "2.000", "2.000", "2/4"]
    assert "1 refused: pics/torn.png: " in captured.out
    assert "odd: 1 not scored: the reward returned None" in captured.out
    assert "seen: not comparable with published scores; made up" in captured.out
    assert "could not be scored" not in captured.err  # nothing is said twice
    assert max(map(len, captured.out.splitlines()[:3])) <= 80
    rows = rows_of(folder)
    assert [row["total"] for row in rows] == [4.0, None, 3.2, None]
    assert rows[2]["scores"] == {"seen": 1.2, "odd": 2.0}
    assert rows[2]["details"]["seen"]["lines"][0]["text"] == "CAB"
    assert "torn.png" in rows[3]["reasons"]["odd"]


class Page(HTMLParser):
    """Collects tags with their attributes, and the text outside of style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] != "style":
            self.text.append(data)


def test_the_gallery_is_one_escaped_file_with_pictures_boxes_and_reasons(pictures, folder):
    assert main(["score", "pics", "-r", "mine.py:seen"]) == 0
    page = Page((folder / "scores" / "gallery.html").read_text())
    names = [tag for tag, _ in page.tags]
    assert "script" not in names
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert not {"src", "href"} & {
        key
        for _, attributes in page.tags
        for key, value in attributes.items()
        if not (value or "").startswith("data:image/webp;base64,")
    }
    policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    text = " ".join(page.text)
    assert text.count(HOSTILE) == 1 + 3 + 3  # a prompt, three reasons, three boxes
    # What could not be scored comes first, then from the lowest up.
    order = re.findall(r"class=\"file\">(\w+)", (folder / "scores" / "gallery.html").read_text())
    assert order == ["torn", "1", "2", "0"]
    images = [a for tag, a in page.tags if tag == "img"]
    assert [a["alt"] for a in images] == ["p1", "p2", "p0"]
    data = base64.b64decode(images[2]["src"].split(",")[1])
    assert Image.open(io.BytesIO(data)).convert("RGB").getpixel((1, 1)) == (255, 0, 0)
    boxes = [a["style"] for tag, a in page.tags if a.get("class", "").startswith("found")]
    assert boxes[:2] == [
        "left:50.00%;top:0.00%;width:50.00%;height:100.00%",
        "left:0.00%;top:0.00%;width:100.00%;height:25.00%",
    ]
    assert len(boxes) == 6


def test_a_large_set_shows_its_lowest(folder, monkeypatch):
    monkeypatch.setattr("evals.score_gallery.MOST", 2)
    for i in range(4):
        paint(folder / "f" / f"{i}.png", 50 * i, (500, 300))
    assert main(["score", "f", "-r", "mine.py:seen", "--prompt", "x"]) == 0
    page = (folder / "scores" / "gallery.html").read_text()
    assert "The 2 of 4 pictures" in page
    found = [
        Image.open(io.BytesIO(base64.b64decode(x))) for x in re.findall(r"base64,([^\"]+)", page)
    ]
    assert [image.size for image in found] == [(360, 216)] * 2
    assert len(rows_of(folder)) == 4


def test_rewards_of_a_recipe_with_weights_and_gates(pictures, folder):
    (folder / "r.yaml").write_text(
        "extends: geneval-scenes\nname: r\nrewards: {functions: [{use: 'mine.py:seen', weight: 2}, "
        "{use: 'mine.py:tagged', only_if: {reward: seen, at_least: 0.2}}]}\n"
    )
    assert main(["score", "pics", "--recipe", "r.yaml"]) == 0
    assert [row["total"] for row in rows_of(folder)] == [2.0, 0.0, pytest.approx(0.4 + 2), None]


def test_a_cache_spares_the_second_run(pictures, folder, capsys):
    note = "    open('calls', 'a').write('x' * len(images))\n"
    (folder / "slow.py").write_text(f"def slow(images):\n{note}    return [1] * len(images)\n")
    for _ in range(2):
        assert main(["score", "pics", "-r", "slow.py:slow", "--cache", "kept.sqlite"]) == 0
    assert (folder / "calls").read_text() == "xxx"
    assert rows_of(folder) == rows_of(folder, "scores-2")


def test_wrong_use(pictures, folder, capsys):
    assert main(["score", "pics"]) == 2
    assert main(["score", "pics", "-r", "ocr", "--arg", "geneval.x=1"]) == 2
    assert main(["score", "pics", "-r", "ocr", "--out", "pics"]) == 2
    assert main(["score", "pics", "-r", "ocr"]) == 1  # p0 quotes no text
    assert "0.png" in capsys.readouterr().err
    assert main(["score", "pics", "-r", "mine.py:sen"]) == 1
    assert main(["score", "pics", "-r", "clip_score"]) == 1
    assert "--arg clip_score.weights=VALUE" in capsys.readouterr().err
    assert not (folder / "scores").exists()


def test_nothing_scored_ends_with_1(pictures, folder, capsys):
    (folder / "none.py").write_text("def none(images): return [None] * len(images)\n")
    assert main(["score", "pics", "-r", "none.py:none"]) == 1
    assert "no picture could be scored" in capsys.readouterr().err
    assert len(rows_of(folder)) == 4


def test_two_rewards_of_one_name_are_refused(folder, capsys):
    for name in ("a", "b"):
        (folder / f"{name}.py").write_text(
            "def f(images, prompts):\n    return [0.0] * len(images)\n"
        )
    arguments = ["score", str(folder), "-r", f"{folder / 'a.py'}:f", "-r", f"{folder / 'b.py'}:f"]
    assert main(arguments) == 2
    assert "two of the rewards have the same name" in capsys.readouterr().err
