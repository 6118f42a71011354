"""Phantoms: the files, and that both prompts and pixels are true of the scenes."""

import csv
import json
import re
from dataclasses import asdict, replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.phantoms.colonoscopy import render, write_colonoscopy
from datamodules.phantoms.colonoscopy_scene import (
    COLOURS,
    EVEN,
    ColonoscopyScene,
    Instrument,
    Polyp,
    draw_scene,
    prompts,
)
from medsynth.errors import UserError


def scenes(count: int, seed: int = 7) -> list[ColonoscopyScene]:
    return [draw_scene(np.random.default_rng((seed, index))) for index in range(count)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter=";"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "deeper" / "set"
    assert write_colonoscopy(out, images=60, seed=3, size=32)
    return out


# Files


def test_layout(written: Path):
    pairs = read_csv(written / "prompt-gt.csv")
    by_name: dict[str, list[str]] = {}
    for row in pairs:
        assert list(row) == ["Filename", "Prompt"]
        by_name.setdefault(row["Filename"], []).append(row["Prompt"])
    assert list(by_name) == [f"phantom-{index:06}" for index in range(60)]
    assert {path.name for path in (written / "images").iterdir()} == {f"{name}.jpg" for name in by_name}
    for name, own in by_name.items():
        assert 7 <= len(own) <= 14
        assert len(set(own)) == len(own)
        with Image.open(written / "images" / f"{name}.jpg") as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))


def test_test_prompts_are_different_and_occur_in_the_training_pairs(written: Path):
    test = [row["Prompt"] for row in read_csv(written / "test-prompts.csv")]
    train = [row["Prompt"] for row in read_csv(written / "prompt-gt.csv")]
    assert 0 < len(test) == len(set(test)) <= 200
    assert set(test) <= set(train)
    assert train.count(test[0]) >= train.count(test[-1])


def test_jpeg_holds_the_rendered_scene(written: Path):
    pixels = np.asarray(Image.open(written / "images" / "phantom-000004.jpg"), dtype=np.float32)
    drawn = render(draw_scene(np.random.default_rng((3, 4))), 32)
    assert np.abs(pixels - drawn).mean() < 6


def test_same_seed_gives_the_same_bytes(written: Path, tmp_path: Path):
    write_colonoscopy(tmp_path / "again", images=60, seed=3, size=32)
    assert files(tmp_path / "again") == files(written)


def test_an_even_set_is_another_set(written: Path, tmp_path: Path):
    with pytest.raises(UserError, match="holds something other than these phantoms"):
        write_colonoscopy(written, images=60, seed=3, size=32, even=True)
    assert write_colonoscopy(tmp_path / "even", images=9, seed=3, size=32, even=True)
    assert not write_colonoscopy(tmp_path / "even", images=9, seed=3, size=32, even=True)
    assert len(read_csv(tmp_path / "even" / "prompt-gt.csv")) == 9 * 5
    entries = json.loads((tmp_path / "even" / "truth.json").read_text(encoding="utf-8"))
    assert [entry["truth"] for entry in entries] == [
        draw_scene(np.random.default_rng((3, index)), EVEN).truth() for index in range(9)
    ]


def test_a_picture_does_not_depend_on_how_many_there_are(written: Path, tmp_path: Path):
    write_colonoscopy(tmp_path / "few", images=9, seed=3, size=32)
    many, few = files(written), files(tmp_path / "few")
    pictures = [name for name in few if name.startswith("images/")]
    assert len(pictures) == 9
    assert all(few[name] == many[name] for name in pictures)
    assert many["prompt-gt.csv"].startswith(few["prompt-gt.csv"])
    assert json.loads(few["truth.json"]) == json.loads(many["truth.json"])[:9]


def test_another_seed_gives_other_pictures(written: Path, tmp_path: Path):
    write_colonoscopy(tmp_path / "other", images=9, seed=4, size=32)
    many, other = files(written), files(tmp_path / "other")
    assert all(other[name] != many[name] for name in other if name.startswith("images/"))


def test_the_very_same_set_is_left_as_it_is(written: Path):
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    drawn = []
    assert write_colonoscopy(written, images=60, seed=3, size=32, progress=drawn.append) is False
    assert drawn == []
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


@pytest.mark.parametrize("change", [{"images": 59}, {"seed": 4}, {"size": 33}])
def test_another_set_is_not_overwritten(written: Path, change: dict[str, int]):
    before = files(written)
    with pytest.raises(
        UserError, match=f"{re.escape(str(written))}: holds something other.*choose another --out, or remove"
    ):
        write_colonoscopy(written, **({"images": 60, "seed": 3, "size": 32} | change))
    assert files(written) == before


def test_foreign_files_are_not_overwritten(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something other than these phantoms"):
        write_colonoscopy(tmp_path, images=2, seed=0, size=16)
    with pytest.raises(UserError, match="holds something other than these phantoms"):
        write_colonoscopy(tmp_path / "notes.txt", images=2, seed=0, size=16)
    assert files(tmp_path) == {"notes.txt": b"mine"}


def test_a_set_with_a_missing_picture_is_named(tmp_path: Path):
    write_colonoscopy(tmp_path / "set", images=3, seed=0, size=16)
    (tmp_path / "set" / "images" / "phantom-000001.jpg").unlink()
    with pytest.raises(UserError, match=r"images/phantom-000001.jpg is missing.*remove it to draw the phantoms again"):
        write_colonoscopy(tmp_path / "set", images=3, seed=0, size=16)


def test_an_empty_folder_is_filled(tmp_path: Path):
    assert write_colonoscopy(tmp_path, images=2, seed=0, size=16)
    assert len(read_csv(tmp_path / "prompt-gt.csv")) >= 14


def test_an_interrupted_call_leaves_nothing(tmp_path: Path):
    seen = []

    def interrupt(done: int) -> None:
        seen.append((done, (tmp_path / "set").exists()))
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_colonoscopy(tmp_path / "set", images=5, seed=0, size=16, progress=interrupt)
    assert seen == [(1, False), (2, False), (3, False)]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/set: cannot be read or written .*choose another --out"):
        write_colonoscopy(tmp_path / "file" / "set", images=1, seed=0, size=16)


@pytest.mark.parametrize("wrong", [{"images": 0}, {"seed": -1}, {"size": 15}])
def test_numbers_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, int]):
    with pytest.raises(UserError, match="give images >= 1, size >= 16 and seed >= 0"):
        write_colonoscopy(tmp_path / "set", **({"images": 1, "seed": 0, "size": 16} | wrong))
    assert list(tmp_path.iterdir()) == []


# Prompts, against the numbers in truth.json alone


def cell(x: float, y: float) -> str:
    row = "upper" if y < 1 / 3 else "center" if y < 2 / 3 else "lower"
    column = "left" if x < 1 / 3 else "center" if x < 2 / 3 else "right"
    return "center" if row == column else f"{row}-{column}"


def polyp_places(polyp: dict) -> set[str]:
    """Cells of points strewn densely over the disc of half the radius."""
    radius, angle = np.meshgrid(np.linspace(0, 0.4999 * polyp["radius"], 25), np.linspace(0, 2 * np.pi, 721))
    x, y = polyp["x"] + radius * np.cos(angle), polyp["y"] + radius * np.sin(angle)
    return {cell(*point) for point in zip(x.flat, y.flat, strict=True)}


def instrument_places(entry: list[float], tip: list[float], half_width: float) -> set[str]:
    """Cells of 16 even steps along the axis."""
    (ax, ay), (bx, by) = entry, tip
    return {cell(ax + (bx - ax) * i / 15, ay + (by - ay) * i / 15) for i in range(16)}


def size_of(polyp: dict) -> str:
    return ["<5mm", "5-10mm", "11-20mm", ">20mm"][int(np.searchsorted([0.08, 0.13, 0.18], polyp["radius"]))]


def is_true(prompt: str, scene: dict) -> bool:
    """Whether a prompt's sentence holds of a scene as truth.json has it. Fails on a sentence of no known form."""
    said = re.fullmatch(r"Generate an image (.+)\.", prompt)[1]
    polyps, instrument = scene["polyps"], scene["instrument"]
    plain = {
        "containing text": bool(scene["text"]),
        "containing a green/black box artefact": scene["box"] is not None,
        "containing a polyp": bool(polyps),
        "containing an abnormality": bool(polyps),
        "containing an instrument": instrument is not None,
        "with no polyps": not polyps,
        "with no findings": not polyps,
        "with no instruments": instrument is None,
    }
    if said.removeprefix("not ") in plain:
        return plain[said.removeprefix("not ")] != said.startswith("not ")
    if counted := re.fullmatch(r"with (\d+) (polyp|finding)(s?)", said):
        return int(counted[1]) == len(polyps) and bool(counted[3]) == (len(polyps) != 1)
    if sized := re.fullmatch(r"with (a polyp|polyps) of size (.+)", said):
        return (sized[1] == "polyps") == (len(polyps) > 1) and items(sized[2]) == {size_of(p) for p in polyps}
    if coloured := re.fullmatch(r"with an abnormality with the colors? (.+)", said):
        return items(coloured[1]) == {colour for p in polyps for colour in p["colours"]}
    if placed := re.fullmatch(r"with an abnormality located in the (.+)", said):
        return items(placed[1]) == set().union(*(polyp_places(p) for p in polyps))
    placed = re.fullmatch(r"with an an instrument located in the (.+)", said)
    return items(placed[1]) == instrument_places(**instrument)


def items(enumeration: str) -> set[str]:
    return set(re.split(r", and | and |, ", enumeration))


def test_every_prompt_is_true(written: Path):
    scene = {entry["name"]: entry["scene"] for entry in json.loads((written / "truth.json").read_text())}
    pairs = read_csv(written / "prompt-gt.csv")
    assert [row for row in pairs if not is_true(row["Prompt"], scene[row["Filename"]])] == []


def test_a_prompt_of_a_picture_that_says_otherwise_is_found_false(written: Path):
    first, *others = (entry["scene"] for entry in json.loads((written / "truth.json").read_text()))
    other = next(o for o in others if len(o["polyps"]) != len(first["polyps"]))
    assert not all(is_true(row["Prompt"], other) for row in read_csv(written / "prompt-gt.csv")[:9])


def scene_with(**changes) -> ColonoscopyScene:
    wall = {"lumen": (0.5, 0.5), "lumen_radius": 0.1, "hue": 0.0, "brightness": 1.0, "corner": 0.75, "texture": 0}
    nothing = {"polyps": (), "instrument": None, "text": (), "box": None}
    return ColonoscopyScene(**(wall | nothing | changes))


def test_an_instrument_is_in_the_cells_its_axis_runs_through():
    instruments = [scene.instrument for scene in scenes(1500) if scene.instrument]
    assert len(instruments) > 100
    assert all(instrument.cells() == instrument_places(**asdict(instrument)) for instrument in instruments)


def test_prompts_have_the_forms_of_the_challenge():
    scene = scene_with(
        polyps=(Polyp(0.8, 0.33, 0.1, ("white", "pink")), Polyp(0.8, 0.67, 0.15, ("red",))),
        instrument=Instrument((0.6, 1.0), (0.7, 0.7), 0.04),
        box="green",
    )
    said = {prompt for seed in range(20) for prompt in prompts(scene, np.random.default_rng(seed))}
    assert said == {
        "Generate an image containing a polyp.",
        "Generate an image containing an abnormality.",
        "Generate an image with 2 polyps.",
        "Generate an image with 2 findings.",
        "Generate an image with polyps of size 5-10mm and 11-20mm.",
        "Generate an image with an abnormality located in the upper-right, lower-right, and center-right.",
        "Generate an image with an abnormality with the colors pink, red and white.",
        "Generate an image with an an instrument located in the lower-right and lower-center.",
        "Generate an image containing an instrument.",
        "Generate an image containing a green/black box artefact.",
        "Generate an image not containing text.",
    }


def test_what_is_drawn_is_as_common_as_documented():
    truths = [scene.truth() for scene in scenes(1500)]
    share = {
        "no polyps": np.mean([truth["polyps"] == 0 for truth in truths]),
        "instrument": np.mean([bool(truth["instrument_cells"]) for truth in truths]),
        "text": np.mean([truth["text"] for truth in truths]),
        "box": np.mean([truth["box"] is not None for truth in truths]),
    }
    assert share == pytest.approx({"no polyps": 0.15, "instrument": 0.12, "text": 0.25, "box": 0.4}, abs=0.035)
    assert {truth["polyps"] for truth in truths} == {0, 1, 2, 3}
    assert {size for truth in truths for size in truth["sizes"]} == {"<5mm", "5-10mm", "11-20mm", ">20mm"}
    assert {colour for truth in truths for colour in truth["colours"]} == set(COLOURS)
    assert {truth["box"] for truth in truths} == {None, "green", "black"}
    assert len({name for truth in truths for name in truth["polyp_cells"]}) == 9


# Pixels


def distances(x: float, y: float, size: int) -> np.ndarray:
    """Distance of each pixel's centre to a point, (size, size), in picture sides."""
    centres = (np.arange(size) + 0.5) / size
    return np.hypot(centres[None] - x, centres[:, None] - y)


def test_render_is_a_uint8_picture_and_repeats():
    for size in (16, 33, 64, 300):
        picture = render(scene_with(), size)
        assert (picture.shape, picture.dtype) == ((size, size, 3), np.uint8)
        assert np.array_equal(picture, render(scene_with(), size))


@pytest.mark.parametrize("size", [64, 256])
def test_polyps_stand_out_from_their_surroundings(size: int):
    differences = []
    for scene in scenes(40):
        picture = render(scene, size).astype(np.float32)
        for polyp in scene.polyps:
            distance = distances(polyp.x, polyp.y, size) / polyp.radius
            inside, ring = (
                picture[distance < 0.6].mean(axis=0),
                picture[(distance > 1.25) & (distance < 1.7)].mean(axis=0),
            )
            differences.append(np.abs(inside - ring).max())
    assert len(differences) > 30
    assert min(differences) > 20


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_colour_of_a_polyp_is_seen(count: int):
    """Each has its share of the polyp's face, by the palette's nearest colour whatever the light."""
    palette = np.array(list(COLOURS.values()))
    palette /= np.linalg.norm(palette, axis=1, keepdims=True)
    for colours in permutations(COLOURS, count):
        picture = render(scene_with(polyps=(Polyp(0.5, 0.5, 0.2, colours),)), 128)
        face = picture[distances(0.5, 0.5, 128) < 0.17].astype(float)
        nearest = (face / np.linalg.norm(face, axis=1, keepdims=True) @ palette.T).argmax(axis=1)
        shares = dict(zip(COLOURS, np.bincount(nearest, minlength=3) / len(face), strict=True))
        assert min(shares[colour] for colour in colours) > (0.8 if count == 1 else 0.08), (colours, shares)


def test_the_lumen_is_darker_than_the_wall():
    for scene in scenes(40):
        alone = replace(scene, polyps=(), instrument=None, box=None, text=())
        picture = render(alone, 64).mean(axis=2)
        lumen = picture[distances(*scene.lumen, 64) < 0.5 * scene.lumen_radius].mean()
        wall = picture[distances(0.5, 0.5, 64) < 0.42].mean()
        assert lumen < 0.6 * wall


def test_boxes_have_their_colour_and_only_they():
    corner = np.s_[180:250, 6:76]
    red, green, blue = render(scene_with(box="green"), 256)[corner].mean(axis=(0, 1))
    assert green > 1.3 * red
    assert green > 1.3 * blue
    assert render(scene_with(box="black"), 256)[corner].max() == 0
    outside = np.s_[:, 90:]
    assert np.array_equal(render(scene_with(box="green"), 256)[outside], render(scene_with(), 256)[outside])


def test_text_and_instrument_are_drawn_where_they_are_said_to_be():
    plain = render(scene_with(), 256).astype(int)
    text = np.abs(render(scene_with(text=("PHANTOM", "01/02/2020")), 256) - plain).max(axis=2)
    rows, columns = np.nonzero(text)
    assert text.max() > 80
    assert 60 < rows.min() < rows.max() < 130
    assert columns.max() < 100
    instrument = Instrument((1.0, 0.5), (0.6, 0.4), 0.04)
    tube = render(scene_with(instrument=instrument), 256).astype(int)
    on_axis = np.array([tube[int(y * 256), int(x * 256)] for x, y in instrument.points()[2:-2]])
    assert np.ptp(on_axis, axis=1).max() < 30  # grey, which tissue never is
    assert np.abs(tube - plain)[:, :120].max() == 0


@pytest.mark.parametrize("size", [64, 128])
def test_a_scene_looks_the_same_at_any_size(size: int):
    for scene in scenes(12):
        fine = render(scene, 256).reshape(size, 256 // size, size, 256 // size, 3).mean(axis=(1, 3))
        assert np.abs(render(scene, size) - fine).mean() < 1.5
