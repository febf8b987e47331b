"""The page of an embedding in a browser: what is drawn, and what the pointer, the keys and the filter do."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import wait_until
from PIL import Image

from moco.eval.embed import nearest
from moco.pictures.embedding_page import Map, embedding_page, sheets_of, side_of

N, ODD = 60, "<img src=x onerror=alert(1)>"
CLASSES = ["cat", ODD, "ship"]
RNG = np.random.default_rng(0)
LABELS = np.arange(N) % 3
FEATURES = [RNG.standard_normal((N, 8)).astype(np.float32) for _ in range(2)]
POINTS = [np.stack([np.arange(N) % 10, np.arange(N) // 10], 1) * 1.0, RNG.standard_normal((N, 2))]
INK = """(c) => {
    const copy = new OffscreenCanvas(c.width, c.height).getContext("2d", { willReadFrequently: true });
    copy.drawImage(c, 0, 0);
    let found = 0;
    for (const pixel of new Uint32Array(copy.getImageData(0, 0, c.width, c.height).data.buffer)) found += pixel !== 0;
    return found;
}"""
HERE = "[maps[n].holder.getBoundingClientRect().left, maps[n].holder.getBoundingClientRect().top]"


def images(count: int = N, size: tuple[int, int] = (40, 30)) -> list[Image.Image]:
    return [Image.new("RGB", size, (4 * i % 256, 100, 200)) for i in range(count)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two maps of labelled images, the first a lattice, and one of images without labels."""
    folder = tmp_path_factory.mktemp("pages")
    maps = [Map(title, points, *nearest(x)) for title, points, x in zip(("one", ODD), POINTS, FEATURES, strict=True)]
    names = [f"/data/{ODD if label == 1 else CLASSES[label]}/{i}.png" for i, label in enumerate(LABELS)]
    for name, text in {
        "two": embedding_page(f"pair {ODD}", maps, LABELS, CLASSES, names, images()),
        "plain": embedding_page("plain", [replace(maps[1], title="")], LABELS, [], names, images()),
    }.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return folder


def place(page, i, number=0):
    """Where an image lies in the window."""
    script = f"([i, n]) => {{ const [x, y] = {HERE}; return [x + maps[n].screenX(i), y + maps[n].screenY(i)]; }}"
    return page.evaluate(script, [i, number])


def frame(page):
    """What was to be drawn is."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def until(page, true):
    """Return when the expression is; playwright's own waiting is against the page's policy."""
    wait_until(lambda: page.evaluate(true), true)


def ink(page, number, layer):
    """Pixels of a canvas that are not empty; layer 0 has the points, 1 what lies above them."""
    frame(page)
    return page.locator(f"section:nth-child({number + 1}) canvas").nth(layer).evaluate(INK)


def pinned(page):
    """The images in the list, each with its neighbours on each map, as numbers."""
    number = "(all) => all.map((one) => +one.title.match(/(\\d+)\\.png/)[1])"
    cards = page.locator("#pins article").all()
    names = [int(card.locator("header span").text_content().split("/")[-1].removesuffix(".png")) for card in cards]
    lists = [
        [one.locator("button").evaluate_all(number) for one in card.locator(".nearest").all()] for card in cards
    ]  # fmt: skip
    return dict(zip(names, lists, strict=True))


def by_numpy(i, x):
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = unit @ unit[i]
    cosine[i] = -2
    return np.argsort(-cosine)[:8].tolist()


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (500, True)])
def test_both_maps_are_drawn(written, browse, width, dark):
    page = browse(written / "two.html", width=width, dark=dark)
    assert all(ink(page, number, 0) > 60 * 20 for number in (0, 1))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    colours = page.evaluate("[page.edge, getComputedStyle(document.body).backgroundColor]")
    assert colours == (["#16181d", "rgb(22, 24, 29)"] if dark else ["#ffffff", "rgb(255, 255, 255)"])


def test_a_click_pins_an_image_with_its_nearest_in_feature_space(written, browse):
    page = browse(written / "two.html", 1000, 600)
    for number, i in enumerate((33, 7)):
        page.mouse.click(*place(page, i, number))
        assert pinned(page) == {i: [by_numpy(i, x) for x in FEATURES]}
        assert all(ink(page, n, 1) > 300 for n in (0, 1))  # lines and rings on both
    same = sum(LABELS[j] == LABELS[7] for j in by_numpy(7, FEATURES[0]))
    assert page.locator("#pins p").first.text_content() == f"8 nearest by one: {same} of its class"
    right = page.locator(".nearest").first.locator("button.right").count()
    assert (right, page.locator(".nearest").first.locator("button.wrong").count()) == (same, 8 - same)
    page.keyboard.down("Shift")
    page.mouse.click(*place(page, 33))
    page.keyboard.up("Shift")
    assert [*pinned(page)] == [7, 33]
    page.locator(".nearest button").first.click()  # a neighbour takes its place
    assert [*pinned(page)] == [by_numpy(7, FEATURES[0])[0]]
    page.locator("#pins .close").click()
    assert pinned(page) == {} and page.locator("#none-pinned").is_visible()
    page.mouse.move(5, 5)
    assert ink(page, 0, 1) == 0


def test_hovering_names_the_image_and_marks_it_on_both_maps(written, browse):
    page = browse(written / "two.html", 1000, 600)
    assert page.locator("#tip").is_hidden() and ink(page, 1, 1) == 0
    page.mouse.move(*place(page, 31))
    assert page.locator("#tip b").text_content() == ODD
    assert page.locator("#tip span").text_content() == f"{ODD}/31.png"
    assert ink(page, 0, 1) > 50 and ink(page, 1, 1) > 50
    page.mouse.move(5, 5)
    assert page.locator("#tip").is_hidden()


def test_text_stays_text(written, browse):
    page = browse(written / "two.html", 1000, 600)
    page.mouse.click(*place(page, 31))
    assert page.locator("#classes .name").nth(1).text_content() == ODD
    assert page.locator("section h2").nth(1).text_content() == ODD
    assert page.locator("h1").text_content() == f"pair {ODD}"
    assert page.locator("#pins header b").text_content() == ODD
    assert page.locator("img:not(.sheet)").count() == 0


def test_the_filter_hides_classes_on_both_maps(written, browse):
    page = browse(written / "two.html", 1000, 600)
    full, count = [ink(page, n, 0) for n in (0, 1)], page.locator("#count")
    assert page.locator("#classes label").all_text_contents() == [f"{name}20" for name in CLASSES]
    page.locator("#classes label").first.click()
    assert count.text_content() == "2 of 3 classes, 40 of 60 images"
    assert all(0.5 * full[n] < ink(page, n, 0) < 0.8 * full[n] for n in (0, 1))
    page.mouse.click(*place(page, 0))  # a cat
    assert pinned(page) == {}
    page.mouse.click(*place(page, 1))
    assert [*pinned(page)] == [1]
    page.locator("#classes label").nth(2).click(modifiers=["Shift"])
    until(page, "document.getElementById('count').textContent === '1 of 3 classes, 20 of 60 images'")
    page.locator("#search").fill("CA")
    assert page.locator("#classes label:visible").all_text_contents() == ["cat20"]
    page.locator("#all").click()  # of the listed ones
    assert count.text_content() == "2 of 3 classes, 40 of 60 images"
    page.locator("#search").press("Escape")
    page.locator("#none").click()
    assert count.text_content() == "0 of 3 classes, 0 of 60 images"
    assert ink(page, 0, 0) == ink(page, 1, 0) == 0


def test_wheel_drag_buttons_and_keys_move_the_view(written, browse):
    page = browse(written / "two.html", 1000, 600)
    view = "[together.zoom, together.x, together.y]"
    page.evaluate(
        "window.drawn = 0;"
        "maps[0].drawPoints = function () { window.drawn++; PointMap.prototype.drawPoints.call(this); }; 0"
    )
    before = place(page, 12)
    page.mouse.move(*before)
    page.mouse.wheel(0, -400)
    until(page, "together.zoom > 1.5")
    assert np.allclose(place(page, 12), before, atol=1)  # what lies under the pointer stays there
    frame(page)
    page.evaluate("window.drawn = 0")
    page.mouse.down()
    page.mouse.move(before[0] + 60, before[1] - 40, steps=5)
    page.mouse.up()
    assert np.allclose(place(page, 12), np.add(before, (60, -40)), atol=1)
    frame(page)
    assert page.evaluate("window.drawn") == 0  # the canvas was moved
    assert ink(page, 0, 0) > 500 and pinned(page) == {}
    page.mouse.move(before[0] + 60, before[1] - 40)
    page.mouse.down()
    page.mouse.move(before[0] - 300, before[1], steps=3)  # beyond its margin
    page.mouse.up()
    frame(page)
    assert page.evaluate("window.drawn") > 0
    zoom = page.evaluate(view)[0]
    page.locator("#larger").click()
    assert page.evaluate(view)[0] == pytest.approx(1.5 * zoom)
    page.locator("#smaller").click()
    assert page.evaluate(view)[0] == pytest.approx(zoom)
    page.locator("#whole").click()
    assert page.evaluate(view) == [1, 0.5, 0.5]
    page.locator("#linked").uncheck()
    page.mouse.move(*before)
    page.mouse.wheel(0, -400)
    until(page, "maps[0].view.zoom > 1.5 && maps[1].view.zoom === 1")


def test_two_fingers_zoom(written, browse):
    page = browse(written / "plain.html", width=500, has_touch=True)
    touch = page.context.new_cdp_session(page)
    x, y = place(page, 22)
    for kind, spread in (("touchStart", 20), ("touchMove", 40), ("touchMove", 60), ("touchEnd", None)):
        fingers = [{"x": x - spread, "y": y, "id": 0}, {"x": x + spread, "y": y, "id": 1}] if spread else []
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})
    until(page, "Math.abs(together.zoom - 3) < 0.01")
    assert np.allclose(place(page, 22), (x, y), atol=0.5)
    assert pinned(page) == {}


def test_arrow_keys_walk_over_the_map_and_escape_lets_go(written, browse):
    page = browse(written / "two.html", 1000, 600)
    page.mouse.click(*place(page, 22))  # row 2, column 2 of the lattice
    for key, then in {"ArrowRight": 23, "ArrowUp": 33, "ArrowLeft": 32, "ArrowDown": 22}.items():
        page.keyboard.press(key)
        assert [*pinned(page)] == [then]
    page.keyboard.press("Escape")
    assert pinned(page) == {}
    page.locator("#search").press("ArrowRight")  # keys of a text field stay its own
    assert pinned(page) == {}


def test_images_without_labels_are_shown_as_pictures_that_do_not_cover_each_other(written, browse):
    page = browse(written / "plain.html", width=500, height=600)
    assert page.locator("#filter").is_hidden()
    assert page.locator("#as-pictures").get_attribute("aria-pressed") == "true"
    boxes = "maps[0].pictured().map((i) => [maps[0].screenX(i), maps[0].screenY(i), maps[0].picture])"
    counts = []
    for zoom in (0.5, 1, 3, 200):
        page.evaluate(f"together.reset(); together.zoom = {zoom}; change()")
        found = np.array(page.evaluate(boxes))
        apart = np.abs(found[:, None, :2] - found[None, :, :2]).max(2) + 1e9 * np.eye(len(found))
        assert apart.min() >= found[0, 2]
        counts.append(len(found))
    assert counts[0] < counts[1] < counts[2] <= counts[3] == N
    page.evaluate("together.reset(); change()")
    page.mouse.click(*place(page, 31))
    assert page.evaluate("maps[0].pictured()[0]") == 31  # which nothing may push aside
    assert page.locator(".nearest button.right, .nearest button.wrong").count() == 0
    corner = "maps[0].at(maps[0].screenX(31) + maps[0].picture / 2 - 2, maps[0].screenY(31) + maps[0].picture / 2 - 2)"
    assert page.evaluate(corner) == 31
    full = ink(page, 0, 0)
    page.locator("#as-points").click()
    assert ink(page, 0, 0) < 0.5 * full


def test_a_thousand_classes_and_some_thousand_points(browse):
    count = 3000
    x = RNG.standard_normal((count, 4)).astype(np.float32)
    one = Map("", x[:, :2], *nearest(x))
    classes = [f"class {i}" for i in range(1000)]
    names = [str(i) for i in range(count)]
    page = browse(embedding_page("many", [one], np.arange(count) % 1000, classes, names, images(count, (20, 16))))
    assert page.locator("#classes label").count() == 1000
    page.locator("#search").fill("class 77")
    assert page.locator("#classes label:visible").count() == 11  # 77 and 770 to 779
    page.locator("#search").fill("")
    page.locator("#none").click()
    page.locator("#search").fill("class 770")
    page.locator("#all").click()
    assert page.locator("#count").text_content() == "1 of 1000 classes, 3 of 3000 images"
    shapes = page.evaluate("new Set(page.marks(4, 1)).size")
    assert shapes == 80  # ten colours in eight shapes


def test_sheets_hold_every_image_whole():
    sizes = [(50, 20), (7, 33), (200, 100)] * 30
    drawn = [Image.new("RGB", size, (3 * i % 256, 255 - 2 * i, 90)) for i, size in enumerate(sizes)]
    layout, uris = sheets_of(iter(drawn), 48)
    assert (layout["cell"], len(uris)) == (48, 1)
    assert layout["sizes"][:6] == [48, 19, 7, 33, 48, 24]
    assert [side_of(n) for n in (10, 1000, 1001, 10_000, 100_000)] == [96, 96, 64, 48, 32]


def test_more_images_than_one_sheet_holds(browse, monkeypatch):
    monkeypatch.setattr("moco.pictures.embedding_page.SHEET", 256)  # 16 cells of 64 pixels
    x = RNG.standard_normal((40, 4)).astype(np.float32)
    pictures = [Image.new("RGB", (60, 60), (6 * i, 255 - 6 * i, 128)) for i in range(40)]
    page = browse(embedding_page("", [Map("", x[:, :2], *nearest(x))], LABELS[:40], [], ["a"] * 40, pictures))
    assert page.locator("img.sheet").count() == 3
    until(page, "page.sheets.every((sheet) => sheet.complete)")
    for i in (0, 15, 16, 39):
        colour = page.evaluate("(i) => [...picture(i, 30).getContext('2d').getImageData(15, 15, 1, 1).data]", i)
        assert np.allclose(colour, (6 * i, 255 - 6 * i, 128, 255), atol=4)
