"""Usage waits on disk: torn, damaged and left files lose nothing that was whole."""

import fcntl
import zlib
from pathlib import Path

import pytest

from gateway.auth.usage import Segment, Spool, UsageRow
from infermesh.config import ConfigError


def row(number: int) -> UsageRow:
    return {
        "record_id": str(number),
        "request_id": "r",
        "tenant_id": "acme",
        "key_id": "k",
        "model": "tiny",
        "endpoint": "chat",
        "status": "ok",
        "prompt_tokens": number,
        "completion_tokens": 1,
        "cached_prompt_tokens": 0,
        "finished_unix_ms": 1,
    }


def ids(spool: Spool) -> list[str]:
    """What can be sent; it stays there."""
    found = []
    for segment in spool.segments():
        found += [one["record_id"] for one in segment.rows()]
        segment.release()
    return found


def test_rows_can_be_sent_once_their_segment_is_sealed(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append(row(1))
    assert ids(spool) == []
    spool.seal()
    spool.append(row(2))
    assert ids(spool) == ["1"]
    spool.seal()
    assert ids(spool) == ["1", "2"]
    spool.close()


def test_segment_is_gone_when_it_was_delivered(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append(row(1))
    spool.seal()
    for segment in spool.segments():
        segment.delete()
        segment.release()
    assert ids(spool) == []
    spool.close()


def test_segment_of_a_dead_writer_is_found_and_of_a_living_one_is_not(tmp_path: Path) -> None:
    dead, living, other = Spool(tmp_path), Spool(tmp_path), Spool(tmp_path)
    dead.append(row(1))
    living.append(row(2))
    dead.close()  # as its death does
    assert ids(other) == ["1"]
    living.close()
    other.close()


def test_two_gateways_never_send_one_segment_at_once(tmp_path: Path) -> None:
    one, two = Spool(tmp_path), Spool(tmp_path)
    one.append(row(1))
    one.seal()
    held = list(one.segments())
    assert ids(two) == []
    held[0].release()
    assert ids(two) == ["1"]
    one.close()
    two.close()


@pytest.mark.parametrize("cut", range(1, 12))
def test_torn_last_line_is_left_out(tmp_path: Path, cut: int) -> None:
    spool = Spool(tmp_path)
    spool.append(row(1))
    spool.append(row(2))
    spool.seal()
    path = next(path for path in tmp_path.glob("*.usage") if path.stat().st_size)
    path.write_bytes(path.read_bytes()[: -cut - 1])
    assert ids(spool) == ["1"]
    spool.close()


def test_flipped_bit_costs_its_row_alone_and_the_file_is_kept_aside(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for number in range(3):
        spool.append(row(number))
    spool.seal()
    path = next(path for path in tmp_path.glob("*.usage") if path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert ids(spool) == ["0", "2"]
    assert [p.read_bytes() for p in tmp_path.glob("*.damaged")] == [bytes(data)]
    spool.close()


def test_row_is_written_later_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gateway.auth.usage.os.write", full)
        spool.append(row(1))
    spool.append(row(2))
    spool.seal()
    assert ids(spool) == ["1", "2"]
    spool.close()


def test_draft_of_another_gateway_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".1-1-1.usage").write_text("")
    spool = Spool(tmp_path)
    assert list(spool.segments()) == []
    spool.close()


def test_row_is_kept_when_a_new_segment_cannot_get_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path)
    spool.append(row(1))

    def gone(*_: object) -> None:
        raise FileNotFoundError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", gone)
        spool.seal()
        spool.append(row(2))
    spool.seal()
    spool.seal()
    assert ids(spool) == ["1", "2"]
    spool.close()


def sealed(spool: Spool, *numbers: int) -> Segment:
    for number in numbers:
        spool.append(row(number))
    spool.seal()
    (segment,) = spool.segments()
    return segment


def test_shortened_segment_holds_what_is_left_and_is_nobodys_before_it_is_released(
    tmp_path: Path,
) -> None:
    spool, other = Spool(tmp_path), Spool(tmp_path)
    segment = sealed(spool, 1, 2, 3)
    segment.keep([row(2)])
    segment.release()
    assert ids(other) == ["2"]
    assert ids(spool) == ["2"]
    spool.close()
    other.close()


def test_segment_that_was_shortened_meanwhile_is_not_taken_by_its_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path)
    segment = sealed(spool, 1, 2)
    (path,) = (path for path in tmp_path.glob("*.usage") if path.stat().st_size)
    locked = fcntl.flock

    def shortened_first(file: int, how: int) -> None:
        segment.keep([row(2)])
        segment.release()
        locked(file, how)

    with monkeypatch.context() as patch:
        patch.setattr("gateway.auth.usage.fcntl.flock", shortened_first)
        assert Segment.take(path) is None
    assert ids(spool) == ["2"]
    spool.close()


def test_quarantined_rows_can_be_sent_again_by_renaming_their_file(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    segment = sealed(spool, 1, 2, 3)
    segment.quarantine([row(1)])
    segment.quarantine([row(3)])
    segment.delete()
    segment.release()
    assert ids(spool) == []
    (file,) = tmp_path.glob("*.usage.refused")
    file.rename(file.with_suffix(""))
    assert ids(spool) == ["1", "3"]
    spool.close()


def test_whole_line_that_is_no_record_is_kept_aside(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    body = b"no record"
    line = b"%08x %b\n" % (zlib.crc32(body), body)
    (tmp_path / "1.usage").write_bytes(line)
    assert ids(spool) == []
    assert (tmp_path / "1.usage.damaged").read_bytes() == line
    spool.close()


def test_folder_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match=r"gateway\.usage_dir"):
        Spool(file / "usage")


def test_backlog_is_what_the_ledger_has_not_confirmed(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    assert spool.backlog() == (0, 0.0)
    spool.append(row(1))
    num_bytes, oldest_s = spool.backlog()
    assert num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir()) > 0
    assert oldest_s > 0
    spool.seal()
    for segment in spool.segments():
        segment.delete()
        segment.release()
    assert spool.backlog() == (0, 0.0)
