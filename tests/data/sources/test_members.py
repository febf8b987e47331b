"""Shards from elsewhere: which member is the image of a key and which its label, what is refused, what is counted."""

import gzip
import io
import json
import tarfile

import pytest
from PIL import Image

from moco.data import open_sources
from moco.data.checks import class_labels
from moco.data.sources.members import split_name
from moco.data.sources.shards import CLASS_NAMES, open_shards
from moco.errors import UserError


def jpg(red=0):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 9, 9)).save(file, "PNG")
    return file.getvalue()


def shard(path, *members):
    """A tar file of members: names alone are images, the others (name, content)."""
    with tarfile.open(path, "w") as tar:
        for number, one in enumerate(members):
            name, data = one if isinstance(one, tuple) else (one, jpg(number))
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def opened(tmp_path, *members):
    return open_shards(str(shard(tmp_path / "a.tar", *members)))


def names(source):
    return [source.name_of(i).rpartition(":")[2] for i in range(len(source))]


def refusal(call):
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),  # of webdataset's base_plus_ext, extensions in lower case
    [
        ("a.jpg", ("a", "jpg")),
        ("a.b.c.JPG", ("a", "b.c.jpg")),
        ("v1.0/x.jpg", ("v1.0/x", "jpg")),
        ("v1.0/y.z/x.seg.png", ("v1.0/y.z/x", "seg.png")),
        ("./x.cls", ("x", "cls")),
        ("readme", ("readme", "")),
    ],
)
def test_keys_are_those_of_webdataset(name, expected):
    assert split_name(name) == expected


def test_dots_in_folders_are_no_end_of_a_key(tmp_path):
    source = opened(tmp_path, "v1.0/a.jpg", ("v1.0/a.cls", b"1"), "v1.1/a.jpg", ("v1.1/a.cls", b"0\n"))
    assert (names(source), source.labels.tolist()) == (["v1.0/a.jpg", "v1.1/a.jpg"], [1, 0])


@pytest.mark.parametrize(
    ("members", "two"),
    [
        (["a.jpg", "a.png"], "a.jpg and a.png"),
        (["a.0.jpg", "a.1.jpg"], "a.0.jpg and a.1.jpg"),
        (["a.jpg", "b.jpg", "a.jpg"], "a.jpg twice"),
        (["a.jpg", "a.JPG"], "a.jpg and a.JPG"),
        (["x.2019.01.jpg", ("x.2019.01.cls", b"0"), "x.2019.02.jpg", ("x.2019.02.cls", b"1")], "x.2019.02.cls"),
        (["a.jpg", ("a.cls", b"0"), ("a.cls", b"1")], "a.cls twice"),
        (["a.jpg", ("a.fine.cls", b"0"), ("a.coarse.cls", b"1")], "a.fine.cls and a.coarse.cls"),
        (["a.jpg", ("a.cls", b"3"), ("a.json", b'{"label": 4}')], "a.cls says 3 and a.json says 4"),
        (["a.jpg", ("a.json", b'{"label": 3, "cls": 4}')], "a.json says 3 as"),
        (["a.jpg", ("a.cls", b"-1")], "a.cls is no number"),
        (["a.jpg", ("a.cls", b"0x1f")], "a.cls is no number"),
        (["a.jpg", ("a.cls", b"[0, 1]")], "a.cls is no number"),
        (["a.jpg", ("a.cls", b'["cat", "dog"]')], "a.cls is no number"),
        (["a.jpg", ("a.cls", b"cat"), "b.jpg", ("b.cls", b"3")], "b.jpg is 3"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused_by_name(tmp_path, members, two):
    said = refusal(lambda: opened(tmp_path, *members))
    assert two in said
    assert "a.tar" in said


def test_masks_beside_images_are_counted_and_not_read(tmp_path):
    members = ["b.seg.png", "b.jpg", ("b.cls", b"1"), "a.JPEG", "a.mask.png", ("a.cls", b"0")]
    source = opened(tmp_path, *members, "lone.mask.png")
    assert (names(source), source.labels.tolist()) == (["b.jpg", "a.JPEG"], [1, 0])
    assert source.load(0).getpixel((0, 0))[0] == 1  # not the mask's pixels
    assert source.found.passed_over[".png"] == 2
    assert any(
        "2 images beside the one of the key not read (1 .seg.png, 1 .mask.png)" in note for note in source.found.notes
    )
    assert any("1 key with no other image than such a one left out" in note for note in source.found.notes)


def test_one_image_with_a_longer_extension_is_the_image(tmp_path):
    source = opened(tmp_path, "a.rgb.jpg", ("a.cls", b"0"), "b.rgb.jpg", ("b.cls", b"1"))
    assert (len(source), source.labels.tolist()) == (2, [0, 1])


@pytest.mark.parametrize("ending", [b"", b"\n", b" \r\n"])
@pytest.mark.parametrize("write", ["{}", '"{}"', '{{"label": "{}", "id": 5}}'])
def test_names_as_labels(tmp_path, write, ending):
    labels = [write.format(name).encode() + ending for name in ("dog", "cat", "dog", "two words")]
    members = [part for i, label in enumerate(labels) for part in (f"{i}.jpg", (f"{i}.cls", label))]
    source = opened(tmp_path, *members)
    assert source.classes == ["cat", "dog", "two words"]
    assert source.labels.tolist() == [1, 0, 1, 2]
    assert any(
        "the labels are names, numbered in this order: cat, dog, two words (3 in all)" in note
        for note in source.found.notes
    )
    (tmp_path / CLASS_NAMES).write_text("two words\ndog\ncat")  # without a line break at its end
    source = opened(tmp_path, *members)
    assert source.labels.tolist() == [1, 2, 1, 0]
    assert source.classes == ["two words", "dog", "cat"]
    (tmp_path / CLASS_NAMES).write_text("cat\ntwo words\n")
    assert "the label of 0.jpg is dog, which is not in classes.txt" in refusal(lambda: opened(tmp_path, *members))


@pytest.mark.parametrize("entry", [{"label": 2}, {"cls": 2}, {"label": 2, "cls": 2}, {"label": "2"}, 2])
def test_labels_in_json(tmp_path, entry):
    other = json.dumps({"label": 0, "caption": "a label"}).encode()
    members = ["a.jpg", ("a.json", json.dumps(entry).encode()), "b.jpg", ("b.json", other)]
    if entry == 2:  # a number alone is no dictionary of a label
        members[1] = ("a.cls", b'{"label": 2}')
    source = opened(tmp_path, *members)
    assert source.labels.tolist() == [2, 0]
    assert any("KEY.json" in note for note in source.found.notes)


@pytest.mark.parametrize("odd", [[1, 2], -1, 0.5, 3.0, True, {"x": 1}, "", "1e3"])
def test_a_label_in_json_that_is_no_class_is_none(tmp_path, odd):
    content = json.dumps({"label": odd}).encode()
    source = opened(tmp_path, "a.jpg", ("a.json", content), "b.jpg", ("b.json", b'{"label": 1}'))
    assert source.labels is None
    assert any("1 file KEY.json with a label that is no class, the first a.json" in note for note in source.found.notes)
    assert any("1 of 2 images have no label" in note for note in source.found.notes)


def test_json_of_boxes_and_null_hold_no_label(tmp_path):
    boxes = b'[{"label": 3, "box": [0, 0, 1, 1]}, {"label": 4}]'
    source = opened(tmp_path, "a.jpg", ("a.json", boxes), "b.jpg", ("b.json", b'{"label": null}'))
    assert (source.labels, source.found.notes) == (None, [])


def test_json_and_text_without_labels_are_captions(tmp_path):
    source = opened(tmp_path, "a.jpg", ("a.json", b'{"caption": "cat"}'), ("a.txt", b"cat"), ("b.json", b"{"), "b.jpg")
    assert source.labels is None
    assert source.found.passed_over == {".json": 2, ".txt": 1}
    assert any("1 file KEY.txt taken for captions, not for labels" in note for note in source.found.notes)


def test_missing_labels_are_counted_and_told_where_they_are_needed(tmp_path):
    members = ["a.jpg", ("a.cls", b"0"), "b.jpg", "c.jpg", ("d.cls", b"1"), "e.jpg", ("e.cls", b"1")]
    source = opened(tmp_path, *members)
    first = f"{tmp_path}/a.tar:b.jpg"
    assert source.labels is None
    assert source.classes is None
    assert f"2 of 4 images have no label, the first {first}: all are read as unlabelled" in source.found.notes[-1]
    assert "1 label without an image in the same shard, the first d.cls" in source.found.notes[0]
    assert f"has no labels (2 of 4 images lack one, the first {first})" in refusal(
        lambda: class_labels(source, "supcon")
    )
    pair = open_sources(None, str(tmp_path / "a.tar"), val_path=str(tmp_path / "a.tar"))
    assert pair.train is None
    assert f"2 of 4 images lack one, the first {first}" in pair.no_pair


def test_files_of_a_key_need_not_be_neighbours_and_keys_are_a_shards_own(tmp_path):
    shard(tmp_path / "a.tar", "0.jpg", "1.jpg", ("0.cls", b"0"), ("1.cls", b"1"))
    shard(tmp_path / "b.tar", ("1.cls", b"0"), "0.jpg", "1.jpg", ("0.cls", b"2"))
    source = open_shards(str(tmp_path))
    assert source.labels.tolist() == [0, 1, 2, 0]
    assert source.found.layout == "shards"
    assert source.found.notes == []


def test_labels_that_count_from_one_are_told(tmp_path):
    source = opened(tmp_path, "a.jpg", ("a.cls", b"1"), "b.jpg", ("b.cls", b"2"))
    assert source.labels.tolist() == [1, 2]
    assert any("no image has the label 0, the lowest is 1" in note for note in source.found.notes)


def test_clutter_links_and_metadata_are_no_images(tmp_path):
    file = shard(
        tmp_path / "a.tar", "a.jpg", "._a.jpg", "x/._b.jpg", "__MACOSX/a.jpg", "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg",
        "./PaxHeaders.12/a.jpg", (".DS_Store", b""), "__meta__/a.jpg", "b.gif", "c.JFIF", "d.avif", "readme",
    )  # fmt: skip
    with tarfile.open(file, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo(f"{kind.decode()}.jpg")
            member.type, member.linkname = kind, "a.jpg"
            tar.addfile(member)
    source = open_shards(str(file))
    assert names(source) == ["a.jpg", "b.gif", "c.JFIF"]
    expected = {"hidden": 6, "link": 2, "metadata": 1, ".avif": 1, "no extension": 1}
    assert source.found.passed_over == expected


def test_folders_in_a_shard_are_told_to_be_no_classes(tmp_path):
    source = opened(tmp_path, "./train/cat/1.jpg", "./val/cat/2.jpg")
    assert source.labels is None
    assert any("2 folders inside the shards (train, val) are parts of names" in note for note in source.found.notes)


@pytest.mark.parametrize("ending", [".tar.gz", ".tgz", ".TGZ", ".tar.zst", ".tar.bz2", ".txz"])
def test_compressed_shards(tmp_path, ending):
    whole = shard(tmp_path / "b.tar", "a.jpg").read_bytes()
    packed = tmp_path / f"a{ending}"
    packed.write_bytes(gzip.compress(whole))
    for path in (packed, tmp_path):  # beside other shards
        said = refusal(lambda path=path: open_sources(None, str(path)))
        assert f"{packed} is a compressed tar file" in said
        assert "which leaves a.tar" in said
    (tmp_path / "b.tar").unlink()
    assert f"{packed} is a compressed tar file" in refusal(lambda: open_sources(None, str(tmp_path)))
    (tmp_path / "a.tar").write_bytes(whole)  # unpacked, and kept
    source = open_sources(None, str(tmp_path)).pretrain
    assert (len(source), sum(source.found.passed_over.values())) == (1, 1)


def test_a_compressed_file_that_is_called_tar(tmp_path):
    whole = shard(tmp_path / "a.tar", "a.jpg").read_bytes()
    (tmp_path / "a.tar").write_bytes(gzip.compress(whole))
    said = refusal(lambda: open_shards(str(tmp_path)))
    assert f"mv {tmp_path}/a.tar {tmp_path}/a.tar.gz && gunzip {tmp_path}/a.tar.gz" in said


def test_tar_files_inside_a_tar_file(tmp_path):
    said = refusal(lambda: opened(tmp_path, ("n01440764.tar", b"x" * 512), ("n01443537.tar", b"x" * 512)))
    assert "hold 2 tar files and no image: unpack each" in said


def test_a_sparse_member_is_refused(tmp_path):
    file = shard(tmp_path / "a.tar", "a.jpg")
    whole = bytearray(file.read_bytes())
    member = tarfile.TarInfo("b.jpg")
    member.type = tarfile.GNUTYPE_SPARSE
    whole[1024:1024] = member.tobuf(tarfile.GNU_FORMAT)
    file.write_bytes(whole)
    assert "b.jpg" in refusal(lambda: open_shards(str(file)))
