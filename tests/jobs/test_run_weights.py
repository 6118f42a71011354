"""A run holds on to the pretrained weights that it began with; and how weights are fetched from a hub."""

import hashlib
import json
import os
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlparse

import pytest
from diffusers import UNet2DConditionModel
from omegaconf import OmegaConf

from jobs.encode import encode
from jobs.run.config import load_config
from jobs.run.folder import build_module, load_run
from jobs.run.pretrained import FILE, hold, record
from jobs.train import train
from medsynth.errors import UserError
from tests.conftest import REPOSITORY
from tests.jobs.test_commands import medsynth
from tests.lightning_modules.test_pretrained import refused
from tests.sd_folder import TINY, write_pipeline

PRESET = REPOSITORY / "configs/tiny/stable_diffusion_lora.yaml"


@pytest.fixture(scope="module")
def begun(tmp_path_factory, phantom) -> Path:
    """A folder with a pipeline, `sd1`, and a run of two steps on it, `run`."""
    folder = tmp_path_factory.mktemp("begun")
    write_pipeline(folder / "sd1")
    train(configured(folder, phantom))
    return folder


def configured(folder: Path, phantom: Path, *settings: str) -> OmegaConf:
    given = [f"model.pretrained={folder}/sd1", f"data.root={phantom}", f"run_dir={folder}/run", *TINY]
    given += ["evaluation.images=0", "evaluation.grid=0", "checkpoint.monitor=val/loss"]
    return load_config([PRESET], [*given, f"tracking.uri=sqlite:///{folder}/mlruns.db", *settings])


@pytest.fixture
def again(begun, tmp_path, phantom):
    """The same in folders of its own: the pipeline with the times it had, and the run."""
    shutil.copytree(begun / "run", tmp_path / "run")
    shutil.copytree(begun / "sd1", tmp_path / "sd1")
    text = (tmp_path / "run/config.yaml").read_text().replace(str(begun), str(tmp_path))
    (tmp_path / "run/config.yaml").write_text(text)
    return tmp_path


def test_the_record_has_the_digest_of_every_file_that_is_read(begun, phantom):
    recorded = json.loads((begun / "run" / FILE).read_text())["model.pretrained"]
    for name, said in recorded.items():
        assert said["sha256"] == hashlib.sha256((begun / "sd1" / name).read_bytes()).hexdigest()
    assert {Path(name).parts[0] for name in recorded} == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    events = [json.loads(line) for line in (begun / "run/tracking/events.jsonl").read_text().splitlines()]
    tags = {event["key"]: event["value"] for event in events if event.get("kind") == "tag" or "key" in event}
    assert (
        tags["weights.model.pretrained"]
        == record(begun / "run", build_module(configured(begun, phantom)))["weights.model.pretrained"]
    )


def test_weights_that_have_changed_since_are_refused_by_every_command(again, phantom):
    """The same shapes and names, another number: by name it is the same folder."""
    file = again / "sd1/unet/diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 0x10
    file.write_bytes(content)
    config = configured(again, phantom, "train.max_steps=4")
    said = [
        refused(train, config),
        refused(load_run, again / "run"),
        refused(encode, config, again / "latents"),
        refused(medsynth, "sample", again / "run", "--prompt", "a", "--out", again / "out"),
    ]
    for line in said:
        assert line.startswith(f"model.pretrained: {again}/sd1 is not what {again}/run was trained on")
        assert "unet/diffusion_pytorch_model.safetensors has changed (SHA-256 was " in line
    assert not (again / "out").exists() and not (again / "latents").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "vae/config.json").unlink(), "vae/config.json is missing"),
        (
            lambda folder: (folder / "tokenizer/added_tokens.json").write_text("{}"),
            "tokenizer/added_tokens.json is new",
        ),
        (
            lambda folder: (folder / "scheduler/scheduler_config.json").write_text("{}"),
            "scheduler/scheduler_config.json has changed",
        ),
    ],
)
def test_it_is_said_which_file_is_another(again, phantom, change, said):
    change(again / "sd1")
    assert said in refused(hold, again / "run", build_module(configured(again, phantom)))


def test_the_same_content_goes_on_whatever_its_times_and_whatever_lies_beside(again, phantom):
    unet = again / "sd1/unet"
    os.utime(unet / "diffusion_pytorch_model.safetensors", ns=(1, 1))
    UNet2DConditionModel.from_pretrained(unet).half().save_pretrained(again / "half", variant="fp16")
    shutil.copy(again / "half/diffusion_pytorch_model.fp16.safetensors", unet)  # is not read
    (again / "sd1/README.md").write_text("words")
    module, _ = load_run(again / "run")
    record(again / "run", module)
    stamps = json.loads((again / "run" / FILE).read_text())["model.pretrained"]
    assert stamps["unet/diffusion_pytorch_model.safetensors"]["stamp"][1] == 1


def test_a_run_of_before_has_no_record_and_goes_on_with_one(again, phantom):
    (again / "run" / FILE).unlink()
    (again / "sd1/scheduler/scheduler_config.json").write_text(
        (again / "sd1/scheduler/scheduler_config.json").read_text() + "\n"
    )
    module, _ = load_run(again / "run")
    assert not (again / "run" / FILE).exists(), "sampling writes nothing into a run"
    record(again / "run", module)
    hold(again / "run", module)


def test_a_first_stage_is_held_too(tmp_path, phantom):
    from lightning_modules.msdm_vae import LatentCodec, LatentCodecConfig

    LatentCodec(LatentCodecConfig(widths=[8, 8], norm_groups=4)).save(tmp_path / "vae")
    config = load_config([REPOSITORY / "configs/tiny/msdm.yaml"], [f"model.vae={tmp_path}/vae", "data.root=nowhere"])
    module = build_module(config)
    record(tmp_path, module)
    hold(tmp_path, module)
    (tmp_path / "vae/config.json").write_text((tmp_path / "vae/config.json").read_text() + "\n")
    assert "model.vae" in refused(hold, tmp_path, module)
    assert [weights.key for weights in module.required_weights()] == []


# Fetching


class Hub(BaseHTTPRequestHandler):
    """The three answers of the hub's interface that a download asks for, over the folder `root`; `served` is what was
    downloaded."""

    root: Path
    served: list[str]
    commit = "c" * 40

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlparse(self.path).path)
        files = {str(p.relative_to(self.root)): p for p in self.root.rglob("*") if p.is_file()}
        if path.startswith("/api/") and "/tree/" in path:
            tree = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": "0"} for n, p in files.items()]
            return self._send(json.dumps(tree).encode(), body)
        if path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in files]
            facts = {"id": "some/model", "modelId": "some/model", "sha": self.commit, "siblings": siblings}
            return self._send(json.dumps(facts).encode(), body)
        name = path.split("/", 5)[5] if "/resolve/" in path else ""
        if name not in files:
            return self.send_error(404)
        if body:
            self.served.append(name)
        return self._send(files[name].read_bytes(), body)

    def _send(self, content: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(begun, tmp_path, monkeypatch):
    """A hub on this machine whose one repository, some/model, has the U-Net in shards and also in half precision."""
    from huggingface_hub import constants

    root = shutil.copytree(begun / "sd1", tmp_path / "repository")
    unet = UNet2DConditionModel.from_pretrained(root / "unet")
    (root / "unet/diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(root / "unet", max_shard_size="30KB")
    unet.half().save_pretrained(root / "unet", variant="fp16")
    (root / "v1-5-pruned.ckpt").write_bytes(b"the same weights again")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.root, Hub.served = root, []
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    Thread(target=server.serve_forever, daemon=True).start()
    yield root
    server.shutdown()
    server.server_close()


def test_prepare_weights_fetches_what_an_index_names_and_says_so(hub, phantom):
    arguments = ("prepare", "weights", PRESET, "model.pretrained=some/model", f"data.root={phantom}")
    printed = medsynth(*arguments)
    shards = sorted(path.name for path in (hub / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    for name in shards:
        assert f"unet/{name}, 0.0 MB" in printed
    assert not [name for name in Hub.served if "fp16" in name or name.endswith(".ckpt")]
    module = build_module(load_config([PRESET], ["model.pretrained=some/model", "data.root=nowhere", *TINY]))
    module.configure_model()

    fetched = set(Hub.served)
    medsynth(*arguments)
    assert len(Hub.served) == len(fetched), "what is whole is not fetched again"
    cached = next(Path(module.required_weights()[0].require()).glob(f"unet/{shards[1]}"))
    cached.resolve().unlink()
    cached.unlink()
    assert f"has no {shards[1]}" in refused(module.load_unet)
    medsynth(*arguments)
    assert Hub.served[len(fetched) :] == [f"unet/{shards[1]}"]


def test_a_local_folder_that_is_not_whole_is_told_before_it_is_needed(again, phantom):
    (again / "sd1/vae/diffusion_pytorch_model.safetensors").unlink()
    said = refused(medsynth, "prepare", "weights", PRESET, f"model.pretrained={again}/sd1", f"data.root={phantom}")
    assert said == f"model.pretrained: {again}/sd1 has no weights in vae: neither safetensors nor .bin; " \
                   "copy it there whole, or name another"  # fmt: skip


def test_a_repository_without_weights_is_refused(hub, phantom):
    for file in (hub / "vae").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="the repository some/model has no weights in vae"):
        medsynth("prepare", "weights", PRESET, "model.pretrained=some/model", f"data.root={phantom}")
