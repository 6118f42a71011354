"""The manifests, and their pods as processes of this machine: as many as the Job says, each with an address of its own.

Container images, volumes and DNS are the cluster's; here they are this checkout, folders and addresses. Command,
arguments, environment, config and what the Job does about an exit code are read from the manifest.
"""

import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import kubernetes_validate
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from callbacks.durable import verify
from jobs.cluster.elastic import exit_code
from jobs.cluster.kubernetes import load_for_pods, manifests, presets, render
from jobs.study.manifests import staged_manifests
from jobs.train import train
from medsynth.errors import UserError
from tests.conftest import REPOSITORY
from tests.processes import together

COMMITTED = sorted((REPOSITORY / "k8s").glob("*.yaml"))
TRAININGS = [path for path in COMMITTED if path.stem.endswith("-train")]
# Since 1.31 a Job's failure policy is stable; the newest that is published with the validator.
VERSIONS = ("1.31", "1.33", "1.37")
MLFLOW = REPOSITORY / "k8s/mlflow.yaml"
MAKE = "run `make manifests`"


def objects(text: str) -> dict[str, dict]:
    """The objects of a manifest by kind, claims by kind and name."""
    found = [item for item in yaml.safe_load_all(text) if item]
    return {
        f"{item['kind']}/{item['metadata']['name']}" if item["kind"] == "PersistentVolumeClaim" else item["kind"]: item
        for item in found
    }


@pytest.fixture(scope="module")
def msdm() -> dict[str, dict]:
    return objects((REPOSITORY / "k8s/msdm-train.yaml").read_text())


def test_every_training_preset_and_every_job_of_stages_has_its_manifest(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    names = {f"{preset.stem}-train.yaml" for preset in presets()} | {path.name for path, _ in staged_manifests()}
    assert {path.name for path in TRAININGS} == names
    assert {"llcm-train.yaml", "kandinsky-train.yaml"} <= names


def test_the_committed_manifests_are_the_templates_own(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for path, text in [*manifests(), *staged_manifests()]:
        assert path.read_text() == text, f"{path.name} is not what the template makes of its config: {MAKE}"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_manifests_follow_the_published_schemas(path, version):
    for item in yaml.safe_load_all(path.read_text()):
        kubernetes_validate.validate(item, version, strict=True)


@pytest.mark.parametrize("nodes", [1, 4])
def test_any_number_of_pods_follows_the_schemas(nodes):
    found = objects(render(load_for_pods([str(REPOSITORY / "configs/llcm.yaml")], nodes=nodes, gpus=1)))
    for item in found.values():
        kubernetes_validate.validate(item, VERSIONS[-1], strict=True)
    assert (found["Job"]["spec"]["completions"], found["Job"]["spec"]["parallelism"]) == (nodes, nodes)
    # Pods of several nodes write to one volume.
    access = {item["spec"]["accessModes"][0] for item in found.values() if item["kind"] == "PersistentVolumeClaim"}
    assert access == {"ReadWriteMany" if nodes > 1 else "ReadWriteOnce"}


def test_a_wrong_key_would_be_seen(msdm):
    wrong = json.loads(json.dumps(msdm["Job"]))
    wrong["spec"]["template"]["spec"]["containers"][0]["securityContext"]["readOnlyRootFileSystem"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="readOnlyRootFileSystem"):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_pods_find_each_other(msdm):
    name, service, job = "msdm-train", msdm["Service"], msdm["Job"]["spec"]
    pod = job["template"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert service["metadata"]["name"] == pod["spec"]["subdomain"] == name
    assert job["completionMode"] == "Indexed"
    [container] = pod["spec"]["containers"]
    [port] = service["spec"]["ports"]
    assert port["port"] == container["ports"][0]["containerPort"]
    assert f"--endpoint={name}-0.{name}:{port['port']}" in container["args"]


def test_pods_may_do_no_more_than_they_need(msdm):
    pod = msdm["Job"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == user_of_the_image()
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False


def user_of_the_image() -> int:
    last = [line for line in (REPOSITORY / "Dockerfile").read_text().splitlines() if line.startswith("USER ")][-1]
    return int(last.removeprefix("USER "))


def test_a_pod_has_what_a_training_needs(msdm):
    pod = msdm["Job"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    limits = container["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 8
    assert {"cpu", "memory", "ephemeral-storage"} <= limits.keys()
    volumes = {volume.pop("name"): volume for volume in json.loads(json.dumps(pod["volumes"]))}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert "emptyDir" in mounts["/tmp"]
    assert mounts["/etc/medsynth"]["configMap"]["name"] == msdm["ConfigMap"]["metadata"]["name"]
    for folder in ("data", "runs"):
        claim = mounts[f"{container['workingDir']}/{folder}"]["persistentVolumeClaim"]["claimName"]
        assert f"PersistentVolumeClaim/{claim}" in msdm
    # Whatever libraries write lies on a volume, for the root file system takes nothing.
    places = [item["value"] for item in container["env"] if item.get("value", "").startswith("/")]
    assert len(places) > 3
    assert all(place.startswith(tuple(mounts)) for place in places)
    [secret] = [source["secretRef"] for source in container["envFrom"]]
    assert secret["optional"]


def test_the_config_travels_resolved(msdm, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(msdm["ConfigMap"]["data"]["config.yaml"])
    assert "${" not in path.read_text()
    assert render(load_for_pods([str(path)]), name="msdm-train") == (REPOSITORY / "k8s/msdm-train.yaml").read_text()


def test_gpus_are_as_many_as_the_batch_allows():
    found = {path.stem: objects(path.read_text())["Job"]["spec"]["template"]["spec"] for path in TRAININGS}
    gpus = {name: pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] for name, pod in found.items()}
    assert gpus["hypernetwork-train"] == 1  # one picture a step
    assert gpus["llcm-train"] == gpus["stable_diffusion-train"] == 8
    with pytest.raises(UserError, match="global_batch_size"):
        load_for_pods([str(REPOSITORY / "configs/hypernetwork.yaml")], gpus=8)


def test_a_name_that_kubernetes_cannot_take_is_refused():
    config = load_for_pods([str(REPOSITORY / "configs/llcm.yaml")])
    assert objects(render(config, name="My_Run 2"))["Job"]["metadata"]["name"] == "my-run-2"
    for name in ("7th", "x" * 60, "!"):
        with pytest.raises(UserError, match="names no Kubernetes object"):
            render(config, name=name)


def action(job: dict, code: int, disrupted: bool = False) -> str:
    """What the Job does about a pod that ended so: the first rule that fits, else Count."""
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            fits = code in rule["onExitCodes"]["values"] and rule["onExitCodes"]["operator"] == "In"
        else:
            fits = disrupted and {"type": "DisruptionTarget", "status": "True"} in rule["onPodConditions"]
        if fits:
            return rule["action"]
    return "Count"


def test_what_ends_a_pod_decides_what_it_costs(msdm):
    job = msdm["Job"]
    assert action(job, 2) == action(job, 76) == action(job, 2, disrupted=True) == "FailJob"
    assert action(job, 75) == action(job, 137, disrupted=True) == "Ignore"
    assert action(job, 1) == action(job, 137) == "Count"
    spec = job["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["podReplacementPolicy"] == "Failed"  # as a failure policy asks for
    assert spec["backoffLimitPerIndex"] > 0
    assert spec["maxFailedIndexes"] == 0  # a training without one of its pods is none
    assert spec["ttlSecondsAfterFinished"] > 24 * 3600
    grace = yaml.safe_load(msdm["ConfigMap"]["data"]["config.yaml"])["preemption"]["grace_seconds"]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > grace >= 300


def test_exit_codes_of_workers_become_one():
    assert exit_code([]) == 0
    assert exit_code([1, 2]) == exit_code([2, 75]) == 2
    assert exit_code([-9, 76]) == 76
    assert exit_code([75, 75]) == 75
    assert exit_code([75, -9]) == exit_code([75, 1]) == exit_code([-15]) == 1
    assert exit_code([75, -15]) == exit_code([143]) == 1
    assert exit_code([75, -15, 143], terminated=True) == 75
    assert exit_code([75, -9], terminated=True) == 1


def free_port() -> int:
    """A port below those that connections of other processes take in the meantime."""
    while True:
        port = random.randint(15000, 32000)
        with suppress(OSError), socket.create_server(("", port)):
            return port


class Pod:
    """One pod of a manifest: its processes, at an address of this machine, with folders for its volumes."""

    _addresses = (f"127.77.{number // 250}.{number % 250 + 1}" for number in itertools.count())

    def __init__(self, manifest: dict[str, dict], index: int, folder: Path, port: int, first: str | None = None):
        """folder: stands for the file systems. port: in the place of the Service's, which all addresses here share.

        first: address of the first pod, where this is another.
        """
        spec = manifest["Job"]["spec"]["template"]["spec"]
        [container] = spec["containers"]
        self.address = next(self._addresses)
        name = f"{manifest['Job']['metadata']['name']}-0.{spec['subdomain']}:{container['ports'][0]['containerPort']}"
        self._names = {name: f"{first or self.address}:{port}"}
        self._folder = folder
        self._paths = [container["workingDir"], *(mount["mountPath"] for mount in container["volumeMounts"])]
        for path in self._paths:
            self._here(path).mkdir(parents=True, exist_ok=True)
        self._here("/etc/medsynth/config.yaml").write_text(manifest["ConfigMap"]["data"]["config.yaml"])
        # One variable is the cluster's to fill in, one comes with the Job's being Indexed, the last two with the image.
        variables = {item["name"]: self._translate(item.get("value", self.address)) for item in container["env"]}
        variables |= {"JOB_COMPLETION_INDEX": str(index)}
        variables |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
        command = [self._translate(word, variables) for word in [*container["command"], *container["args"]]]
        self._log = folder / f"pod-{index}-{self.address}.log"
        with self._log.open("w") as log:
            self.process = psutil.Popen(
                command, env=variables, cwd=self._here(container["workingDir"]), stdout=log, stderr=subprocess.STDOUT
            )

    def _here(self, path: str) -> Path:
        return self._folder / path.strip("/")

    def _translate(self, word: str, variables: dict[str, str] | None = None) -> str:
        for name, value in (variables or {}).items():
            word = word.replace(f"$({name})", value)
        for name, address in self._names.items():
            word = word.replace(name, address)
        return str(self._here(word)) if word.startswith(tuple(self._paths)) else word

    def kill(self) -> None:
        """End all its processes at once, as when a node is lost."""
        processes = [self.process, *self.process.children(recursive=True)]
        for process in processes:
            process.suspend()  # so that none sees another one end
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=20)

    def wait(self, seconds: float = 150) -> int:
        return self.process.wait(seconds)

    @property
    def log(self) -> str:
        return self._log.read_text()


class Job:
    """What the Job controller does with the pods of a manifest."""

    def __init__(self, manifest: dict[str, dict], folder: Path):
        self.manifest, self.folder, self.port = manifest, folder, free_port()
        self.pods: dict[int, Pod] = {}
        rules = manifest["Job"]["spec"]["successPolicy"]["rules"]
        self._suffice = {int(rule["succeededIndexes"]) for rule in rules}
        self.ended: list[tuple[int, int, str]] = []  # index, exit code and what it cost
        for index in range(manifest["Job"]["spec"]["completions"]):
            self.start(index)

    def start(self, index: int) -> None:
        first = self.pods[0].address if index else None
        self.pods[index] = Pod(self.manifest, index, self.folder, self.port, first)

    def lose(self, index: int) -> None:
        """Kill a pod as a lost node does; `finish` replaces it."""
        self.pods[index].kill()

    def finish(self, seconds: float) -> str:
        """Replace pods until the Job is Complete or Failed; which of them."""
        deadline = time.monotonic() + seconds
        while True:
            assert time.monotonic() < deadline, "\n".join(pod.log[-3000:] for pod in self.pods.values() if pod)
            for index, code in self._just_ended():
                if code == 0 and index in self._suffice:
                    self.stop()
                    return "Complete"
                if code == 0:
                    self.pods[index] = None
                    continue
                done = action(self.manifest["Job"], code, disrupted=code == -signal.SIGKILL)
                self.ended.append((index, code, done))
                if done == "FailJob":
                    self.stop()
                    return "Failed"
                self.start(index)
            time.sleep(0.2)

    def _just_ended(self) -> list[tuple[int, int]]:
        return [(i, pod.process.poll()) for i, pod in self.pods.items() if pod and pod.process.poll() is not None]

    def stop(self) -> None:
        for pod in self.pods.values():
            if pod and pod.process.is_running():
                pod.kill()


@pytest.fixture
def launch():
    """Starts the Job of a manifest, and leaves nothing of it behind."""
    jobs = []

    def start(manifest: dict[str, dict], folder: Path) -> Job:
        jobs.append(Job(manifest, folder))
        return jobs[-1]

    yield start
    for job in jobs:
        job.stop()


TINY = [
    str(REPOSITORY / "configs/tiny/msdm.yaml"), "hardware.precision=32-true", "hardware.threads=1",
    "train.global_batch_size=8", "train.device_batch_size=2", "run_dir=runs/tiny",
    "evaluation.images=0", "evaluation.grid=0", "checkpoint.monitor=val/loss", "ema.decay=0.9",
    "train.max_steps=40", "train.validate_every_steps=20", "checkpoint.every_steps=1",
    "tracking.timeout_seconds=0", "data.validation_images=2",
]  # fmt: skip


def tiny(nodes: int, processes: int, *settings: str) -> dict[str, dict]:
    """The manifest of a tiny training on CPUs."""
    return objects(render(load_for_pods([*TINY, *settings], nodes=nodes, gpus=processes)))


def calm(_: int, folder: Path, data: Path) -> None:
    """One of the processes of the same training without pods, in `folder`."""
    os.chdir(folder)
    train(load_for_pods([*TINY, f"data.root={data}"], nodes=1, gpus=2))


def volumes(folder: Path, data: Path) -> Path:
    """`folder` with the data set where the volume of the data is mounted."""
    (folder / "medsynth").mkdir(parents=True)
    (folder / "medsynth/data").mkdir()
    (folder / "medsynth/data/phantom").symlink_to(data)
    return folder


def step(folder: Path) -> int:
    """The optimizer step of the last checkpoint; 0 where there is none."""
    try:
        return json.loads((folder / "medsynth/runs/tiny/checkpoints/last.ckpt/manifest.json").read_text())[
            "global_step"
        ]
    except FileNotFoundError:
        return 0


def wait_for_step(folder: Path, wanted: int, job: Job, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while step(folder) < wanted:
        runs = all(pod.process.poll() is None for pod in job.pods.values())
        assert runs and time.monotonic() < deadline, "\n".join(pod.log[-3000:] for pod in job.pods.values())
        time.sleep(0.05)


def test_lost_pods_come_back_and_the_training_ends_as_if_none_had_been_lost(tmp_path, phantom, launch):
    """Of two pods one is lost, then the one that keeps the store."""
    together(2, calm, tmp_path, phantom, log=tmp_path / "calm.log", seconds=400)

    folder = volumes(tmp_path / "disturbed", phantom)
    job = launch(tiny(2, 1), folder)
    wait_for_step(folder, 5, job)
    survivor = job.pods[0]
    job.lose(1)
    job.start(1)
    wait_for_step(folder, step(folder) + 5, job)
    assert job.pods[0] is survivor
    assert survivor.process.poll() is None
    job.lose(0)
    assert 0 < step(folder) < 35
    assert job.finish(400) == "Complete"

    # The survivor of the first pod leaves its place without being charged for it.
    assert {done for _, _, done in job.ended} == {"Ignore"}
    assert {index: code for index, code, _ in job.ended} == {0: -signal.SIGKILL, 1: 75}
    for file in ("weights", "ema"):
        name = f"runs/tiny/checkpoints/last.ckpt/{file}.safetensors"
        expected, found = load_file(tmp_path / name), load_file(folder / "medsynth" / name)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            # Not to the bit: DDP's buckets, which each start lays out anew, decide what is rounded together.
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def test_a_drained_pod_takes_the_others_along_and_all_save(tmp_path, phantom, launch):
    """SIGTERM to one pod of two processes, as the kubelet sends it, ends both with 75, at no cost to the Job."""
    folder = volumes(tmp_path, phantom)
    job = launch(tiny(2, 2, "train.max_steps=2000"), folder)
    wait_for_step(folder, 5, job)
    job.pods[1].process.terminate()
    assert [pod.process.wait(300) for pod in job.pods.values()] == [75, 75], job.pods[1].log
    assert "saving at the end of this step" in job.pods[1].log
    assert verify(folder / "medsynth/runs/tiny/checkpoints/last.ckpt") is None
    assert action(job.manifest["Job"], 75) == "Ignore"


def test_a_users_mistake_fails_the_job_at_once(tmp_path, phantom, launch):
    folder = volumes(tmp_path, phantom)
    job = launch(tiny(1, 1, "data.root=data/nowhere", "hardware.strategy=auto"), folder)
    [pod] = job.pods.values()
    assert job.finish(400) == "Failed"
    assert job.ended == [(0, 2, "FailJob")]
    assert "data/nowhere" in pod.log
    assert "Traceback" not in pod.log


@pytest.fixture(scope="module")
def mlflow() -> list[dict]:
    return [item["spec"] | {"kind": item["kind"]} for item in yaml.safe_load_all(MLFLOW.read_text())]


def test_the_tracking_server_has_its_database_and_volumes(mlflow):
    pods = [spec["template"]["spec"] for spec in mlflow if spec["kind"] in ("Deployment", "StatefulSet")]
    assert len(pods) == 2
    for pod in pods:
        [container] = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["resources"]["limits"].keys() == {"cpu", "memory"}
    text = MLFLOW.read_text()
    assert "kind: Secret" not in text  # a password in a file that is shared would be none
    assert text.count("secretKeyRef") == 2


def test_the_tracking_server_answers_to_its_service_and_to_nobody_else(mlflow, msdm, tmp_path):
    """The server of the manifest, with a file in the place of PostgreSQL."""
    [pod] = [spec["template"]["spec"] for spec in mlflow if spec["kind"] == "Deployment"]
    [container] = pod["containers"]
    port = free_port()
    arguments = [argument for argument in container["args"] if not argument.startswith(("--host", "--backend"))]
    arguments = [argument.replace("=/artifacts", f"={tmp_path}/artifacts") for argument in arguments]
    arguments += [
        f"--backend-store-uri=sqlite:///{tmp_path}/mlflow.db",
        "--host=127.0.0.1",
        f"--port={port}",
        "--workers=1",
    ]
    command = [str(Path(sys.executable).parent / container["command"][0]), *container["command"][1:], *arguments]
    with (tmp_path / "log").open("w") as log:
        server = psutil.Popen(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)

    def answer(path: str, host: str, body: bytes | None = None) -> int:
        headers = {"Host": host, "Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers)
        try:
            return urllib.request.urlopen(request, timeout=20).status
        except urllib.error.HTTPError as error:
            return error.code

    try:
        deadline = time.monotonic() + 200
        while True:  # as the startup probe, which knows the pod by address
            with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                assert answer(container["startupProbe"]["httpGet"]["path"], "10.0.0.7:5000") == 200
                break
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.5)
        [uri] = [item["value"] for item in job_environment(msdm) if item["name"] == "MLFLOW_TRACKING_URI"]
        search = ("/api/2.0/mlflow/experiments/search", b'{"max_results": 1}')
        assert answer(search[0], uri.removeprefix("http://"), search[1]) == 200
        assert answer(search[0], "localhost:5000", search[1]) == 200  # a port-forward
        assert answer(search[0], "elsewhere.example", search[1]) == 403
    finally:
        children = [*server.children(recursive=True), server]
        for process in children:
            process.kill()
        psutil.wait_procs(children, timeout=20)


def job_environment(manifest: dict[str, dict]) -> list[dict]:
    return manifest["Job"]["spec"]["template"]["spec"]["containers"][0]["env"]


WORKER = """
import os, signal, sys, time
rank, (how, folder) = int(os.environ["RANK"]), sys.argv[1:]
os.chdir(folder)
with open(f"starts-{rank}", "a") as file:
    file.write("x")
def save(*_):
    time.sleep(2 * rank)
    open(f"saved-{rank}", "w").close()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
open(f"ready-{rank}", "w").close()
if rank == 0 and how != "wait":
    time.sleep(1)
    sys.exit(int(how))
time.sleep(100)
"""


class Agents:
    """Agents of one pod with two workers, which need no torch."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "worker.py").write_text(WORKER)

    def start(self, how: str, index: int = 0, wait: int = 60) -> tuple[subprocess.Popen, Path]:
        folder = self.folder / f"{how}-{index}"
        folder.mkdir()
        address = next(Pod._addresses)
        command = [
            sys.executable,
            "-m",
            "jobs.cluster.pod",
            "--nodes=1",
            "--processes=2",
            "--id=test",
            f"--address={address}",
        ]
        command += [f"--endpoint={address}:{free_port()}", "--restarts=1", "--grace=30", f"--wait={wait}"]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        command += [f"--index={index}", "--", str(self.folder / "worker.py"), how, str(folder)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True), folder


def test_the_agent_ends_as_its_workers_do(tmp_path):
    """Each code of a worker; a failure that another try may mend is tried again in place."""
    agents = Agents(tmp_path)
    running = {how: agents.start(how) for how in ("2", "76", "1")}
    errors = {how: process.communicate(timeout=100)[1] for how, (process, _) in running.items()}
    assert {how: process.returncode for how, (process, _) in running.items()} == {"2": 2, "76": 76, "1": 1}, errors
    starts = {how: (folder / "starts-0").read_text() for how, (_, folder) in running.items()}
    assert starts == {"2": "x", "76": "x", "1": "xx"}


def test_sigterm_reaches_the_workers_and_none_is_cut_short(tmp_path):
    """The second worker saves for seconds after the first one has ended."""
    process, folder = Agents(tmp_path).start("wait")
    deadline = time.monotonic() + 60
    while len(list(folder.glob("ready-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 75
    assert {path.name for path in folder.glob("saved-*")} == {"saved-0", "saved-1"}
    assert (folder / "starts-0").read_text() == "x"


def test_a_pod_that_waits_for_others_ends_in_time(tmp_path):
    """Nobody keeps the store: free of charge after the wait, and at once on SIGTERM."""
    agents = Agents(tmp_path)
    alone, _ = agents.start("wait", index=1, wait=3)
    told, _ = agents.start("wait", index=2, wait=500)
    assert alone.wait(60) == 75
    assert "out of reach" in alone.stderr.read()
    told.terminate()
    assert told.wait(20) == 75
