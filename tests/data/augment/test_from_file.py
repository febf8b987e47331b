"""Augmentation from a YAML file: its values, what it refuses, and the words that a run records."""

import dataclasses

import pytest

from moco.data import PRESETS, get_preset
from moco.data.augment.from_file import augmentation, found_beside, one_augmentation, with_crop_min
from moco.errors import UserError


def words_of(tmp_path, text):
    path = tmp_path / "mine.yml"
    path.write_text(text)
    return augmentation(str(path))


WORDS = [
    ("preset: v2\ncrop_scale: [0.4, 1.0]\nvflip_p: .5\nturn_p: 0.75", "v2 crop_scale=0.4,1 vflip_p=0.5 turn_p=0.75"),
    ("preset: v2", "v2"),
    ("preset: v2\nhue: 1e-1\nflip_p: 0.5", "v2"),  # what it has anyway; 1e-1 is text to YAML
    ("preset: v3\ncrop_scale: [0.08, 1]", "v3-wide"),
    ("turn_p: 1\npreset: crop", "crop turn_p=1"),
    ("preset: v1\norder: [crop, flip]", "v1 order=crop,flip"),
    ("preset: v3\nothers:\n  blur_p: 0.5", "v3 others.blur_p=0.5"),
    ("preset: v2\nothers: {solarize_p: 0.2}\ngrey_p: 0", "v2 grey_p=0 others.solarize_p=0.2"),
    ("preset: digits\ndegrees: 180\nblur_p: 0.1\nblur_sigma: [0.5, 0.5]",
     "digits blur_p=0.1 blur_sigma=0.5,0.5 degrees=180"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), WORDS)
def test_the_words_hold_all_that_the_file_says(text, words, tmp_path):
    assert words_of(tmp_path, text) == words
    assert augmentation(words) == words  # what a checkpoint has can be typed again
    assert get_preset(words) == get_preset(words_of(tmp_path, text))


def test_values_of_a_file():
    preset = get_preset("v2 crop_scale=0.4,1 vflip_p=0.5 turn_p=0.75")
    expected = dataclasses.replace(
        PRESETS["v2"], crop_scale=(0.4, 1.0), vflip_p=0.5, turn_p=0.75, order=(*PRESETS["v2"].order, "vflip", "turn")
    )
    assert preset == expected


def test_a_value_is_of_all_views_where_others_does_not_say_otherwise():
    for words in ("v3 crop_scale=0.5,1 blur_p=0.3", "v3 blur_p=0.3 crop_scale=0.5,1 others.saturation=0.4"):
        preset = get_preset(words)
        assert (preset.crop_scale, preset.of_view(1).crop_scale) == ((0.5, 1.0), (0.5, 1.0))
        assert (preset.blur_p, preset.of_view(1).blur_p) == (0.3, 0.3)
        assert (preset.solarize_p, preset.of_view(1).solarize_p) == (0.0, 0.2)  # v3's own
    assert (preset.saturation, preset.of_view(1).saturation) == (0.2, 0.4)
    preset = get_preset("v2 others.solarize_p=0.2")
    assert preset.order == preset.of_view(1).order == ("crop", "jitter", "grey", "blur", "solarize", "flip")


@pytest.mark.parametrize(
    ("words", "order"),
    [
        ("cifar blur_p=0.5", "crop flip jitter grey blur"),
        ("v1 blur_p=0.5 turn_p=1", "crop grey jitter blur flip turn"),
        ("digits flip_p=0.5 grey_p=0.1", "affine crop jitter grey flip"),
        ("v2 degrees=10 solarize_p=0.1", "affine crop jitter grey blur solarize flip"),
        ("crop jitter_p=1 hue=0.1 vflip_p=1", "crop jitter vflip"),
    ],
)
def test_operations_that_a_preset_lacks_are_put_in_their_place(words, order):
    assert get_preset(words).order == tuple(order.split())


REFUSED = [
    ("crop_scale: [.1, 1]", "mine.yml: names no preset to begin with: write preset: and one of v1, v2,"),
    ("", "mine.yml must be a list of KEY: VALUE lines that begins with a preset, such as preset: v2."),
    ("- preset", "mine.yml must be a list of KEY: VALUE lines"),
    ("preset: v9", "mine.yml, line 1: preset: v9 is none"),
    ("preset: [v2]", "line 1: preset: ['v2'] is none"),
    ("preset: v2\n\ncropscale: [.1, 1]", "line 3: cropscale is no key of an augmentation (did you mean crop_scale?)"),
    ("preset: v2\nflip: 1", "line 2: flip is no key of an augmentation (did you mean flip_p?)"),
    ("preset: v2\n3: 4", "line 2: 3 is no key"),
    ("preset: v2\nflip_p: yes", "line 2: flip_p is a number from 0 to 1, not true."),
    ("preset: v2\nflip_p: 0,5", "line 2: flip_p is a number from 0 to 1, not 0,5."),
    ("preset: v2\nturn_p: 90", "line 2: turn_p is a number from 0 to 1, not 90."),
    ("preset: v2\nflip_p: -0.1", "not -0.1."),
    ("preset: v2\nflip_p: [0.5]", "not [0.5]."),
    ("preset: v2\nhue: .nan", "hue is a number from 0 to 0.5, not nan."),
    ("preset: v2\ncontrast: .inf", "contrast is a number from 0 to 100, not inf."),
    ("preset: v2\ncrop_scale: 0.2", "crop_scale is two numbers above 0 and up to 1, [LOW, HIGH], not 0.2."),
    ("preset: v2\ncrop_scale: [1, 0.2]", "[LOW, HIGH], not [1, 0.2]."),
    ("preset: v2\ncrop_scale: [0, 0.2]", "[LOW, HIGH], not [0, 0.2]."),
    ("preset: v2\ncrop_scale: [20, 100]", "[LOW, HIGH], not [20, 100]."),
    ("preset: v2\ncrop_ratio: [0.5]", "crop_ratio is two numbers"),
    ("preset: v2\nblur_sigma:", "blur_sigma is two numbers above 0 and up to 100, [LOW, HIGH], not nothing."),
    ("preset: v2\nhue: 0.2\nhue: 0.3", "line 3: hue is given twice"),
    ("preset: v1\nblur_sigma: [1, 2]", "line 2: blur_sigma changes nothing while blur_p is 0; give blur_p as well."),
    ("preset: crop\nbrightness: 0.4", "line 2: brightness changes nothing while jitter_p is 0"),
    ("preset: v2\norder: [crop, flip]\nblur_p: 0.4", "line 3: blur_p is 0.4, but order leaves blur out"),
    ("preset: v2\norder: [turn, crop]\nturn_p: 0.4", "line 2: order [turn, crop]: turn must come after crop"),
    ("preset: v2\norder: [crop, flop]", "line 2: order: flop is no operation (did you mean flip?)"),
    ("preset: v2\norder: [crop, flip, flip]", "line 2: order is a list of operations, each once"),
    ("preset: v2\norder: [flip]", "with one crop"),
    ("preset: v2\norder: crop", "order is a list of operations"),
    ("preset: v2\nothers: 3", "line 2: others: holds KEY: VALUE lines of the second view."),
    ("preset: v2\nothers:\n  blurp: 3", "line 3: others.blurp is no key of an augmentation (did you mean blur_p?)"),
    ("preset: v2\nothers:\n  order: [crop]", "line 3: others.order is no key"),
    ("preset: v2\nothers: {hue: .3, hue: .2}", "line 2: others.hue is given twice"),
    ("a: b: c", "mine.yml is not a YAML file"),
]


@pytest.mark.parametrize(("text", "sentence"), REFUSED)
def test_what_is_no_augmentation_is_refused_by_its_line(text, sentence, tmp_path):
    with pytest.raises(UserError) as raised:
        words_of(tmp_path, text)
    assert sentence in str(raised.value)


@pytest.mark.parametrize("words", ["v2 others=3", "v2 preset=v1", "v2 crop_scale", "v2 hue=x", "v2 others.others.hue=1",
                                   "", "v9 hue=0.1"])  # fmt: skip
def test_odd_words_of_a_checkpoint_are_refused(words):
    with pytest.raises(UserError):
        get_preset(words)


def test_what_is_neither_a_preset_nor_a_file(tmp_path):
    for text in ("v22", "own", str(tmp_path)):
        with pytest.raises(UserError, match="is no preset.*: choose one of v1, v2, .*, or give a YAML file"):
            augmentation(text)
    with pytest.raises(UserError, match=r"gone\.yml cannot be read: No such file"):
        augmentation("gone.yml")


def test_programs_of_one_view_take_no_others(tmp_path):
    assert one_augmentation("v2") == "v2"
    for text in ("v3", "v2 others.hue=0.2"):
        with pytest.raises(UserError, match="has values of a second view"):
            one_augmentation(text)


def test_the_smallest_crop():
    assert with_crop_min("v2", 0.3) == "v2 crop_scale=0.3,1"
    assert with_crop_min("v3", 0.08) == "v3-wide"
    assert with_crop_min("v3 others.crop_scale=0.1,1 turn_p=1", 0.3) == "v3 crop_scale=0.3,1 turn_p=1"
    with pytest.raises(UserError, match=r"--crop-min 0\.6 is above the 0\.5"):
        with_crop_min("v2 crop_scale=0.2,0.5", 0.6)


def test_a_file_beside_the_config_is_found_and_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "recipes" / "mine.yml").write_text("preset: v2")
    config = str(tmp_path / "recipes" / "run.yml")
    assert found_beside(config, "mine.yml") == str(tmp_path / "recipes" / "mine.yml")
    assert "mine.yml is taken from beside it" in capsys.readouterr().err
    (tmp_path / "here" / "mine.yml").write_text("preset: v1")
    assert found_beside(config, "mine.yml") == "mine.yml"
    assert found_beside(config, "v2") == "v2"
    assert capsys.readouterr().err == ""
