"""From one machine to another by way of a Hub, each in a process with an environment and a cache of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hub_server import WRITER, Hub

SCENES = Path(__file__).parent / "hub_scenes.py"


def played(scene, folder, hub, **environment):
    """A scene's process: its answer, and all it wrote to stdout and stderr."""
    folder.mkdir(exist_ok=True)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env = {
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home"), "HF_TOKEN": WRITER,
        "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "HOME": str(folder), "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    env = {key: value for key, value in (kept | env | environment).items() if value is not None}
    done = subprocess.run(
        [sys.executable, str(SCENES), scene, str(folder)],
        env=env,
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def world(base_folder, tmp_path_factory):
    """A Hub with a base at a revision, another model at its head, and an adapter that was trained and pushed."""
    with Hub() as hub:
        files = files_of(base_folder)
        hub.add("ada/base", files, branch="v1")
        hub.add("ada/base", {"README.md": b"empty for now"})
        folder = tmp_path_factory.mktemp("first")
        answer, _ = played("train", folder, hub)
        yield hub, answer, base_folder


def second_machine(world, tmp_path):
    _, answer, base_folder = world
    (tmp_path / "commit").write_text(answer["commit"])
    (tmp_path / "base").symlink_to(base_folder)
    return tmp_path


def test_an_adapter_gives_the_same_numbers_on_another_machine(world, tmp_path):
    hub, answer, _ = world
    found, _ = played("load", second_machine(world, tmp_path), hub)
    for way in ("peft", "local base", "by itself", "at a commit"):
        assert found[way] == pytest.approx(answer["logps"], abs=1e-4), way
    assert found["margin"] == pytest.approx(answer["margin"], rel=1e-4)
    assert found["sources"]["below"] == "ada/adapter"
    assert not (tmp_path / "ada").exists()
    downloaded = {path.name for path in (tmp_path / "home").rglob("snapshots/*/*")}
    assert "adapter_model.safetensors" in downloaded
    card = hub.repos["ada/adapter"].files()["README.md"].decode()
    assert "base_model: ada/base" in card
    assert "base_model_relation: adapter" in card
    assert f"revision v1, commit {hub.repos['ada/base'].branches['v1']}" in card


def test_an_id_at_a_revision_is_a_reference(world, tmp_path):
    hub, _, _ = world
    found, _ = played("reference", tmp_path, hub)
    assert found["ada/adapter"] == found["ada/adapter@main"] == 0
    assert found["ada/base@v1"] == pytest.approx(found["base"], rel=1e-2)  # a model of its own is in bf16
    assert found["base"] != 0
    assert found["record"] == "ada/adapter"


def test_what_is_not_there_is_named(world, tmp_path):
    hub, _, _ = world
    config = hub.repos["ada/adapter"].files()["adapter_config.json"]
    hub.add("ada/pickle", {"adapter_config.json": config, "adapter_model.bin": b"\x80\x04."})
    found, shown = played("mistakes", tmp_path, hub)
    for name in ("base", "adapter", "beside", "reference", "tokenizer"):
        assert found[name].startswith("ValueError: The "), found[name]
        assert "must be at a branch, tag or commit of ada/" in found[name], name
        assert "got 'v9', which it does not have" in found[name], name
    assert "must be id@revision, got ada/base@" in found["empty"]
    assert "`revision` must be left out for ada/base@v1" in found["two"]
    assert "must be a folder or a Hub id, got ada/nobody" in found["nobody"]
    assert "in adapter_model.safetensors, got none" in found["pickle"]
    assert not any(method == "GET" and path.endswith("adapter_model.bin") for method, path, _ in hub.seen)
    assert found["status"] == 2
    assert "qlora-dpo evaluate: The adapter must be at a branch" in shown


@pytest.mark.parametrize("way", ["environment", "login", "hub_token"])
def test_a_token_is_written_nowhere(world, tmp_path, way):
    """Not into any file of the run, the Hub, stdout, stderr, or an error; the login's own file is the login's."""
    hub, _, _ = world
    hub.fail("POST", "/ada/echo/commit", 400)  # whose answer repeats the token
    answer, shown = played("token", tmp_path, hub, SECRET=WRITER, WAY=way, HF_TOKEN=None)
    assert len([text for text in answer["errors"] if "qlora-dpo push --adapter" in text]) >= 4
    assert WRITER not in shown
    assert WRITER not in json.dumps(answer)
    at_home = [path for path in tmp_path.rglob("*") if path.is_file() and WRITER.encode() in path.read_bytes()]
    assert {path.name for path in at_home} <= ({"token", "stored_tokens"} if way == "login" else set())
    assert not list(tmp_path.rglob("training_args.bin"))
    repo = hub.repos[f"ada/run-{way}"]
    for files in repo.commits.values():
        assert not [name for name, content in files.items() if WRITER.encode() in content]
        assert not [name for name in files if name.endswith((".pt", ".pth", ".bin", ".jsonl")) or "state" in name]
    assert {"checkpoint-1/README.md", "checkpoint-2/adapter_model.safetensors", "README.md"} <= set(repo.files())
    assert any(token == WRITER for _, path, token in hub.seen if f"run-{way}" in path)
