"""The protos beside the previous version's: nothing breaks, what came says what silence means."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from tests.skew.freeze import ROOT, unpack

PROTOS = ROOT / "protos"
BUF = Path(sys.executable).with_name("buf")
# How a comment says what the sender's silence means.
_SILENCE = re.compile(r"\b(absent|empty|unset|unspecified|zero|0|false|none)\b", re.IGNORECASE)
_MESSAGES, _FIELDS = 4, 2  # field numbers of FileDescriptorProto and DescriptorProto


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("previous")) / "protos"


def breaking(protos: Path, previous: Path) -> str:
    """What buf finds; empty: nothing."""
    command = (str(BUF), "breaking", str(protos), "--against", str(previous))
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def fields(protos: Path, out: Path) -> dict[str, str]:
    """The comment of each field of each message, by `Message.field`."""
    files = [str(file.relative_to(protos)) for file in protos.rglob("*.proto")]
    command = (sys.executable, "-m", "grpc_tools.protoc", "-I", str(protos))
    flags = ("--include_source_info", f"--descriptor_set_out={out}")
    subprocess.run((*command, *flags, *files), check=True)
    found = {}
    for file in FileDescriptorSet.FromString(out.read_bytes()).file:
        comments = {tuple(at.path): at.leading_comments for at in file.source_code_info.location}
        for number, message in enumerate(file.message_type):
            for index, field in enumerate(message.field):
                path = (_MESSAGES, number, _FIELDS, index)
                found[f"{message.name}.{field.name}"] = comments.get(path, "")
    return found


def test_no_message_breaks_the_previous_version(previous: Path) -> None:
    assert breaking(PROTOS, previous) == ""


def test_a_field_whose_number_is_given_away_is_found(tmp_path: Path, previous: Path) -> None:
    changed = tmp_path / "protos"
    shutil.copytree(PROTOS, changed)
    file = changed / "infermesh/v1/shard_service.proto"
    file.write_text(file.read_text().replace("uint64 incarnation = 1;", "uint64 life = 1;", 1))
    assert "DescribeResponse" in breaking(changed, previous)


def test_field_that_came_says_what_its_absence_means(tmp_path: Path, previous: Path) -> None:
    before = fields(previous, tmp_path / "before")
    now = fields(PROTOS, tmp_path / "now")
    added = {
        name: comment
        for name, comment in now.items()
        # of a message that came as a whole, every field is new to both sides
        if name not in before and any(b.split(".")[0] == name.split(".")[0] for b in before)
    }
    silent = [name for name, comment in added.items() if not _SILENCE.search(comment)]
    assert not silent, f"these do not say what an older peer means by leaving them out: {silent}"
