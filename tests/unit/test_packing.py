"""`atelier pack`: what it writes, what it leaves out, and that others can read it."""

import tarfile

import pytest
from picture_folder import png, write_scenes

from cli.main import main
from common.errors import DataError
from data.packing import pack
from data.shards import Shards, build_index, find_shards


def test_every_picture_and_caption_comes_back(tmp_path):
    folder = write_scenes(tmp_path / "scenes", 7)
    packed = pack(folder, tmp_path / "out", per_shard=3)
    assert [p.name for p in packed.shards] == [f"scenes-00000{n}.tar" for n in range(3)]
    assert (packed.samples, packed.left_out) == (7, ())
    for path in packed.shards:
        with tarfile.open(path) as tar:
            for member in tar:
                assert tar.extractfile(member).read() == (folder / member.name).read_bytes()
    index = build_index(find_shards(str(tmp_path / "out")))
    assert index.faults == ()
    captions = {Shards(index, 48, 0)[p].caption for p in range(7)}
    assert captions == {path.read_text() for path in folder.glob("*.txt")}


def test_another_library_reads_the_shards(tmp_path):
    from datasets import load_dataset

    folder = write_scenes(tmp_path / "scenes", 5)
    shards = pack(folder, tmp_path / "out", per_shard=2).shards
    rows = load_dataset(
        "webdataset",
        data_files={"train": [str(p) for p in shards]},
        split="train",
        streaming=True,
    )
    found = {row["__key__"]: (row["txt"], row["png"].size) for row in rows}
    assert found == {p.stem: (p.read_text(), (48, 48)) for p in folder.glob("*.txt")}


def test_the_same_folder_gives_the_same_bytes(tmp_path):
    folder = write_scenes(tmp_path / "scenes", 3)
    one, two = (pack(folder, tmp_path / name).shards[0] for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_edits_in_subfolders_keep_their_reference(tmp_path):
    folder = tmp_path / "edits" / "a.b"
    folder.mkdir(parents=True)
    (folder / "x.png").write_bytes(png((1, 2, 3)))
    (folder / "x.reference.png").write_bytes(png((4, 5, 6)))
    (folder / "x.txt").write_text("make it brighter")
    [shard] = pack(tmp_path / "edits", tmp_path / "out").shards
    sample = Shards(build_index([shard], references=True), 48, 0)[0]
    assert tuple(sample.image[0, 0]) == (1, 2, 3)
    assert tuple(sample.reference[0, 0]) == (4, 5, 6)


def test_endings_may_be_written_in_capitals(tmp_path):
    folder = tmp_path / "edits"
    folder.mkdir()
    for name, color in (("a[1].PNG", (1, 2, 3)), ("a[1].reference.PNG", (4, 5, 6))):
        (folder / name).write_bytes(png(color))
    (folder / "a[1].TXT").write_text("make it brighter")
    [shard] = pack(folder, tmp_path / "out").shards
    sample = Shards(build_index([shard], references=True), 48, 0)[0]
    assert tuple(sample.reference[0, 0]) == (4, 5, 6)
    assert sample.caption == "make it brighter"


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    folder = tmp_path / "scenes"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    (folder / "a.txt").write_text("a red circle", encoding="utf-8-sig")
    [shard] = pack(folder, tmp_path / "out").shards
    assert Shards(build_index([shard]), 48, 0)[0].caption == "a red circle"


def test_what_cannot_be_packed_is_left_out_and_named(tmp_path, capsys):
    folder = write_scenes(tmp_path / "scenes", 2)
    (folder / "broken.png").write_bytes(png()[:50])
    (folder / "broken.txt").write_text("x")
    (folder / "silent.png").write_bytes(png())
    (folder / "hollow.png").write_bytes(png())
    (folder / "hollow.txt").write_text("\n")
    (folder / "marked.png").write_bytes(png())
    (folder / "marked.txt").write_bytes(b"\xef\xbb\xbf\n")
    (folder / "album.jpg").mkdir()
    (folder / "album.png").write_bytes(png())
    (folder / "album.txt").write_text("beside a folder of its name")
    (folder / "dead.png").symlink_to(folder / "absent.png")
    assert main(["pack", str(folder), str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    reasons = {"broken": "", "silent": "silent.txt", "hollow": "empty", "marked": "empty"}
    reasons |= {"album.jpg": "directory", "dead.png": "No such file"}
    for name, reason in reasons.items():
        assert any(name in line and reason in line for line in told.splitlines())
    assert "packed 3 pictures into 1 shard" in told


@pytest.mark.parametrize("trouble", ["no folder", "no pictures", "no captions", "one key twice"])
def test_a_folder_that_cannot_be_packed_leaves_nothing_behind(tmp_path, trouble):
    folder = tmp_path / "pictures"
    if trouble != "no folder":
        folder.mkdir()
    if trouble == "no captions":
        (folder / "a.png").write_bytes(png())
    if trouble == "one key twice":
        for name in ("a.b", "a_b"):
            (folder / f"{name}.png").write_bytes(png())
            (folder / f"{name}.txt").write_text("x")
    with pytest.raises(DataError, match="Fix:"):
        pack(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] in ([], ["pictures"])


def test_pack_never_writes_over_anything(tmp_path):
    folder = write_scenes(tmp_path / "scenes", 1)
    assert main(["pack", str(folder), str(folder)]) == 2
