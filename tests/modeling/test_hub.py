"""Pushing to and loading from the hub, replaced by a local server with the same HTTP API."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from expertoken.inference.composite_model import CompositeModel
from expertoken.modeling.composite import Composite, Manifest, describe_base, load_composite
from expertoken.modeling.consent import agree
from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.experts import Expert
from expertoken.modeling.files import local_folder
from expertoken.modeling.hub import push
from expertoken.modeling.pool import ExpertPool
from expertoken.modeling.saving import save_composite
from expertoken.tests.tiny import tiny_folder

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory. Every file is uploaded and served as a regular file."""

    repos: ClassVar[dict[str, dict[str, bytes]]] = {}
    protocol_version = "HTTP/1.1"

    def answer(self, body=b"{}", status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        sent = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path == "/api/repos/create":
            asked = json.loads(sent)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.repos.setdefault(name, {})
            self.answer({"url": f"http://{self.headers['host']}/{name}", "id": name})
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/.+", self.path):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(sent)["files"]
            ]
            self.answer({"files": files})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/.+", self.path):
            for line in map(json.loads, sent.decode().splitlines()):
                if line["key"] == "file":
                    self.repos[found[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['host']}/{found[1]}/commit/{COMMIT}"
            self.answer({"commitUrl": url, "commitOid": COMMIT, "success": True})
        else:
            self.answer({"errors": [], "warnings": []})

    def do_GET(self):
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path):
            if found[1] not in self.repos:
                self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
                return
            files = [{"rfilename": name} for name in self.repos[found[1]]]
            self.answer({"id": found[1], "sha": COMMIT, "siblings": files, "private": True, "tags": []})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            content = self.repos[found[1]].get(found[2])
            if content is None:
                self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
                return
            etag = hashlib.sha1(content).hexdigest()
            self.answer(content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/.+", path):
            files = self.repos[found[1]].items()
            self.answer([{"type": "file", "path": name, "size": len(c), "oid": COMMIT} for name, c in files])
        else:
            self.answer({"name": "somebody", "type": "user"})

    do_HEAD = do_GET  # noqa: N815 - the library's name

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """Return a function that runs Python in a fresh process with the stand-in as its hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.repos = {}

    def run(code):
        environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf")}
        environment |= {"HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, timeout=120
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    yield run
    server.shutdown()


def test_what_is_pushed_is_loaded_by_its_id_on_a_machine_that_has_nothing_of_it(tmp_path, hub):
    base = tiny_folder(tmp_path / "base")
    pushed = hub(f"""
        import torch
        from huggingface_hub import HfApi
        from expertoken import CompositeModel, Expert, ExpertPool
        from expertoken.modeling.composite import Composite, Manifest, describe_base, probe_logits
        from expertoken.modeling.meta import MetaLLM, Source
        api = HfApi()
        api.create_repo("team/base")
        api.upload_folder(repo_id="team/base", folder_path={str(base)!r})
        meta = MetaLLM.from_pretrained(Source("team/base"), 3, device="cpu")
        meta.rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        pool = ExpertPool([Expert("math", model="team/base"), Expert("law", model="team/base"), Expert("self", "self")])
        composite = CompositeModel(Composite(meta, pool, Manifest(describe_base(meta), ["math", "law"])))
        composite.push_to_hub("team/composite")
        print(composite.route("hello").probabilities)
    """)
    assert "expertoken.json" in Hub.repos["team/composite"]
    assert b"hf_secret" not in b"".join(Hub.repos["team/composite"].values())
    loaded = hub("""
        from expertoken import CompositeModel
        composite = CompositeModel.from_pretrained("team/composite", device="cpu")
        print(composite.route("hello").probabilities)
        assert composite.chat("hello", max_new_tokens=2).text is not None
    """)
    assert loaded.splitlines()[-1] == pushed.splitlines()[-1]


def test_a_composite_on_folders_of_this_machine_is_not_pushed(meta, pool):
    composite = Composite(meta, pool, Manifest(describe_base(meta), ["math", "law"]))
    with pytest.raises(ExpertokenError, match="the meta LLM's base is a folder of this machine"):
        push(composite, "team/composite")


def test_what_is_no_folder_and_no_repository_is_one_line(tmp_path):
    with pytest.raises(ExpertokenError, match="team/nowhere: expected a folder or a repository on the hub"):
        local_folder("team/nowhere")
    assert local_folder(tmp_path / "gone") == tmp_path / "gone"


def test_keys_of_this_machine_are_sent_where_a_composite_says_by_consent_only(tmp_path, meta, monkeypatch):
    keyed = Expert("math", "openai", "m", base_url="http://elsewhere.example/v1", api_key_env="SOME_KEY")
    pool = ExpertPool([keyed, Expert("law", model="team/law"), Expert("self", "self")])
    save_composite(Composite(meta, pool, Manifest(describe_base(meta), ["math", "law"])), tmp_path / "c", verify=False)
    load_composite(tmp_path / "c", device="cpu")  # reading the folder sends nothing
    monkeypatch.delenv("SOME_KEY", raising=False)
    CompositeModel.from_pretrained(tmp_path / "c", device="cpu")  # without the variable there is no key to send
    monkeypatch.setenv("SOME_KEY", "word")
    monkeypatch.setenv("OPENAI_API_KEY", "word")
    with pytest.raises(ExpertokenError, match=r"SOME_KEY to http://elsewhere.example/v1.*--send-keys"):
        CompositeModel.from_pretrained(tmp_path / "c", device="cpu")
    CompositeModel.from_pretrained(tmp_path / "c", device="cpu", send_keys=True)
    CompositeModel.from_pretrained(tmp_path / "c", device="cpu")  # the consent is remembered
    # The consent does not cover another address for the same variable. The client's own variable for OpenAI is a key of
    # this machine too.
    moved = Expert("law", "openai", "m", base_url="http://here.example/v1", api_key_env="SOME_KEY")
    pool = ExpertPool([Expert("math", "openai", "gpt-5"), moved, Expert("self", "self")])
    save_composite(Composite(meta, pool, Manifest(describe_base(meta), ["math", "law"])), tmp_path / "c", verify=False)
    with pytest.raises(ExpertokenError, match=r"\(OPENAI_API_KEY to OpenAI; SOME_KEY to http://here.example/v1\)"):
        CompositeModel.from_pretrained(tmp_path / "c", device="cpu")
    agree(pool)  # as `prepare` does for the user's own pool file
    CompositeModel.from_pretrained(tmp_path / "c", device="cpu")


def test_where_conversations_can_go_is_told(tmp_path, meta, caplog):
    experts = [Expert("math", "openai", "m", base_url="http://elsewhere.example/v1"),
               Expert("law", model="team/law"), Expert("self", "self")]  # fmt: skip
    composite = Composite(meta, ExpertPool(experts), Manifest(describe_base(meta), ["math", "law"]))
    save_composite(composite, tmp_path / "c", verify=False)
    with caplog.at_level("INFO"):
        CompositeModel.from_pretrained(tmp_path / "c", device="cpu")
    assert "conversations can go to math at elsewhere.example\n" in caplog.text
