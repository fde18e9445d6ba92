"""Names of models: local folders in this process; the hub in processes of their own.

`huggingface_hub` reads its environment when it is imported, so each look-up that may reach for the
hub runs in a fresh interpreter, against a small server on this machine that speaks the hub's API.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nano_folder import write_nano_folder
from torch_files import write_funasr_folder, write_pt

from funasr_batch.errors import CheckpointError, ModelError
from funasr_batch.weights.checkpoint import open_checkpoint
from funasr_batch.weights.hub import HUB_MODELS, default_cache_dir, resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# --- names that need no hub -----------------------------------------------------------------------


def resolve(name: str | Path, cache: Path) -> Path:
    return resolve_model(str(name), offline=False, cache_dir=cache)


def test_a_folder_of_funasr_is_converted(tmp_path: Path) -> None:
    folder = resolve(write_funasr_folder(tmp_path / "model"), tmp_path / "cache")
    assert open_checkpoint(folder).architecture == "Paraformer"
    assert folder.is_relative_to(tmp_path / "cache")
    assert resolve(folder, tmp_path / "cache") == folder


def test_the_home_folder_may_be_written_as_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_funasr_folder(tmp_path / "model")
    assert open_checkpoint(resolve("~/model", tmp_path / "cache")).architecture == "Paraformer"


def test_an_incomplete_folder_says_what_is_missing(tmp_path: Path) -> None:
    folder = write_funasr_folder(tmp_path / "model")
    (folder / "am.mvn").unlink()
    with pytest.raises(CheckpointError, match=r"has no am\.mvn"):
        resolve(folder, tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("ms:iic/speech_paraformer", "ModelScope", "hf:ORG/NAME"),
        ("hf:funasr", "not a model name", "hf:ORG/NAME"),
        ("hf:a/b/c", "not a model name", "hf:ORG/NAME"),
        ("hf:a/b@../../x", "not a model name", "hf:ORG/NAME"),
        (
            "./no/such/folder",
            "no model and no folder",
            "sample-paraformer, sample-nano, paraformer, nano, nano-mlt, fsmn-vad",
        ),
        ("", "no model and no folder", "paraformer"),
    ],
)
def test_names_that_lead_nowhere(tmp_path: Path, name: str, message: str, hint: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        resolve(name, tmp_path)
    assert caught.value.hint is not None
    assert hint in caught.value.hint


def test_the_cache_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "funasr-batch"
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert default_cache_dir() == tmp_path / ".cache" / "funasr-batch"


# --- a hub on this machine ------------------------------------------------------------------------


@dataclass
class Hub:
    """Repositories by name, and what was asked of them."""

    repositories: dict[str, Path] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    cut_once: set[str] = field(default_factory=set)
    """Files whose first transfer breaks in the middle."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and Range header."""
    endpoint: str = ""

    def fetched(self) -> list[str]:
        return [path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET"]


class HubHandler(BaseHTTPRequestHandler):
    """As much of the hub's API as `snapshot_download` uses."""

    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        rest = parts[4:] if api else parts[2:]
        authorised = self.headers.get("Authorization") == "Bearer secret"
        if repo not in self.hub.repositories or (repo in self.hub.private and not authorised):
            self._error(401, "RepoNotFound")
        elif repo in self.hub.gated:
            self._error(403, "GatedRepo")
        elif rest[1:2] not in ([], ["main"], ["v1"], [COMMIT]):
            self._error(404, "RevisionNotFound")
        elif not api:
            self._file(self.hub.repositories[repo].joinpath(*rest[2:]))
        elif rest[:1] == ["tree"]:
            self._json([self._tree_entry(repo, file) for file in self._files(repo)])
        else:
            siblings = [{"rfilename": self._name(repo, file)} for file in self._files(repo)]
            self._json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings})

    def _files(self, repo: str) -> list[Path]:
        files = self.hub.repositories[repo].rglob("*")
        return sorted(file for file in files if file.is_file())

    def _name(self, repo: str, file: Path) -> str:
        return file.relative_to(self.hub.repositories[repo]).as_posix()

    def _tree_entry(self, repo: str, file: Path) -> dict[str, Any]:
        data = file.read_bytes()
        oid = hashlib.sha1(data).hexdigest()
        return {"type": "file", "path": self._name(repo, file), "size": len(data), "oid": oid}

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "Content-Type": "application/json"})

    def _file(self, file: Path) -> None:
        data = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        asked = self.headers.get("Range")
        if asked is None:
            self._send(200, data, headers, cut=self._is_cut(file))
            return
        first = int(asked.removeprefix("bytes=").partition("-")[0])
        headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self._send(206, data[first:], headers, cut=self._is_cut(file))

    def _is_cut(self, file: Path) -> bool:
        if self.command != "GET" or file.name not in self.hub.cut_once:
            return False
        self.hub.cut_once.remove(file.name)
        return True

    def _send(
        self, status: int, data: bytes, headers: dict[str, str], *, cut: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if cut else data)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    hub = Hub()
    folder = write_funasr_folder(tmp_path / "repository")
    (folder / "README.md").write_text("# A model")
    (folder / "video.mp4").write_bytes(bytes(1000))
    (folder / "optimizer.pt").write_bytes(bytes(1000))
    hub.repositories["org/tiny"] = folder
    handler = type("BoundHandler", (HubHandler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


LOOK_UP = """
import json, sys
from pathlib import Path

def deny(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind"):
        raise RuntimeError(f"a socket was opened: {event} {arguments}")

names, mode, sockets = sys.argv[1].split(), sys.argv[2], sys.argv[3]
if sockets == "denied":
    sys.addaudithook(deny)

from funasr_batch.errors import FunasrBatchError
from funasr_batch.weights.hub import resolve_model

for name in names:
    try:
        cache = Path("cache").absolute()
        answer = {"folder": str(resolve_model(name, offline=mode == "offline", cache_dir=cache))}
    except FunasrBatchError as error:
        answer = {"error": type(error).__name__, "message": str(error), "hint": error.hint}
    print(json.dumps(answer))
"""


@dataclass
class Machine:
    """A home folder without history, and look-ups that run in it."""

    home: Path
    endpoint: str

    def look_up(self, name: str, **how: Any) -> dict[str, str]:
        (answer,) = self.look_up_all(name, **how)
        return answer

    def look_up_all(
        self, *names: str, offline: bool = False, sockets: bool = True, **environment: str
    ) -> list[dict[str, str]]:
        mode = ["offline" if offline else "online", "allowed" if sockets else "denied"]
        process = subprocess.run(
            [sys.executable, "-c", LOOK_UP, " ".join(names), *mode],
            capture_output=True,
            text=True,
            cwd=self.home,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(Path(__file__).parents[1]),
                "HOME": str(self.home),
                "HF_ENDPOINT": self.endpoint,
                **environment,
            },
            timeout=60,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        assert "%|" not in process.stderr, "a progress bar was drawn where nobody looks"
        return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.fixture
def machine(hub: Hub, tmp_path: Path) -> Machine:
    home = tmp_path / "home"
    home.mkdir()
    return Machine(home, hub.endpoint)


def test_downloaded_once_and_only_what_is_wanted(hub: Hub, machine: Machine) -> None:
    first = machine.look_up("hf:org/tiny")
    checkpoint = open_checkpoint(Path(first["folder"]))
    assert checkpoint.architecture == "Paraformer"
    assert checkpoint.revision == COMMIT
    wanted = {"config.yaml", "model.pt", "am.mvn", "tokens.json"}
    assert wanted <= set(hub.fetched())
    assert {"README.md", "video.mp4", "optimizer.pt"}.isdisjoint(hub.fetched())
    snapshots = machine.home / ".cache/huggingface/hub/models--org--tiny/snapshots"
    assert {path.name for path in (snapshots / COMMIT).iterdir()} == wanted

    hub.requests.clear()
    assert machine.look_up("hf:org/tiny", sockets=False)["folder"] == first["folder"]
    assert machine.look_up("hf:org/tiny", offline=True, sockets=False)["folder"] == first["folder"]
    assert hub.requests == []


def test_short_names(hub: Hub, machine: Machine) -> None:
    for repo in HUB_MODELS.values():
        hub.repositories[repo] = hub.repositories["org/tiny"]
    for repo, answer in zip(HUB_MODELS.values(), machine.look_up_all(*HUB_MODELS), strict=True):
        assert open_checkpoint(Path(answer["folder"])).architecture == "Paraformer"
        assert ("GET", f"/{repo}/resolve/{COMMIT}/model.pt", None) in hub.requests


def test_the_environment_of_the_hub(hub: Hub, machine: Machine, tmp_path: Path) -> None:
    hub.private.add("org/tiny")
    answer = machine.look_up("hf:org/tiny@v1", HF_HOME=str(tmp_path / "hf"), HF_TOKEN="secret")
    assert open_checkpoint(Path(answer["folder"])).revision == COMMIT
    assert (tmp_path / "hf/hub/models--org--tiny/refs/v1").read_text() == COMMIT
    assert not (machine.home / ".cache").exists()


def test_a_transfer_that_breaks_is_taken_up_where_it_broke(hub: Hub, machine: Machine) -> None:
    large = np.zeros(6 << 20, np.float32)  # the client writes blocks of 10 MB
    write_pt(hub.repositories["org/tiny"] / "model.pt", {"x": large})
    hub.cut_once.add("model.pt")
    answer = machine.look_up("hf:org/tiny")
    if "error" in answer:  # some versions of the client give up at the first break
        assert "Run it again" in answer["hint"]
        answer = machine.look_up("hf:org/tiny")
    assert open_checkpoint(Path(answer["folder"])).specs["x"].shape == large.shape
    asked = [range_ for method, _, range_ in hub.requests if method == "GET" and range_]
    assert len(asked) == 1
    assert int(asked[0].removeprefix("bytes=").removesuffix("-")) > 1_000_000


def test_a_snapshot_that_lost_a_file_is_completed(hub: Hub, machine: Machine) -> None:
    folder = machine.look_up("hf:org/tiny")["folder"]
    repository = machine.home / ".cache/huggingface/hub/models--org--tiny"
    (repository / "snapshots" / COMMIT / "am.mvn").unlink()
    for notes in repository.glob("trees"):  # older clients keep no list of what belongs there
        shutil.rmtree(notes)
    assert machine.look_up("hf:org/tiny")["folder"] == folder
    assert (repository / "snapshots" / COMMIT / "am.mvn").is_file()


def test_what_the_hub_refuses(hub: Hub, machine: Machine) -> None:
    tiny = hub.repositories["org/tiny"]
    hub.repositories.update({"org/gated": tiny, "org/private": tiny})
    hub.gated.add("org/gated")
    hub.private.add("org/private")
    answers = machine.look_up_all(
        "hf:org/nothing", "hf:org/private", "hf:org/tiny@v9", "hf:org/gated", "hf:org/bad--name"
    )
    assert {answer["error"] for answer in answers} == {"ModelError"}
    missing, private, revision, gated, name = answers
    assert "has no model org/nothing" in missing["message"]
    assert "HF_TOKEN" in private["hint"]
    assert revision["message"] == "org/tiny has no revision v9"
    assert "accepted its terms" in gated["message"]
    assert "cannot be the name" in name["message"]


def test_no_network_says_what_to_do(machine: Machine) -> None:
    machine.endpoint = "http://127.0.0.1:9"
    answer = machine.look_up("paraformer")
    assert answer["error"] == "ModelError"
    assert "http://127.0.0.1:9 cannot be reached" in answer["message"]
    assert "hf download funasr/paraformer-zh" in answer["hint"]
    assert str(machine.home / ".cache/huggingface/hub") in answer["hint"]


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_offline_opens_no_socket(machine: Machine, environment: dict[str, str]) -> None:
    offline = not environment
    answer = machine.look_up("paraformer", offline=offline, sockets=False, **environment)
    assert answer["error"] == "ModelError"
    assert "no network may be used" in answer["message"]
    assert "hf download funasr/paraformer-zh" in answer["hint"]


def test_the_advice_for_a_host_without_network_works(
    hub: Hub, machine: Machine, tmp_path: Path
) -> None:
    """`hf download` on one machine, a copied folder, and the other transcribes offline."""
    hub.repositories["funasr/paraformer-zh"] = hub.repositories["org/tiny"]
    connected = tmp_path / "connected"
    subprocess.run(
        [Path(sys.executable).with_name("hf"), "download", "funasr/paraformer-zh"],
        env={"PATH": os.environ["PATH"], "HOME": str(connected), "HF_ENDPOINT": hub.endpoint},
        check=True,
        capture_output=True,
        timeout=60,
    )
    cache = Path(".cache/huggingface/hub")
    (machine.home / cache).mkdir(parents=True)
    repository = cache / "models--funasr--paraformer-zh"
    subprocess.run(["cp", "-r", connected / repository, machine.home / cache], check=True)
    answer = machine.look_up("paraformer", offline=True, sockets=False)
    assert open_checkpoint(Path(answer["folder"])).revision == COMMIT


def test_nano_comes_with_its_language_model_s_files(hub: Hub, machine: Machine) -> None:
    repository = write_nano_folder(machine.home.parent / "nano")
    for unwanted in ("config.json", "vocab.json", "Qwen3-0.6B/model.safetensors", "example/zh.mp3"):
        (repository / unwanted).parent.mkdir(exist_ok=True)
        (repository / unwanted).write_bytes(bytes(100))
    hub.repositories[HUB_MODELS["nano"]] = repository
    checkpoint = open_checkpoint(Path(machine.look_up("nano")["folder"]))
    assert checkpoint.architecture == "FunASRNano"
    assert checkpoint.tokenizer is not None
    assert checkpoint.ctc_vocabulary is not None
    snapshots = machine.home / ".cache/huggingface/hub/models--FunAudioLLM--Fun-ASR-Nano-2512"
    snapshot = snapshots / "snapshots" / COMMIT
    assert {p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()} == {
        "config.yaml", "model.pt", "multilingual.tiktoken", "Qwen3-0.6B/config.json",
        "Qwen3-0.6B/vocab.json", "Qwen3-0.6B/merges.txt", "Qwen3-0.6B/tokenizer_config.json",
    }  # fmt: skip

    (snapshot / "Qwen3-0.6B" / "merges.txt").unlink()
    assert machine.look_up("nano", offline=True, sockets=False)["error"] == "ModelError"
    assert "folder" in machine.look_up("nano")
    assert (snapshot / "Qwen3-0.6B" / "merges.txt").is_file()


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("sample-paraformer", "Paraformer"), ("sample-nano", "FunASRNano")],
)
def test_the_sample_models(tmp_path: Path, name: str, architecture: str) -> None:
    folder = Path(__file__).parents[1] / "funasr_batch" / "sample_models" / name
    if not folder.is_dir():
        with pytest.raises(ModelError, match=f"{name} is not part of this installation"):
            resolve(name, tmp_path)
        return
    assert resolve(name, tmp_path) == folder
    assert open_checkpoint(folder).architecture == architecture
