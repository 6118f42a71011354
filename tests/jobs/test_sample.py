"""`medsynth sample`: what a kept picture is known by, what becomes of a damaged one, and controls of one's own."""

import csv
import io
import os
import shutil
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from callbacks.durable import DurableCheckpointIO
from jobs.drawing import facts as drawing_facts
from jobs.drawing import folder as drawing
from jobs.drawing.asked import _words_of_controls
from jobs.drawing.facts import load_with_facts
from jobs.drawing.request import Request
from jobs.run.config import load_config
from jobs.run.folder import build_module, build_source, write_config
from jobs.scoring.folders import Reading, ScoredFolder
from medsynth.errors import UserError
from medsynth.files import put_whole
from medsynth.owner import Owner
from tests.conftest import REPOSITORY
from tests.jobs.test_commands import medsynth

PROMPT = ("--prompt", "chest x-ray with 1 nodule")


def config_of(method: str, root: Path, run: Path, *settings: str):
    path = REPOSITORY / f"configs/tiny/{method}.yaml"
    return load_config([path], [f"data.root={root}", f"run_dir={run}", *settings])


def saved(config) -> Path:
    """The run directory of that config, with a checkpoint of step 1 whose weights no start gives."""
    torch.manual_seed(1)
    module = build_module(config)
    module.configure_model()
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
    write_config(config)
    build_source(config)[0].write_split(config.run_dir)
    state = {"global_step": 1, "epoch": 0, "state_dict": module.state_dict(), "callbacks": {}, "optimizer_states": []}
    module.on_save_checkpoint(state)
    DurableCheckpointIO().save_checkpoint(state, Path(config.run_dir) / "checkpoints/best.ckpt")
    return Path(config.run_dir)


@pytest.fixture(scope="module")
def steered(tmp_path_factory, phantoms) -> Path:
    """A run of controlnet, steered by masks, edges and pictures."""
    run = tmp_path_factory.mktemp("steered") / "run"
    return saved(config_of("controlnet", phantoms["chest_xray"], run, "data.validation_images=4"))


@pytest.fixture(scope="module")
def worded(tmp_path_factory, phantom) -> Path:
    """A run that draws for prompts."""
    run = tmp_path_factory.mktemp("worded") / "run"
    return saved(config_of("stable_diffusion", phantom, run, "data.validation_images=2"))


@pytest.fixture
def own(steered, tmp_path) -> Path:
    """The files of the pictures that `steered` validates with, as a folder of one's own, and their prompts."""
    data = build_source(load_config([steered / "config.yaml"]))[0]
    root, folder = Path(data.config.root), tmp_path / "own"
    rows = data.evaluation_conditions(4)
    order = [data._contents.val[index] for index in data._asked(range(4))]
    lines = ["Filename,Prompt"]
    for i, pair in enumerate(order):
        for kind in ("images", "masks"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(root / kind / pair.picture, folder / kind / f"p{i}.png")
        lines.append(f'p{i}.png,"{rows.captions[i]}"')
    (tmp_path / "prompts.csv").write_text("\n".join(lines) + "\n")
    return folder


def info(path: Path) -> dict:
    with Image.open(path) as image:
        return dict(image.info)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def visible(out: Path) -> list[Path]:
    return sorted(path for path in out.iterdir() if not path.name.startswith("."))


def manifest(out: Path) -> list[dict]:
    return list(csv.DictReader(io.StringIO((out / "manifest.csv").read_text())))


def refused(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        medsynth("sample", *arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What a kept picture is known by


def test_a_picture_says_what_it_was_made_by_resolved(worded, tmp_path):
    out = tmp_path / "out"
    medsynth("sample", worded, *PROMPT, "--out", out, "--guidance", 0, "--negative", "blood, text", "--seed", 5)
    said = info(out / "000000.png")
    assert (said["sampler"], said["steps"], float(said["guidance"])) == ("ddim", "3", 0.0)
    assert (said["prompt"], said["negative_prompt"], said["seed"]) == (PROMPT[1], "blood, text", "5")
    assert (said["checkpoint_step"], said["precision"], said["resolution"]) == ("1", "float32", "32")
    (row,) = manifest(out)
    assert {key: row[key] for key in ("file", "prompt", "negative_prompt")} == {
        "file": "000000.png", "prompt": PROMPT[1], "negative_prompt": "blood, text"
    }  # fmt: skip
    assert all(row[key] == said[key] for key in ("weights", "frozen_weights", "model", "noise_seed", "guidance"))


def test_a_picture_of_something_else_is_refused_and_left_alone(worded, tmp_path):
    out, call = tmp_path / "out", (worded, *PROMPT, "--negative", "a", "--out", tmp_path / "out", "--count", 2)
    medsynth("sample", *call)
    kept = {path: path.read_bytes() for path in visible(out)}
    state = DurableCheckpointIO().load_checkpoint(worded / "checkpoints/best.ckpt")
    other = shutil.copytree(worded, tmp_path / "other")
    next(iter(state["state_dict"].values())).add_(1)
    DurableCheckpointIO().save_checkpoint(state, other / "checkpoints/best.ckpt")
    changes = {
        (*call, "--steps", 4): "made with steps '3', not '4'",
        (*call, "--guidance", 0): "guidance '2.0', not '0.0'",
        (*call, "--negative", "b"): "negative_prompt 'a', not 'b'",
        (*call, "--prompt", "another"): f"prompt '{PROMPT[1]}', not 'another'",
        (*call, "--seed", 1): "seed '0', not '1'",
        (other, *call[1:]): "made with weights '",
        (*call, "--count", 1): "000001.png is of another call",
        (*call, "--seeds", 2): "000000.png is of another call",
    }
    for arguments, said in changes.items():
        assert said in refused(*arguments)
    assert {path: path.read_bytes() for path in visible(out)} == kept
    assert "2 of 2" in medsynth("sample", *call)
    with Owner(out, "--out"):
        assert f"--out={out} is in use by process" in refused(*call)
    assert "2 of 3" in medsynth("sample", *call, "--count", 3), "more of the same is the same call, longer"


def test_frozen_weights_are_known_too(worded, monkeypatch):
    facts, load_run = load_with_facts(worded, "best")[2], drawing_facts.load_run

    def changed(*arguments):
        module, config = load_run(*arguments)
        module.vae.decoder.conv_in.bias.data[0] += 1e-3
        return module, config

    monkeypatch.setattr(drawing_facts, "load_run", changed)
    again = load_with_facts(worded, "best")[2]
    assert [key for key in facts if facts[key] != again[key]] == ["frozen_weights"]


def test_pictures_of_an_earlier_version_and_of_others_are_refused(worded, tmp_path):
    before = PngImagePlugin.PngInfo()
    for key, text in {"method": "stable_diffusion", "steps": "default", "synthetic": "true"}.items():
        before.add_itxt(key, text)
    for texts, said in ((before, "an earlier version"), (None, "no picture of this command")):
        out = tmp_path / said.split()[0]
        out.mkdir()
        Image.new("RGB", (32, 32)).save(out / "000000.png", pnginfo=texts)
        assert said in refused(worded, *PROMPT, "--out", out)
    (tmp_path / "list").mkdir()
    (tmp_path / "list/manifest.csv").write_text("name,age\n")
    assert "no list of this command's" in refused(worded, *PROMPT, "--out", tmp_path / "list")
    (tmp_path / "list/manifest.csv").write_text("file,pro")
    medsynth("sample", worded, *PROMPT, "--out", tmp_path / "list")
    assert len(manifest(tmp_path / "list")) == 1


# Damage, interruption


def jpeg(content: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(content)).save(buffer, format="JPEG")
    return buffer.getvalue()


def flipped(content: bytes) -> bytes:
    """One bit of the pixels is another."""
    place = content.index(b"IDAT") + 20
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_damaged_pictures_are_drawn_again(worded, tmp_path):
    damages = [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-12], flipped, jpeg, lambda b: b"not a picture"]
    out, call = tmp_path / "out", (worded, *PROMPT, "--out", tmp_path / "out", "--count", len(damages) + 1)
    medsynth("sample", *call)
    whole = {path: path.read_bytes() for path in visible(out)}
    for path, damage in zip(sorted(out.glob("*.png")), damages, strict=False):
        path.write_bytes(damage(path.read_bytes()))
    (out / "manifest.csv").write_bytes(b"")
    assert "1 of 7 pictures are there already" in medsynth("sample", *call)
    assert {path: path.read_bytes() for path in visible(out)} == whole


def test_the_list_is_complete_after_an_interrupted_and_repeated_call(worded, tmp_path, monkeypatch):
    out, call = tmp_path / "out", (worded, *PROMPT, "--out", tmp_path / "out", "--count", 3, "--batch-size", 1)
    write, written = drawing.write_picture, []

    def broken(path, *arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *arguments)

    with monkeypatch.context() as patch, pytest.raises(click.Abort):
        patch.setattr(drawing, "write_picture", broken)
        medsynth("sample", *call)
    assert [row["file"] for row in manifest(out)] == ["000000.png", "000001.png"]
    assert "2 of 3" in medsynth("sample", *call)
    assert [row["file"] for row in manifest(out)] == ["000000.png", "000001.png", "000002.png"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    target, synced = tmp_path / "file", []
    fsync = os.fsync

    def noting(descriptor):
        synced.append((os.fstat(descriptor).st_ino, target.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    put_whole(target, b"whole")
    assert synced == [(target.stat().st_ino, False), (tmp_path.stat().st_ino, True)]
    put_whole(target, b"whole")
    assert len(synced) == 2, "what says so already is left alone"


# Seeds, negative prompts, sheets


def test_several_seeds_a_prompt_and_a_sheet(worded, tmp_path):
    table = tmp_path / "prompts.csv"
    table.write_text("Prompt;Negative;Note\none;;x\ntwo;text;y\n")
    printed = medsynth("sample", worded, "--prompts", table, "--seeds", 2, "--out", tmp_path / "four", "--sheet",
                       tmp_path / "sheet.png")  # fmt: skip
    assert "not used: Note" in printed
    rows = manifest(tmp_path / "four")
    assert [row["file"] for row in rows] == ["000000-s0.png", "000000-s1.png", "000001-s0.png", "000001-s1.png"]
    assert [row["negative_prompt"] for row in rows] == ["", "", "text", "text"]
    assert len({row["noise_seed"] for row in rows}) == 4
    medsynth("sample", worded, "--prompts", table, "--out", tmp_path / "two")
    for i in range(2):
        first, alone = (pixels(tmp_path / name) for name in (f"four/00000{i}-s0.png", f"two/00000{i}.png"))
        assert np.abs(first.astype(int) - alone).max() <= 1
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 8 + 8 * (160 + 8)
    assert "among the samples" in refused(worded, *PROMPT, "--out", tmp_path, "--sheet", tmp_path / "a/sheet.png")


def test_negative_prompts_are_refused_by_name_where_they_would_do_nothing(tmp_path, phantom, worded):
    run = tmp_path / "llcm"
    write_config(config_of("llcm", phantom, run, "data.validation_images=2"))
    assert "--negative: " in (said := refused(run, *PROMPT, "--negative", "a", "--out", tmp_path / "out"))
    assert "llcm is led away from no words" in said
    table = tmp_path / "prompts.csv"
    table.write_text("Prompt,Negative\na,b\n")
    assert "the column Negative: " in refused(run, "--prompts", table, "--out", tmp_path / "out")
    assert "guidance 1 nothing" in refused(worded, *PROMPT, "--negative", "a", "--guidance", 1, "--out", tmp_path / "o")
    assert "--guidance nan: give a number" in refused(worded, *PROMPT, "--guidance", "nan", "--out", tmp_path / "o")
    assert "drawn in 1 to 1000 steps" in refused(worded, *PROMPT, "--steps", 1001, "--out", tmp_path / "o")
    assert not (tmp_path / "out").exists()


# Controls of one's own


def test_own_controls_draw_what_the_validation_draws(steered, own, tmp_path):
    """From the data set's own files, and from what is written beside the pictures, as the network saw it."""
    printed = medsynth("sample", steered, "--validation", 5, "--out", tmp_path / "val")
    assert "the run validates with 4, fewer than 5" in printed
    prompts = ("--prompts", tmp_path / "prompts.csv")
    (own / "masks/notes.npy").touch()
    call = ("sample", steered, "--controls", own, *prompts, "--out", tmp_path / "one", "--sheet", tmp_path / "s.png")
    assert "own: not used: masks/notes.npy" in medsynth(*call)
    seen = tmp_path / "seen"
    for kind in ("masks", "canny", "picture"):
        for i in range(4):
            (seen / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / f"val/{kind}/00000{i}.png", seen / kind / f"p{i}.png")
    medsynth("sample", steered, "--controls", seen, *prompts, "--out", tmp_path / "two")
    for i in range(4):
        expected = pixels(tmp_path / f"val/00000{i}.png").astype(int)
        assert expected.std() > 1
        for out in ("one", "two"):
            assert np.abs(pixels(tmp_path / out / f"p{i}.png") - expected).max() <= 1
    row = manifest(tmp_path / "one")[2]
    assert (row["file"], row["mask"], row["picture"]) == ("p2.png", "masks/p2.png", "picture/p2.png")
    assert row["control"] == f"{own}/masks/p2.png; {own}/images/p2.png"
    assert info(tmp_path / "one/p2.png")["control"] == row["control"]
    control = build_source(load_config([steered / "config.yaml"]))[0].evaluation_conditions([2]).control
    assert np.array_equal(pixels(tmp_path / "one/masks/p2.png"), (control[0, 0] * 255).byte().numpy())
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width == 8 + 2 * (4 * 160 + 8), "mask, edges, picture and what was drawn"


def test_evaluate_leaves_out_what_steered(tmp_path):
    out, header = tmp_path / "scored/out", "file,prompt,negative_prompt,label,control"
    for place in ("p.png", "masks/p.png", "masks/deep/p.png", "canny/p.png"):
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(out / place)
    (out / "manifest.csv").write_text(f"{header},mask,method\n")
    names = [path.relative_to(out).as_posix() for path in ScoredFolder(tmp_path / "scored", Reading()).paths]
    assert names == ["canny/p.png", "p.png"], "of an own folder canny nothing is said"
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/elsewhere").symlink_to(out)
    assert [path.name for path in ScoredFolder(tmp_path / "linked", Reading()).paths] == ["p.png", "p.png"], (
        "nor of a linked one"
    )
    (out / "manifest.csv").write_text("file,mask\n")
    assert len(ScoredFolder(tmp_path / "scored", Reading()).paths) == 4, "another's list"


def test_a_mask_lost_beside_its_picture_is_written_again(steered, own, tmp_path):
    call = (steered, "--controls", own, *PROMPT, "--out", tmp_path / "out")
    medsynth("sample", *call)
    mask = tmp_path / "out/masks/p1.png"
    whole = mask.read_bytes()
    mask.write_bytes(whole[:40])
    assert "3 of 4" in medsynth("sample", *call)
    assert mask.read_bytes() == whole
    Image.fromarray(255 - pixels(own / "masks/p1.png")).save(own / "masks/p1.png")
    assert "out/p1.png was made with control_sha256" in refused(*call)
    for inside in (own, own / "out"):
        assert "lies in --controls" in refused(steered, "--controls", own, *PROMPT, "--out", inside)
    assert "p0.png is of another call" in refused(steered, "--controls", own, *PROMPT, "--out", tmp_path)


@pytest.fixture(scope="module")
def unmade(tmp_path_factory, steered) -> Path:
    """What `steered` is known by before its weights are read."""
    run = tmp_path_factory.mktemp("unmade") / "run"
    run.mkdir()
    for name in ("config.yaml", "split.json"):
        shutil.copy(steered / name, run)
    return run


def grey(value: int, *box: int, side: int = 64) -> Image.Image:
    image = Image.new("L", (side, side))
    image.paste(value, box or (8, 8, 20, 20))
    return image


FAULTS = {
    "no folder": (lambda own: shutil.rmtree(own), "there is no folder"),
    "no masks": (lambda own: shutil.rmtree(own / "masks"), "has no folder masks/; this run is steered by masks/"),
    "empty": (lambda own: [p.unlink() for p in own.rglob("*.png")], "there are no pictures"),
    "unpaired": (lambda own: (own / "masks/p1.png").unlink(), "masks has no picture called p1, which another"),
    "two of a name": (lambda own: grey(255).save(own / "masks/p1.tif"), "p1.png and p1.tif have one name"),
    "other classes": (lambda own: grey(128).save(own / "masks/p1.png"), "p1.png has the grey 128, and the masks"),
    "0 and 1": (lambda own: grey(1).save(own / "masks/p1.png"), "p1.png reaches 1, and the masks that the run was"),
    "another shape": (lambda own: grey(255).resize((64, 32), 0).save(own / "masks/p1.png"), "64x64, .* of another sha"),
    "cut short": (
        lambda own: (own / "images/p1.png").write_bytes((own / "images/p1.png").read_bytes()[:300]),
        "p1.png",
    ),
    "no edges": (lambda own: shutil.copytree(own / "images", own / "canny"), "is no edge map, white lines on black"),
    "inverse": (
        lambda own: [
            (own / "canny").mkdir(),
            *(grey(255, 0, 0, 64, 60).save(own / f"canny/p{i}.png") for i in range(4)),
        ],
        "is mostly white: draw edges as white lines on black",
    ),
    "two of a kind": (lambda own: shutil.copytree(own / "images", own / "picture"), "both hold pictures that steer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_control_are_named_before_weights_are_read(unmade, own, tmp_path, fault):
    make, said = FAULTS[fault]
    make(own)
    with pytest.raises(UserError, match=said):
        medsynth("sample", unmade, "--controls", own, *PROMPT, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "arguments", "said"),
    [
        ("Filename,Prompt\np0.png,a\np2,b\n", (), "2 controls have no prompt: p1, p3; give .*prompts.csv rows of them"),
        ("Control,Prompt\np0,a\np0.png,b\n", PROMPT, "rows 2 and 3 are both of p0; --seeds N"),
        ("Prompt\na\n", PROMPT, "give it one column Filename or Control"),
        ("Filename,Prompt\np0,\n", PROMPT, "empty Prompt"),
        (None, (), "4 controls have no prompt: p0, p1, p2, p3; give --prompts FILE or --prompt TEXT"),
        (None, (*PROMPT, "--count", 2), "--count goes with --prompt or --labels"),
        (None, ("--validation", 2), "give one of --prompts FILE"),
    ],
)
def test_every_control_has_its_prompt(unmade, own, tmp_path, rows, arguments, said):
    if rows is not None:
        (tmp_path / "prompts.csv").write_text(rows)
        arguments = (*arguments, "--prompts", tmp_path / "prompts.csv")
    with pytest.raises(UserError, match=said):
        medsynth("sample", unmade, "--controls", own, *arguments, "--out", tmp_path / "out")


def test_rows_of_no_control_are_counted_by_name(own, tmp_path, capsys):
    path = tmp_path / "prompts.csv"
    path.write_text("Filename,Prompt\np0,a\nq7.png,b\n")
    words = _words_of_controls(Request(prompts=path, prompt="rest", controls=own), ["p0", "p1"], worded=True)
    assert words == {"p0": ("a", ""), "p1": ("rest", "")}
    assert "1 of its rows are of no control: q7.png (row 3)" in capsys.readouterr().out


def test_methods_say_by_name_what_they_are_not_steered_by(worded, unmade, own, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "--controls: " in (said := refused(worded, "--controls", own, *PROMPT, *out))
    assert "stable_diffusion draws for captions, not for control" in said
    assert "is steered by mask, canny, picture: give --controls FOLDER" in refused(unmade, *PROMPT, *out)


def test_one_kind_alone_stands_in_the_folder_itself(unmade, own, tmp_path):
    """A control of weight 0 is left out, and so need not be given."""
    from datamodules.chest_xray import ChestXRay, ChestXRayConfig

    data = ChestXRay(ChestXRayConfig(root="nowhere", resolution=32, controls=["canny", "mask"], mask_max=255))
    controls = data.own_controls(own / "masks", ["mask"])
    assert controls.names == ["p0", "p1", "p2", "p3"]
    whole = controls.steering("p1")
    assert whole.shape == (2, 32, 32)
    assert not whole[0].any()
    truth = pixels(own / "masks/p1.png")[1::2, 1::2] / 255  # the nearest pixel's centre
    (own / "masks/deep ä").mkdir()
    (own / "masks/p1.png").rename(own / "masks/deep ä/p1.2.tif.png")
    again = data.own_controls(own / "masks", ["mask"])
    assert again.names == ["deep ä/p1.2.tif", "p0", "p2", "p3"]
    assert torch.equal(again.steering("deep ä/p1.2.tif"), whole)
    assert torch.equal(whole[1], torch.from_numpy(truth).float())
