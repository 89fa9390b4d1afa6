"""A model's files come from a bucket or from the hub onto a volume, once, whole and checked."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.shard import fetch
from services.shard.fetch import __main__ as program
from services.shard.fetch import checksum
from tests.object_store import Store, serving

_FILES = {
    "config.json": b"{}",
    "model.safetensors": os.urandom(9 << 20),  # in parts
    "tokenizer.json": b'{"version": "1.0"}',
    "sub folder/merges.txt": b"a b\n",
}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    objects = {f"chat/v1/{name}": data for name, data in _FILES.items()}
    with serving({**objects, "chat/v1/": b"", "chat/v10/config.json": b"another"}) as store:
        # a name, which a bucket's name could be put before
        url = store.url.replace("127.0.0.1", "localhost")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_REGION", "eu-central-1")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        yield store


def run(folder: Path, source: str = "s3://models/chat/v1", wanted: str = "") -> int:
    flags = [f"--folder={folder}", f"--source={source}"]
    return program.main([*flags, *([f"--checksum={wanted}"] if wanted else [])])


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def checksum_of(folder: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return checksum.of_folder(folder)


@pytest.mark.usefixtures("bucket")
def test_fetch_brings_what_lies_below_a_prefix_and_says_its_checksum(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "model") == 0

    assert contents(tmp_path / "model") == _FILES
    assert checksum_of(tmp_path / "same", _FILES) in capsys.readouterr().out


def test_fetch_asks_for_nothing_where_the_folder_is_there(bucket: Store, tmp_path: Path) -> None:
    assert run(tmp_path / "model") == 0
    asked = len(bucket.asked)

    assert run(tmp_path / "model") == 0

    assert len(bucket.asked) == asked


@pytest.mark.usefixtures("bucket")
def test_fetch_accepts_the_checksum_that_it_said(tmp_path: Path) -> None:
    wanted = checksum_of(tmp_path / "same", _FILES)

    assert run(tmp_path / "model", wanted=wanted) == 0
    assert program.main([f"--folder={tmp_path / 'model'}", f"--checksum={wanted}"]) == 0


def test_fetch_keeps_nothing_of_what_has_another_checksum(
    bucket: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = checksum_of(tmp_path / "same", _FILES)
    bucket.objects["chat/v1/config.json"] = b"[]"

    assert run(tmp_path / "volume" / "model", wanted=wanted) == 1

    assert f"but {wanted} was wanted" in capsys.readouterr().err
    assert contents(tmp_path / "volume") == {".model.lock": b""}


def test_fetch_takes_up_what_an_attempt_left_behind(bucket: Store, tmp_path: Path) -> None:
    whole = tmp_path / ".model.part" / "model.safetensors"
    whole.parent.mkdir()
    whole.write_bytes(_FILES["model.safetensors"])
    (whole.parent / "config.json").write_bytes(b"{")  # torn
    (whole.parent / "tokenizer.json.4fB1").write_bytes(b"half")  # as boto3 names it meanwhile

    assert run(tmp_path / "model") == 0

    assert contents(tmp_path / "model") == _FILES
    assert bucket.downloads("model.safetensors") == 0
    assert bucket.downloads("config.json") == 1


@pytest.mark.parametrize(
    ("source", "refusal", "said"),
    [
        ("s3://models/nothing", None, "holds no objects"),
        ("s3://models/chat/v1", (403, "AccessDenied"), "AccessDenied"),
        ("s3://models/chat/v1", (404, "NoSuchBucket"), "NoSuchBucket"),
    ],
)
def test_fetch_says_in_one_sentence_what_the_bucket_refuses(
    bucket: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    source: str,
    refusal: tuple[int, str] | None,
    said: str,
) -> None:
    bucket.refusal = refusal

    assert run(tmp_path / "model", source) == 1

    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "model").exists()


def test_fetch_refuses_a_key_that_leads_out_of_the_folder(
    bucket: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.objects["chat/v1/../../../escaped"] = b"!"

    assert run(tmp_path / "a" / "b" / "model") == 1

    assert "which is no file's name" in capsys.readouterr().err
    assert not list(tmp_path.rglob("escaped"))


def test_several_pods_on_a_volume_download_once(bucket: Store, tmp_path: Path) -> None:
    command = [sys.executable, "-m", fetch.__name__, f"--folder={tmp_path / 'model'}"]
    command.append("--source=s3://models/chat/v1")

    pods = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = sorted(pod.communicate(timeout=60)[0].split(" ", 1)[1].split()[0] for pod in pods)

    assert [pod.returncode for pod in pods] == [0, 0, 0]
    assert said == ["has", "is", "is"]
    assert bucket.downloads("model.safetensors") == 1
    assert contents(tmp_path / "model") == _FILES


def test_fetch_brings_a_revision_of_the_hub_without_a_cache(tmp_path: Path) -> None:
    wanted = {name: data for name, data in _FILES.items() if "/" not in name}
    others = {"original/model.safetensors": b"a copy", "pytorch_model.bin": b"pickled"}
    with serving({**wanted, **others}) as store:
        command = [sys.executable, "-m", fetch.__name__, f"--folder={tmp_path / 'model'}"]
        command.append(f"--source=hf://{store.model}@{store.commit}")
        own = {"HF_ENDPOINT": store.url, "HF_TOKEN": "hf_secret", "HOME": str(tmp_path / "home")}
        own["HF_HUB_OFFLINE"] = "0"  # another test may have set it, for this process
        done = subprocess.run(
            command, env={**os.environ, **own}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "Bearer hf_secret" in store.tokens

    assert contents(tmp_path / "model") == wanted
    assert checksum_of(tmp_path / "same", wanted) in done.stdout
    assert "hf_secret" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--folder=x"], "nothing to do"),
        (["--folder=x", "--source=gs://a/b"], "begins neither with hf:// nor s3://"),
        (["--folder=x", "--checksum=md5:0"], "64 hexadecimal digits"),
        (["--source=s3://a/b"], "--folder"),
    ],
)
def test_fetch_refuses_flags_by_name(
    capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    with pytest.raises(SystemExit):
        program.main(flags)

    assert said in capsys.readouterr().err
