"""Folders as they come: which images are read, under which classes, as which split, and what is said of the rest."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moco.data import open_sources
from moco.data.__main__ import main
from moco.data.checks import class_labels
from moco.data.sources.names import CLUTTER_BEGINS, IMAGE_EXTENSIONS, is_clutter
from moco.data.sources.splits import find_splits
from moco.errors import UserError
from moco.eval.linear import labelled_pair


def write(folder, text: str) -> None:
    """The files of ``text``: images, tars of one image, and folders, whose names end in a slash."""
    for number, name in enumerate(text.split()):
        path = Path(folder, name)
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            continue
        if path.suffix == ".tar":
            tar_of(path, "0.png", picture(number))
        elif path.suffix.lower() in IMAGE_EXTENSIONS:
            path.write_bytes(picture(number))
        else:
            path.write_text("no image")


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((8, 6)).convert("RGB").rotate(number).save(file, "PNG")
    return file.getvalue()


def tar_of(path, name: str, data: bytes) -> None:
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def images(classes: str, count: int = 5, where: str = "", extension: str = "png") -> str:
    return " ".join(f"{where}{name}/{n}.{extension}" for name in classes.split() for n in range(count))


def read(folder, **more):
    return open_sources(path=str(folder), **more)


def names(source, folder) -> list[str]:
    return [os.path.relpath(source.name_of(i), folder) for i in range(len(source))]


def notes(source) -> str:
    return "\n".join(source.found.notes)


def mistake(folder) -> str:
    with pytest.raises(UserError) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------- archives


@pytest.mark.parametrize("left", ["old.tar", "images.tar.gz", "a.zip", "b.tgz", "x.7z", "ILSVRC2012_img_val.tar"])
def test_archives_beside_class_folders_are_named_and_left(tmp_path, left):
    write(tmp_path, f"{images('a b', 3, 'train/')} {images('a b', 2, 'val/')} train/{left} val/{left}")
    found = read(tmp_path)
    for source, each in ((found.train, 3), (found.val, 2)):
        assert source.classes == ["a", "b"]
        assert source.labels.tolist() == [0] * each + [1] * each
        assert f"{left} in {source.name} not read, as there are images beside it" in notes(source)
        assert sum(source.found.passed_over.values()) == 1


def test_a_folder_of_tars_stays_shards(tmp_path):
    write(
        tmp_path, "s/0.tar s/1.tar s/README.md s/logs/x.txt p/0.tar p/1.tar p/preview.png one/0.tar one/0.png one/1.png"
    )
    assert len(read(tmp_path / "s").pretrain.shards) == 2
    few = read(tmp_path / "p").pretrain
    assert len(few.shards) == 2
    assert "the tar shards are read, not the 1 images beside them" in notes(few)
    assert names(read(tmp_path / "one").pretrain, tmp_path) == ["one/0.png", "one/1.png"]


def test_shards_packed_here_stay_shards_whatever_lies_beside_them(tmp_path):
    write(tmp_path, images("a b", 3, "d/train/"))
    assert main(["pack", str(tmp_path / "d"), str(tmp_path / "out")]) == 0
    write(tmp_path, images("x y", 3, "out/train/"))
    source = read(tmp_path / "out").pretrain
    assert (len(source), source.classes) == (6, ["a", "b"])


def test_a_tar_of_tars_says_how_to_unpack(tmp_path):
    write(tmp_path, "d/")
    tar_of(tmp_path / "d" / "ILSVRC2012_img_train.tar", "n01440764.tar", b"x" * 512)
    said = mistake(tmp_path / "d")
    assert "ILSVRC2012_img_train.tar holds tar files (n01440764.tar first)" in said
    assert f"cd {tmp_path / 'd'}; tar -xf ILSVRC2012_img_train.tar" in said


def test_a_tar_a_class_without_labels_is_told(tmp_path):
    write(tmp_path, "n01440764.tar n01443537.tar")
    source = read(tmp_path).pretrain
    assert source.labels is None
    assert "unpack each into a folder of its name for classes" in notes(source)


def test_archives_alone_are_to_be_unpacked(tmp_path):
    write(tmp_path, "a.zip b.7z")
    assert mistake(tmp_path).endswith(f"unpack {tmp_path / 'a.zip'}, {tmp_path / 'b.7z'}")


# ------------------------------------------------------------------------------------- folders that are no classes


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        ("JPEGImages/0.jpg JPEGImages/1.jpg Annotations/0.xml ImageSets/Main/train.txt", "JPEGImages"),
        ("JPEGImages/0.jpg Annotations/ SegmentationClass/0.png SegmentationObject/0.png", "JPEGImages"),
        ("VOC2007/JPEGImages/0.jpg VOC2007/Annotations/0.xml VOC2007/SegmentationClass/0.png", "VOC2007/JPEGImages"),
        ("images/0.jpg images/1.jpg annotations/trimaps/0.png", "images"),
        ("images/0.jpg labels/0.txt", "images"),
        ("2020/0.jpg 2020/1.jpg 2021/", "2020"),
        ("photos/0.png export/", "photos"),
    ],
)
def test_one_folder_of_images_beside_others_is_read_without_classes(tmp_path, files, chosen):
    write(tmp_path / "d", files)
    source = read(tmp_path / "d").pretrain
    expected = sorted(name for name in files.split() if name.startswith(chosen) and not name.endswith("/"))
    assert names(source, tmp_path / "d") == expected
    assert source.labels is None
    assert "alone is read" in notes(source)
    with pytest.raises(UserError, match="alone holds images, which makes no classes"):
        class_labels(source, "supcon")
    with pytest.raises(UserError, match="a probe needs"):
        labelled_pair(read(tmp_path / "d"))


def test_coco_is_read_by_its_splits(tmp_path):
    write(tmp_path, "train2017/0.jpg train2017/1.jpg val2017/2.jpg annotations/instances.json unlabeled2017/3.jpg")
    sources = read(tmp_path)
    assert names(sources.pretrain, tmp_path) == ["train2017/0.jpg", "train2017/1.jpg"]
    assert "train2017 has no labels" in sources.no_pair
    said = notes(sources.pretrain)
    assert f"train2017 in {tmp_path} is read as train" in said
    assert f"val2017 in {tmp_path} is read as val" in said
    assert "unlabeled2017" in said


def test_cub_is_read_by_its_class_folders(tmp_path):
    write(tmp_path, images("001.Auk 002.Jay", 2, "images/") + " attributes/attributes.txt parts/parts.txt images.txt")
    source = read(tmp_path).pretrain
    assert source.classes == ["001.Auk", "002.Jay"]
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert "the folder images alone is read" in notes(source)


@pytest.mark.parametrize("empty", ["m/", "m/readme.txt", "m/0.json", "m/deep/er/"])
def test_an_empty_class_folder_is_no_class_and_labels_go_by_name(tmp_path, empty):
    write(tmp_path, f"{images('a z', 2, 'train/')} train/{empty} {images('z', 2, 'val/')}")
    sources = read(tmp_path)
    assert sources.train.classes == ["a", "z"]
    assert sources.val.labels.tolist() == [1, 1]
    assert f"m in {tmp_path / 'train'} holds no image" in notes(sources.train)
    write(tmp_path, images("m", 1, "val/"))
    sources = read(tmp_path)
    assert "has classes that" in sources.no_pair
    assert "(m)" in sources.no_pair


@pytest.mark.parametrize(
    ("kind", "said"), [("heic", "3 .heic"), ("AVIF", "3 .avif"), ("dcm", "3 .dcm"), ("cr2", "3 .cr2")]
)
def test_a_class_of_other_formats_is_refused_by_name(tmp_path, kind, said):
    write(tmp_path, images("cat dog", 3) + " " + images("fox", 3, extension=kind))
    assert f"the class folder {tmp_path / 'fox'} holds no image that can be read, but {said}: convert" in mistake(
        tmp_path
    )


@pytest.mark.parametrize(("files", "said"), [
    (images("a b", 2, extension="npz"), "there are 4 .npz, convert the images to PNG or JPEG"),
    (images("a b", 2, extension="heic"), "there are 4 .heic, convert the images to PNG or JPEG"),
    ("a/0.xml a/1.xml b/2.txt c", "check the path; there are 2 .xml, 1 .txt, 1 no extension"),
    ("a/", "or below: check the path"),
])  # fmt: skip
def test_nothing_but_other_files_says_what_there_is(tmp_path, files, said):
    write(tmp_path / "d", files)
    assert mistake(tmp_path / "d").endswith(said)


@pytest.mark.parametrize(("extension", "format"), [
    ("jpe", "JPEG"), ("jfif", "JPEG"), ("gif", "GIF"), ("GIF", "GIF"), ("JPG", "JPEG"), ("Jpeg", "JPEG"),
])  # fmt: skip
def test_names_of_formats_that_are_read(tmp_path, extension, format):
    write(tmp_path, images("a b", 2))
    Image.new("RGB", (12, 10), (200, 0, 0)).save(tmp_path / "a" / f"z.{extension}", format=format)
    source = read(tmp_path).pretrain
    assert names(source, tmp_path) == ["a/0.png", "a/1.png", f"a/z.{extension}", "b/0.png", "b/1.png"]
    assert source.load(2).size == (12, 10)
    assert source.load(2).getpixel((0, 0))[0] > 190


def test_what_is_passed_over_is_counted_by_its_kind(tmp_path):
    write(tmp_path, f"{images('a b', 2)} a/x.avif a/y.AVIF b/n.txt b/old.tar.gz a/LICENSE b/.DS_Store b/._0.png c.xml")
    found = read(tmp_path).pretrain.found
    assert found.layout == "folders"
    expected = {".avif": 2, ".txt": 1, ".tar.gz": 1, "no extension": 1, "hidden": 2, ".xml": 1}
    assert found.passed_over == expected


# -------------------------------------------------------------------------------------------------------- clutter


@pytest.mark.parametrize(
    "clutter",
    [
        "__MACOSX/a/._0.png",
        "__MACOSX/a/0.png",
        "@eaDir/0.png/SYNOPHOTO_THUMB_XL.jpg",
        "a/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
        "$RECYCLE.BIN/x.jpg",
        "lost+found/x.png",
        ".thumbnails/0.png",
        ".ipynb_checkpoints/0-checkpoint.png",
        "#recycle/x.png",
        ".Trash-1000/files/0.png",
        "a/Thumbs.db",
        "desktop.ini",
        "a/SYNOPHOTO_THUMB_B.jpg",
        ".git/x.png",
        "a/~$0.png",
        "FOUND.000/0.png",
        "@Recycle/0.png",
    ],
)
def test_what_systems_leave_is_no_class_and_no_image(tmp_path, clutter):
    write(tmp_path, f"{images('a b', 2)} {clutter}")
    source = read(tmp_path).pretrain
    assert source.classes == ["a", "b"]
    assert names(source, tmp_path) == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    assert source.found.passed_over == {"hidden": 1}


def test_system_volume_information_and_flat_folders(tmp_path):
    (tmp_path / "System Volume Information").mkdir()
    write(tmp_path / "System Volume Information", "x.png")
    write(tmp_path, "0.png ._0.png @eaDir/0.png/SYNOPHOTO_THUMB_XL.jpg Thumbs.db")
    assert names(read(tmp_path).pretrain, tmp_path) == ["0.png"]


def test_clutter_with_the_name_of_an_image_is_looked_at():
    """What the scan of a folder asks of a name before it compares the rest."""
    hidden = ["._x.jpg", ".x.png", "SYNOPHOTO_THUMB_XL.jpg", "synofile_thumb_m.jpg", "~$x.jpg"]
    assert all(is_clutter(name) and name[0] in CLUTTER_BEGINS for name in hidden)
    assert not any(is_clutter(name) for name in ("s.jpg", "~x.jpg", "Sun.png"))


# --------------------------------------------------------------------------------------------------- stray images


def test_a_few_images_beside_class_folders_are_left_out_by_name(tmp_path):
    write(tmp_path, images("a b", 4) + " stray.png other.JPG")
    source = read(tmp_path).pretrain
    assert (source.classes, len(source)) == (["a", "b"], 8)
    assert f"2 images beside the class folders of {tmp_path} left out (other.JPG, stray.png)" in notes(source)
    assert source.found.passed_over == {"loose": 2}


def test_a_folder_of_images_with_folders_is_read_whole(tmp_path):
    write(tmp_path, "flat/0.png flat/1.png flat/2.png flat/b/3.png flat/c/4.png one/0.png " + images("b", 9, "one/"))
    source = read(tmp_path / "flat").pretrain
    assert (len(source), source.labels) == (5, None)
    assert "flat has no classes: 3 of its 5 images lie beside its 2 folders (b, c)" in notes(source)
    source = read(tmp_path / "one").pretrain
    assert (len(source), source.labels, source.found.notes) == (10, None, [])


# --------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train", "valid"),
        ("Train", "Val"),
        ("training", "validation"),
        ("TRAIN", "TEST"),
        ("train2017", "val2017"),
        ("training_set", "test_set"),
        ("train", "dev"),
        ("trainval", "test"),
        ("Training", "Testing"),
        ("train_images", "val_images"),
        ("ILSVRC2012_img_train", "ILSVRC2012_img_val"),
        ("train-2014", "val-2014"),
        ("train", "testing"),
        ("train", "held-out"),
    ],
)
def test_splits_in_other_spellings(tmp_path, train, val):
    write(tmp_path, f"{images('a b', 2, train + '/')} {images('b', 1, val + '/')}")
    sources = read(tmp_path)
    assert (sources.train.name, sources.val.name) == (str(tmp_path / train), str(tmp_path / val))
    assert sources.val.labels.tolist() == [1]
    said = notes(sources.train)
    for name in (train, val):
        assert (f"{name} in {tmp_path} is read as " in said) == (name not in ("train", "val", "test"))


@pytest.mark.parametrize(
    ("there", "train", "val"),
    [
        ("train Train val", "train", "val"),
        ("train val valid validation", "train", "val"),
        ("train valid test", "train", "valid"),
        ("training Train val", "Train", "val"),
        ("train2017 val2014 val2017", "train2017", "val2017"),
        ("train trainval val", "train", "val"),
        ("Train2012 trainval test", "Train2012", "test"),
    ],
)
def test_which_of_several_spellings(tmp_path, there, train, val):
    write(tmp_path, " ".join(images("a b", 2, f"{split}/") for split in there.split()))
    sources = read(tmp_path)
    assert (sources.train.name, sources.val.name) == (str(tmp_path / train), str(tmp_path / val))
    told = set(there.split()) - {train, val, "test"}
    assert all(name in notes(sources.train) for name in told)


@pytest.mark.parametrize("pair", [("train2014", "train2017"), ("Train", "TRAIN")])
def test_two_equal_training_sets_are_refused(tmp_path, pair):
    write(tmp_path, " ".join(images("a b", 1, f"{split}/") for split in (*pair, "val")))
    assert f"{tmp_path} holds {' and '.join(sorted(pair))}, each of which may be the training images" in mistake(
        tmp_path
    )


def test_two_equal_held_out_sets_are_told(tmp_path):
    write(tmp_path, " ".join(images("a b", 1, f"{split}/") for split in ("train", "val2014", "val2017")))
    sources = read(tmp_path)
    assert sources.val is None
    assert "val2014 and val2017" in notes(sources.pretrain)
    assert read(tmp_path, val_path=str(tmp_path / "val2017")).val.labels.tolist() == [0, 1]


def test_a_split_that_is_a_class(tmp_path):
    vehicles = "bus car plane ship train"
    write(
        tmp_path, f"{images(vehicles, 2, 'v/')} {images('a b c d test', 2, 't/')} {images('a b test val', 2, 'two/')}"
    )
    source = read(tmp_path / "v").pretrain
    assert source.classes == vehicles.split()
    assert "is read as class folders, train among them" in notes(source)
    assert read(tmp_path / "t").pretrain.classes == ["a", "b", "c", "d", "test"]
    assert read(tmp_path / "two").pretrain.classes == ["a", "b", "test", "val"]
    assert find_splits(str(tmp_path / "t")).paths == {}


def test_what_lies_beside_the_splits_is_told(tmp_path):
    write(tmp_path, f"{images('a b', 2, 'train/')} {images('a b', 1, 'val/')} extra/0.png logs/x.txt 0.png")
    sources = read(tmp_path)
    assert (len(sources.train), len(sources.val)) == (4, 2)
    said = notes(sources.train)
    assert f"extra in {tmp_path} not read, as there is train" in said
    assert "logs" not in said
    assert f"the images directly in {tmp_path} (1) not read" in said


@pytest.mark.parametrize("around", ["imagenet", "ILSVRC/Data/CLS-LOC", "images"])
def test_a_folder_around_the_splits(tmp_path, around):
    write(tmp_path, f"{images('a b', 2, f'{around}/train/')} {images('b', 1, f'{around}/val/')}")
    write(
        tmp_path,
        "ILSVRC/Annotations/x.xml ILSVRC/ImageSets/y.txt" if "ILSVRC" in around else "labels/train/0.txt readme.md",
    )
    sources = read(tmp_path)
    assert sources.train.name == str(tmp_path / around / "train")
    assert sources.val.labels.tolist() == [1]
    assert f"{tmp_path / around} is read, the one folder with splits in {tmp_path}" in notes(sources.train)


def test_a_folder_around_the_classes(tmp_path):
    write(tmp_path, images("cat dog", 2, "dataset/"))
    source = read(tmp_path).pretrain
    assert (source.classes, source.labels.tolist()) == (["cat", "dog"], [0, 0, 1, 1])
    assert "the folder dataset alone is read" in notes(source)


def test_splits_inside_of_classes_are_told(tmp_path):
    write(tmp_path, " ".join(images("train val", 2, f"{name}/") for name in ("cat", "dog")))
    source = read(tmp_path).pretrain
    assert source.labels.tolist() == [0] * 4 + [1] * 4
    assert f"every class folder of {tmp_path} holds train, val: their images are read as one set" in notes(source)


# -------------------------------------------------------------------------------------------------- no labels needed


def test_classes_that_differ_stop_a_probe_alone(tmp_path):
    write(tmp_path, images("a b", 2, "train/") + " " + images("a c", 1, "val/"))
    sources = read(tmp_path)
    assert (sources.pretrain.labels.tolist(), sources.train, sources.val) == ([0, 0, 1, 1], None, None)
    assert "val has classes that" in sources.no_pair
    with pytest.raises(
        UserError, match=r"val has classes that .*train lacks \(c\): give both the same classes: a probe"
    ):
        labelled_pair(sources)
    with pytest.raises(UserError, match="has classes that"):
        read(tmp_path, val_path=str(tmp_path / "val"))


@pytest.mark.parametrize(("val", "why"), [("val/0.png val/1.png", "val has no labels"), ("val/", "no image (")])
def test_held_out_images_without_classes_stop_no_pretraining(tmp_path, val, why):
    write(tmp_path, f"{images('a b', 2, 'train/')} {val}")
    sources = read(tmp_path)
    assert len(sources.pretrain) == 4
    assert sources.train is None
    assert why in sources.no_pair


def test_damaged_held_out_shards_are_refused(tmp_path):
    write(tmp_path, images("a b", 2, "train/") + " val/0.tar")
    Path(tmp_path, "val", "0.tar").write_bytes(b"nothing of a tar")
    assert "cannot be read as an uncompressed tar file" in mistake(tmp_path)


# ------------------------------------------------------------------------------------------------------- commands


def test_index_and_pack_read_the_same_folders_and_say_what_they_guess(tmp_path, capsys):
    write(tmp_path, images("a b", 2, "d/Train/") + " " + images("b a", 1, "d/validation/") + " d/Train/old.tar")
    assert main(["pack", str(tmp_path / "d"), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"Train in {tmp_path / 'd'} is read as train" in said
    assert "old.tar in" in said
    packed, files = read(tmp_path / "out"), read(tmp_path / "d")
    assert (len(packed.train), packed.val.labels.tolist()) == (4, files.val.labels.tolist())
    assert sorted(np.array(packed.train.load(i)).sum() for i in range(4)) == sorted(
        np.array(files.train.load(i)).sum() for i in range(4)
    )
    assert main(["index", str(tmp_path / "d")]) == 0
    assert f"Train in {tmp_path / 'd'} is read as train" in capsys.readouterr().out
    index = read(tmp_path / "d" / "imagenet.train.index.jsonl").pretrain
    assert index.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("beside", "told"),
    [
        ("a/masks/0.png b/masks/0.png b/masks/1.png", "masks in the class folders of {} (3 images) not read"),
        ("a/gt/0.png a/Annotations/deep/0.png", "Annotations, gt in the class folders of {} (2 images) not read"),
        ("a/masks/notes.txt b/labels/0.txt", ""),
    ],
)
def test_masks_in_class_folders_are_no_images(tmp_path, beside, told):
    write(tmp_path, f"{images('a b', 3, '', 'jpg').replace('/', '/images/')} {beside}")
    source = read(tmp_path).pretrain
    assert (source.classes, source.labels.tolist()) == (["a", "b"], [0] * 3 + [1] * 3)
    assert {name.split("/")[1] for name in names(source, tmp_path)} == {"images"}
    assert (told.format(tmp_path) in notes(source)) if told else ("not read" not in notes(source))


def test_voc_of_two_years_is_read_without_its_masks(tmp_path):
    write(tmp_path, " ".join(f"VOC{y}/{d}/{y}.png" for y in (2007, 2012) for d in ("JPEGImages", "SegmentationClass")))
    assert names(read(tmp_path).pretrain, tmp_path) == ["VOC2007/JPEGImages/2007.png", "VOC2012/JPEGImages/2012.png"]


def test_folders_beside_masks_that_are_classes_stay_images(tmp_path):
    write(tmp_path, images("label_a label_b", 2, "x/") + " " + images("label_a label_c", 2, "y/"))
    assert read(tmp_path).pretrain.labels.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("cars_train", "cars_test"), ("seg_train", "seg_test"), ("Final_Training", "Final_Test"),
        ("DIV2K_train_HR", "DIV2K_valid_HR"), ("train_mini", "val"), ("my.data-train", "my.data-val"),
    ],
)  # fmt: skip
def test_splits_behind_a_common_beginning(tmp_path, train, val):
    write(tmp_path, f"{images('a b', 3, train + '/')} {images('a b', 2, val + '/')} devkit/x.mat")
    found = read(tmp_path)
    assert (len(found.train), len(found.val), found.train.classes) == (6, 4, ["a", "b"])
    assert f"{train} in {tmp_path} is read as train" in notes(found.train)


@pytest.mark.parametrize(
    "classes", ["bullet_train car steam_train", "a_test a_train b_test b_train", "day_train night_test"]
)
def test_classes_that_end_as_splits_do(tmp_path, classes):
    write(tmp_path, images(classes, 2))
    assert read(tmp_path).pretrain.classes == classes.split()


@pytest.mark.parametrize("name", ["test", "Val", "valid", "test2017"])
def test_a_class_that_may_be_held_out_is_told(tmp_path, name):
    write(tmp_path, images(f"cat dog {name}", 2))
    source = read(tmp_path).pretrain
    assert source.classes == sorted(["cat", "dog", name])
    assert f"{name} in {tmp_path} read as a class like the others" in notes(source)


def test_same_folders_in_all_class_folders_are_told(tmp_path):
    write(tmp_path, images("bike mug", 2, "amazon/") + " " + images("bike mug", 2, "dslr/"))
    assert f"every class folder of {tmp_path} holds bike, mug" in notes(read(tmp_path).pretrain)


def test_a_folder_around_the_folder_of_class_folders(tmp_path):
    write(tmp_path, images("001.a 002.b", 2, "CUB/CUB_200_2011/images/") + " CUB/attributes.txt")
    assert read(tmp_path).pretrain.classes == ["001.a", "002.b"]


def test_a_link_to_the_folder_itself_is_no_class(tmp_path):
    write(tmp_path, images("a b", 2, "set/"))
    (tmp_path / "set" / "loop").symlink_to(".")
    (tmp_path / "set" / "up").symlink_to("..")
    (tmp_path / "set" / "c").symlink_to("a")
    source = read(tmp_path / "set").pretrain
    assert (source.classes, len(source)) == (["a", "b", "c"], 6)


def test_shards_of_two_splits_in_one_folder_are_told(tmp_path):
    write(tmp_path, "set/in1k-train-0.tar set/in1k-validation-0.tar one/trainset-0.tar one/trainset-1.tar")
    said = f"the shards of {tmp_path}/set are of train and val, and all are read as one set"
    assert said in notes(read(tmp_path / "set").pretrain)
    assert "of train" not in notes(read(tmp_path / "one").pretrain)
