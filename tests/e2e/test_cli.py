"""The command line, as a person meets it: clear sentences, no tracebacks, nothing left behind."""

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.mesh_process import (
    DEMO_MODEL,
    INFERMESH,
    Mesh,
    environment,
    processes_naming,
    run_infermesh,
    wait_until,
)

PORTS = ("--port", "0", "--admin-port", "0", "--grpc-port", "0")


def copy_demo(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, model)
    return model


def corrupt_weights(tmp_path: Path) -> list[str]:
    model = copy_demo(tmp_path)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100_000])
    return ["--model", str(model)]


def no_tokenizer(tmp_path: Path) -> list[str]:
    model = copy_demo(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink(missing_ok=True)
    return ["--model", str(model)]


def unsupported_model(tmp_path: Path) -> list[str]:
    model = copy_demo(tmp_path)
    config = json.loads((model / "config.json").read_text())
    config["model_type"] = "mamba"
    (model / "config.json").write_text(json.dumps(config))
    return ["--model", str(model)]


def torn_config(tmp_path: Path) -> list[str]:
    (tmp_path / "infermesh.toml").write_text("[scheduler\nwindow = 2")
    return []


def unknown_key(tmp_path: Path) -> list[str]:
    (tmp_path / "infermesh.toml").write_text("[scheduler]\nwindows = 2\n")
    return []


def public_bind(tmp_path: Path) -> list[str]:
    return ["--host", "0.0.0.0"]


def absent_model(tmp_path: Path) -> list[str]:
    return ["--model", "./nowhere"]


def unreachable_hub_model(tmp_path: Path) -> list[str]:
    return ["--model", "nobody/nothing-here"]


def bad_database_url(tmp_path: Path) -> list[str]:
    return ["--set", "auth.database_url=nonsense"]


def database_without_folder(tmp_path: Path) -> list[str]:
    return ["--set", f"auth.database_url=sqlite:///{tmp_path}/no/auth.sqlite3"]


def newer_database(tmp_path: Path) -> list[str]:
    path = tmp_path / "auth.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        database.execute("INSERT INTO alembic_version VALUES ('9999')")
        database.commit()
    return ["--set", f"auth.database_url=sqlite:///{path}"]


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (bad_database_url, ["auth.database_url", "no database URL"]),
        (database_without_folder, ["auth.database_url", "/no"]),
        (newer_database, ["9999", "later version"]),
        (corrupt_weights, ["model.safetensors"]),
        (no_tokenizer, ["tokenizer"]),
        (unsupported_model, ["mamba", "llama"]),
        (torn_config, ["infermesh.toml", "not valid TOML"]),
        (unknown_key, ["scheduler.windows", "scheduler.window"]),
        (public_bind, ["0.0.0.0", "127.0.0.1"]),
        (absent_model, ["./nowhere"]),
        (unreachable_hub_model, ["nobody/nothing-here"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_up_says_one_sentence_when_it_cannot_start(
    tmp_path: Path, prepare: Callable[[Path], list[str]], words: list[str]
) -> None:
    done = run_infermesh(tmp_path, "up", *PORTS, *prepare(tmp_path))
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if "error:" in line]
    assert len(errors) == 1
    for word in words:
        assert word in errors[0]
    assert processes_naming(str(tmp_path)) == []


def test_up_names_the_port_when_it_is_busy(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run_infermesh(tmp_path, "up", "--port", port, "--admin-port", "0")
    assert done.returncode == 1
    assert f"port {port}" in done.stderr


def test_up_says_so_when_the_disk_is_full(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    # a small disk of its own for the state folder, in a mount namespace that ends with the command
    mount = f"mount -t tmpfs -o size=1m tmpfs {state}"
    probe = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount], capture_output=True, text=True, check=False
    )
    if probe.returncode:
        pytest.skip(f"no mount namespaces here: {probe.stderr.strip()}")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", *INFERMESH, "up", *PORTS],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: the disk with ")
    assert "is full" in done.stderr
    assert processes_naming(str(tmp_path)) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--port", "99999"), ["gateway.http_address", "99999"]),
        (("--set", "gateway.admin_address=127.0.0.1:abc"), ["gateway.admin_address", "abc"]),
        (("--host", "0.0.0.0"), ["0.0.0.0", "127.0.0.1"]),
    ],
)
def test_up_names_the_address_when_it_cannot_be_used(
    tmp_path: Path, flags: tuple[str, ...], words: list[str]
) -> None:
    done = run_infermesh(tmp_path, "up", *flags)
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert "Traceback" not in said
    for word in words:
        assert word in said


def test_up_serves_on_ipv6_loopback(tmp_path: Path) -> None:
    with Mesh(tmp_path, "--engine", "simulated", "--host", "::1") as mesh:
        url = mesh.facts["url"]
        assert url.startswith("http://[::1]:")
        wait_until(lambda: f"at {url}" in mesh.output.read_text(), 10)
        assert [model.id for model in mesh.openai().models.list()] == [mesh.model]


def children(mesh: Mesh) -> list[int]:
    return [service["pid"] for service in mesh.facts["services"]]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_up_drains_and_exits_zero_when_interrupted(tmp_path: Path) -> None:
    with Mesh(tmp_path, "--ask", "What is the capital of France?") as mesh:
        wait_until(lambda: "curl" in mesh.output.read_text(), 60)
        pids = children(mesh)
        stream = mesh.openai(max_retries=0).chat.completions.create(
            model=mesh.model,
            messages=[{"role": "user", "content": "Count from 1 to 30"}],
            temperature=0,
            max_tokens=300,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        chunks = [next(iter(stream))]
        mesh.process.send_signal(signal.SIGINT)
        chunks += list(stream)
        assert mesh.process.wait(60) == 0
        assert chunks[-1].choices[0].finish_reason == "length"
        assert not any(alive(pid) for pid in pids)
        assert not mesh.ready_file.exists()
        said = mesh.output.read_text()
    assert "Paris" in said
    assert "Traceback" not in said


def test_nothing_is_left_running_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    with Mesh(tmp_path, "--engine", "simulated") as mesh:
        pids = children(mesh)
        mesh.process.kill()
        wait_until(lambda: not any(alive(pid) for pid in pids), 60)


def test_chat_finds_mesh_and_key_of_this_machine(demo_mesh: Mesh) -> None:
    done = run_infermesh(demo_mesh.tmp_path, "chat", "What is the capital of France?")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_chat_asks_once_when_given_url_and_key(demo_mesh: Mesh, tmp_path: Path) -> None:
    target = ("--url", demo_mesh.facts["url"], "--api-key", demo_mesh.facts["api_key"])
    done = run_infermesh(tmp_path, "chat", *target, "What is the capital of France?")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_chat_says_what_to_do_when_nothing_answers(tmp_path: Path) -> None:
    done = run_infermesh(tmp_path, "chat", "--url", "http://127.0.0.1:9", "hello")
    assert done.returncode == 1
    assert "infermesh up" in done.stderr


def test_config_show_names_the_origin_of_each_value(tmp_path: Path) -> None:
    toml = '[scheduler]\nwindow = 3\n[gateway]\nhttp_address = "[::1]:0"\n'
    (tmp_path / "infermesh.toml").write_text(toml)
    done = run_infermesh(tmp_path, "config", "show")
    assert "[::1]:0" in done.stdout
    line = next(row for row in done.stdout.splitlines() if row.startswith("scheduler.window "))
    assert "3" in line
    assert "infermesh.toml" in line
