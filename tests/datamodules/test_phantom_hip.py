"""Hip phantoms: the files in every layout, and that captions, facts and pixels say the same angles."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.files.layouts import LAYOUTS, read_catalogue
from datamodules.phantoms.hip import render, write_hips
from datamodules.phantoms.hip_scene import GRADES, HipScene, draw_scene, norberg_angle
from medsynth.errors import UserError


def scenes(count: int, seed: int = 7) -> list[HipScene]:
    return [draw_scene(np.random.default_rng((seed, index))) for index in range(count)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Scenes


def test_the_angle_is_the_one_between_the_lines():
    """Heads 10 apart: a rim straight above a head is at 90 degrees, further out at more, further in at less."""
    for rim, angle in (((0, -3), 90), ((-3, -3), 135), ((3, -3), 45), ((-1, -np.sqrt(3)), 120)):
        assert norberg_angle((0, 0), (10, 0), rim) == pytest.approx(angle)
        assert norberg_angle((10, 0), (0, 0), (10 - rim[0], rim[1])) == pytest.approx(angle)
    turn = np.array([[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]])
    assert norberg_angle(turn @ (0, 0), turn @ (10, 0), turn @ (-3, -3)) == pytest.approx(135)


def test_scenes_are_plausible():
    for scene in scenes(300):
        angles = scene.angles()
        assert min(angles.values()) > 70 and max(angles.values()) < 122
        # Picture right is the dog's left; its rim is above the head, and the socket between the heads.
        assert (
            scene.right.head[0] < scene.right.socket[0] + 0.02 < 0.5 < scene.left.socket[0] - 0.02 < scene.left.head[0]
        )
        for hip in (scene.left, scene.right):
            assert hip.rim[1] < hip.head[1] - 0.9 * hip.radius
            assert np.hypot(*np.subtract(hip.rim, hip.socket)) == pytest.approx(hip.socket_radius)
            gap = hip.socket_radius - np.hypot(*np.subtract(hip.head, hip.socket)) - hip.radius
            assert gap > -0.75 * hip.radius, "no head leaves its socket altogether"
        normal = [hip for hip, angle in ((scene.left, angles["left"]), (scene.right, angles["right"])) if angle > 108]
        assert all(np.hypot(*np.subtract(h.head, h.socket)) < h.socket_radius - h.radius for h in normal), "congruent"


def test_grades_follow_the_smaller_angle():
    drawn = scenes(500)
    for scene in drawn:
        worst = min(round(angle) for angle in scene.angles().values())
        expected = "normal" if worst >= 105 else "mild" if worst >= 100 else "moderate" if worst >= 90 else "severe"
        assert scene.grade() == expected
        assert f"{'normal hips' if expected == 'normal' else expected + ' hip dysplasia'}" in scene.caption()
    shares = {grade: sum(scene.grade() == grade for scene in drawn) / 500 for grade in GRADES}
    for grade, share in {"normal": 0.4, "mild": 0.2, "moderate": 0.25, "severe": 0.15}.items():
        assert abs(shares[grade] - share) < 0.1


def test_captions_and_facts_say_the_angles():
    for scene in scenes(50):
        left, right = map(
            int, re.search(r"left Norberg angle (\d+), right Norberg angle (\d+), ", scene.caption()).groups()
        )
        facts = json.loads(json.dumps(scene.facts()))
        assert (left, right) == (round(scene.angles()["left"]), round(scene.angles()["right"]))
        for side, other in (("left", "right"), ("right", "left")):
            angle = norberg_angle(facts[f"head_{side}"], facts[f"head_{other}"], facts[f"rim_{side}"])
            assert angle == pytest.approx(facts[f"norberg_{side}"], abs=0.01)


# Pixels


def brightness(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear at points given in pixels, the centre of the first at 0.5."""
    x, y = x - 0.5, y - 0.5
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    u, v = x - left, y - top
    rows = [(1 - u) * image[top + i, left] + u * image[top + i, left + 1] for i in (0, 1)]
    return (1 - v) * rows[0] + v * rows[1]


def fitted_head(image: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """Centre and radius (x, y, r), pixels, of the circle near `guess` with the steepest fall of brightness outwards."""
    turn = np.linspace(0, 2 * np.pi, 180, endpoint=False)

    def fall(circle: np.ndarray) -> float:
        inside, outside = (
            brightness(image, circle[0] + r * np.cos(turn), circle[1] + r * np.sin(turn))
            for r in (circle[2] - 1.2, circle[2] + 1.2)
        )
        return np.clip(inside - outside, 0, None).mean()

    steps = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3), axis=-1).reshape(-1, 3)
    best = guess
    for step in (2, 2, 1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.1, 0.1):
        best = max((best + step * move for move in steps), key=fall)
    return best


def seen_rim(image: np.ndarray, head: np.ndarray, rim: np.ndarray, sign: int) -> float:
    """Where on the circle about the head, just above the rim, the bone ends: degrees from the true rim, outwards."""
    away = np.subtract(rim, head[:2])
    start, radius = np.arctan2(away[1], away[0]), 1.03 * np.hypot(*away)
    turn = np.radians(np.arange(-12, 12, 0.25))
    line = brightness(
        image, head[0] + radius * np.cos(start + sign * turn), head[1] + radius * np.sin(start + sign * turn)
    )
    smooth = np.convolve(line, np.ones(5) / 5, "valid")
    fall = smooth[:-6] - smooth[6:]
    return float(np.degrees(turn[5 + int(fall.argmax())]))


def test_pixels_have_the_angles():
    rng, errors, rims = np.random.default_rng(0), [], []
    for scene in scenes(12, seed=11):
        image = render(scene, 512).astype(float)
        truth = {s: np.array([*h.head, h.radius]) * 512 for s, h in (("left", scene.left), ("right", scene.right))}
        heads = {side: fitted_head(image, circle + rng.uniform(-3, 3, 3)) for side, circle in truth.items()}
        for side, other, sign in (("left", "right", 1), ("right", "left", -1)):
            rim = np.multiply(getattr(scene, side).rim, 512)
            assert np.abs(heads[side] - truth[side]).max() < 1, "centre and radius within a pixel"
            angle = norberg_angle(heads[side][:2], heads[other][:2], rim)
            errors.append(angle - scene.angles()[side])
            rims.append(seen_rim(image, heads[side], rim, sign))
    assert np.abs(errors).max() < 1.5
    assert np.abs(errors).mean() < 0.3
    assert np.abs(rims).max() < 3.5, "the bone ends at the rim"
    assert np.abs(rims).mean() < 1.5


def test_femora_run_down_beside_their_heads():
    for scene in scenes(6):
        image = render(scene, 256).astype(float)
        for hip, sign in ((scene.left, 1), (scene.right, -1)):
            shaft, flesh, medial = (
                brightness(image, 256 * (hip.head[0] + sign * u * hip.radius), 256 * (hip.head[1] + 5 * hip.radius))
                for u in (np.array([1.0, 1.3, 1.6]), np.array([2.8, 3.0, 3.2]), np.array([-1.6, -1.3, -1.0]))
            )
            assert shaft.mean() > flesh.mean() + 25
            assert shaft.mean() > medial.mean() + 10


def test_size_does_not_change_the_scene():
    for scene in scenes(4):
        large = Image.fromarray(render(scene, 256)).resize((64, 64), Image.Resampling.BOX)
        assert np.abs(np.asarray(large, float) - render(scene, 64)).mean() < 4


def test_pictures_are_radiographs():
    """Dark outside of the dog, grey flesh, bright bone, in range, and each its own."""
    drawn = [render(scene, 128) for scene in scenes(6)]
    for picture in drawn:
        assert picture.shape == (128, 128) and picture.dtype == np.uint8
        assert picture[-3:, 62:66].mean() < 25 < 60 < picture[70:74].max(axis=0).max()
        assert np.percentile(picture, 99.5) > 140 and (picture == 255).mean() < 0.02
    assert len({picture.tobytes() for picture in drawn}) == 6


def test_it_is_quick():
    """At least 20 pictures of 256 x 256 a second of one core."""
    drawn, spent = scenes(10), []
    for _ in range(3):
        started = time.process_time()
        for scene in drawn:
            render(scene, 256)
        spent.append(time.process_time() - started)
    assert min(spent) < 0.5


# Files


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same(tmp_path, layout):
    heard: list[int] = []
    assert write_hips(tmp_path / "set", 8, seed=2, size=32, layout=layout, progress=heard.append)
    assert heard == list(range(1, 9))
    catalogue = read_catalogue(tmp_path / "set")
    assert catalogue.layout == layout
    entries = sorted(catalogue.splits[""].rows.values(), key=lambda entry: entry.key)
    for index, (entry, scene) in enumerate(zip(entries, scenes(8, seed=2), strict=True)):
        assert (entry.key, entry.text, entry.label) == (f"phantom-{index:06}", scene.caption(), scene.grade())
        assert json.loads(entry.facts) == scene.facts()
        (tmp_path / "p.png").write_bytes(catalogue.read(entry.name))
        with Image.open(tmp_path / "p.png") as image:
            assert image.mode == "L" and np.array_equal(np.asarray(image), render(scene, 32))


def test_same_seed_gives_the_same_bytes(tmp_path):
    for name, seed, images in (("a", 3, 6), ("b", 3, 6), ("c", 4, 6), ("few", 3, 2)):
        write_hips(tmp_path / name, images, seed, size=32, layout="webdataset" if name in "ab" else "metadata")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    write_hips(tmp_path / "many", 6, 3, size=32)
    many, few, other = (files(tmp_path / name) for name in ("many", "few", "c"))
    pictures = [name for name in few if name.endswith(".png")]
    assert len(pictures) == 2 and all(few[name] == many[name] != other[name] for name in pictures)


def test_the_very_same_set_is_left_as_it_is(tmp_path):
    write_hips(tmp_path / "set", 3, seed=0, size=16)
    before = files(tmp_path / "set")
    assert write_hips(tmp_path / "set", 3, seed=0, size=16) is False
    for change in ({"images": 4}, {"seed": 1}, {"size": 17}, {"layout": "pairs"}):
        with pytest.raises(UserError, match="holds something other than these phantoms"):
            write_hips(tmp_path / "set", **({"images": 3, "seed": 0, "size": 16} | change))
    assert files(tmp_path / "set") == before
    (tmp_path / "set/phantom-000001.png").unlink()
    with pytest.raises(UserError, match=r"set: holds only 2 of its 3 phantoms; remove it to draw them again"):
        write_hips(tmp_path / "set", 3, seed=0, size=16)


@pytest.mark.parametrize("numbers", [{"images": 0}, {"size": 8}, {"seed": -1}])
def test_numbers_out_of_range(tmp_path, numbers):
    with pytest.raises(UserError, match=r"give images >= 1, size >= 16 and seed >= 0"):
        write_hips(tmp_path / "set", **({"images": 1, "seed": 0} | numbers))
