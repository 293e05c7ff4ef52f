"""Model cards, and results on a local stand-in for the Hugging Face Hub."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import yaml

from spt_jax.config import LoRAConfig, SPTConfig, TrainConfig
from spt_jax.finetune import DataConfig, FinetuneConfig, finetune
from spt_jax.finetune.card import CARD_FILE
from spt_jax.predict import predict
from tests.spt_jax.finetune.test_finetune import reviews, write_csv
from tests.spt_jax.models.builders import write_readable_checkpoint

LORA = SPTConfig(lora=LoRAConfig(rank=4), attention=None, ffn=None)
TRAIN = TrainConfig(steps=2, batch_size=4)
TOKEN, COMMIT = "hf_" + "t" * 34, "c" * 40


class Hub(http.server.ThreadingHTTPServer):
    """As much of the Hub's API as a push and a download need."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}  # of each repository
        self.private: dict[str, bool] = {}
        self.refuses_commits = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _reply(self, body: object, status: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self._reply({"name": "me"} if known else {"error": "no"}, 200 if known else 401)
        elif path.startswith("/api/models/"):
            owner, name = path.removeprefix("/api/models/").split("/")[:2]
            repository = f"{owner}/{name}"
            if repository not in self.server.files:
                self._reply({}, 404, X_Error_Code="RepoNotFound")
                return
            files = self.server.files[repository]
            listed = [{"rfilename": file} for file in files]
            tree = [{"type": "file", "path": n, "size": len(files[n]), "oid": "0"} for n in files]
            described = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": listed}
            self._reply(tree if "/tree/" in path else described)
        elif "/resolve/" not in path:
            self._reply({}, 404)
        else:
            owner, name, _, _, file = path[1:].split("/", 4)
            content = self.server.files.get(f"{owner}/{name}", {}).get(file)
            if content is None:
                self._reply({}, 404, X_Error_Code="EntryNotFound")
            else:
                self._reply(content, X_Repo_Commit=COMMIT, ETag=f'"{hash(content)}"')

    def do_POST(self) -> None:
        path, body = self.path.partition("?")[0], self._body()
        if path == "/api/repos/create":
            made = json.loads(body)
            repository = f"{made.get('organization') or 'me'}/{made['name']}"
            self.server.files.setdefault(repository, {})
            private = made.get("visibility") == "private" or made.get("private") is True
            self.server.private.setdefault(repository, private)
            self._reply({"url": f"{self.server.address}/{repository}", "name": repository})
            return
        if path == "/api/validate-yaml":
            self._reply({"errors": [], "warnings": []})
            return
        owner, name, what, *_ = path.removeprefix("/api/models/").split("/")
        if what == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._reply({"files": files})
        elif what == "commit" and not self.server.refuses_commits:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.files[f"{owner}/{name}"][entry["value"]["path"]] = content
            url = f"{self.server.address}/{owner}/{name}/commit/{COMMIT}"
            self._reply({"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None})
        else:
            self._reply({"error": "no"}, 403)


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def config(tmp_path) -> FinetuneConfig:
    sizes = {"num_positions": 64, "width": 8, "num_heads": 2, "hidden": 16, "num_layers": 1}
    model = write_readable_checkpoint(tmp_path / "base", **sizes)
    rows = write_csv(tmp_path / "a.csv", ["text", "label"], reviews(20, 0))
    return FinetuneConfig(
        model=str(model), data=DataConfig(train_file=rows), spt=LORA, train=TRAIN,
        out=tmp_path / "run", push_to_hub="me/reviews",
    )  # fmt: skip


def metadata_of(card: str) -> dict:
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)


def test_a_result_is_pushed_and_predicts_from_the_hub(hub, config):
    result = finetune(config)
    pushed = hub.files["me/reviews"]
    assert set(pushed) == {path.name for path in result.directory.iterdir()}
    assert hub.private["me/reviews"]
    for name, content in pushed.items():
        assert content == (result.directory / name).read_bytes()
    texts = ["a lovely film", "a dull one"]
    assert predict("me/reviews", texts) == predict(result.directory, texts)


def test_a_card_says_what_was_trained_and_how_good_it_is(hub, config):
    result = finetune(config)
    card = (result.directory / CARD_FILE).read_text()
    assert metadata_of(card) == {
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["spt-jax", "lora"],
    }
    assert str(Path(config.model).parent) not in card  # a path of this machine
    assert f"| accuracy | {result.figures['accuracy_dense']:.4f} |" in card
    assert "18 rows, 2 steps of 4" in card


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"HF_TOKEN": ""}, ValueError, "nobody is logged in"),
        ({"HF_TOKEN": "hf_" + "w" * 34}, ValueError, "refuses the token"),
        ({"id": "a//b"}, ValueError, "'a//b' is no id"),
        ({"endpoint": "http://127.0.0.1:9"}, ConnectionError, "cannot be reached"),
    ],
)
def test_what_cannot_be_pushed_is_named_before_long_work(
    hub, config, change, error, message, monkeypatch, tmp_path
):
    if "HF_TOKEN" in change:
        monkeypatch.setenv("HF_TOKEN", change["HF_TOKEN"])
    if "endpoint" in change:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", change["endpoint"])
    with pytest.raises(error, match=message):
        finetune(replace(config, push_to_hub=change.get("id", "me/reviews")))
    assert not (tmp_path / "run").exists()


def test_a_refused_push_leaves_the_result(hub, config, tmp_path):
    hub.refuses_commits = True
    with pytest.raises(ConnectionError, match=r"is complete but .* `hf upload me/reviews"):
        finetune(config)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "report.json").is_file()
