"""Settings come from file, environment and flags, and every mistake is named."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from infermesh import config_fields
from infermesh.cli import config as config_cli
from infermesh.config import ConfigError, Settings, load


def write(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "infermesh.toml"
    path.write_text(text)
    return ["--config", str(path)]


def test_load_gives_defaults_when_nothing_is_set() -> None:
    assert load([], {}).gateway == Settings().gateway


def test_flag_wins_over_environment_and_environment_over_file(tmp_path: Path) -> None:
    argv = write(
        tmp_path,
        "[scheduler]\nmax_num_seqs = 1\nwindow = 3\nblock_size = 8\n[shard]\nengine='torch'\n",
    )
    environ = {"INFERMESH_SCHEDULER__MAX_NUM_SEQS": "2", "INFERMESH_SCHEDULER__WINDOW": "4"}
    settings = load([*argv, "--scheduler.max-num-seqs=5"], environ)
    assert settings.scheduler.max_num_seqs == 5
    assert settings.scheduler.window == 4
    assert settings.scheduler.block_size == 8
    assert settings.origins["scheduler.max_num_seqs"] == "flag --scheduler.max-num-seqs"
    assert settings.origins["scheduler.window"] == "env INFERMESH_SCHEDULER__WINDOW"
    assert settings.origins["scheduler.block_size"].endswith("infermesh.toml")
    assert settings.origins["gateway.http_address"] == "default"


def test_load_parses_lists_booleans_and_numbers_from_text() -> None:
    settings = load(
        ["--gateway.replicas", "unix:/a, unix:/b", "--scheduler.max_wait_ms", "2.5"],
        {"INFERMESH_SCHEDULER__ENABLE_PREFIX_CACHING": "false"},
    )
    assert settings.gateway.replicas == ("unix:/a", "unix:/b")
    assert settings.scheduler.max_wait_ms == 2.5
    assert settings.scheduler.enable_prefix_caching is False


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[scheduler]\nmax_num_seq = 1\n", ["scheduler.max_num_seq", "did you mean"]),
        ("[scheduler\nmax_num_seqs = 1\n", ["not valid TOML", "infermesh.toml"]),
        ("[scheduler]\nmax_num_seqs = 0\n", ["scheduler.max_num_seqs", "at least 1"]),
        ("[scheduler]\nmax_num_seqs = 'x'\n", ["scheduler.max_num_seqs", "whole number"]),
        ("[scheduler]\nmax_num_seqs = true\n", ["scheduler.max_num_seqs", "whole number"]),
        ("[scheduler]\ndtype = 'int3'\n", ["scheduler.dtype", "bfloat16"]),
        ("[gateway]\nreplicas = [1]\n", ["gateway.replicas", "list of strings"]),
        ("max_num_seqs = 1\n", ["max_num_seqs", "sections"]),
    ],
)
def test_load_names_the_mistake_when_the_file_is_wrong(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text), {})
    for word in words:
        assert word in str(caught.value)


def test_load_names_the_file_when_it_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        load(["--config", str(tmp_path / "absent.toml")], {})


def test_load_refuses_an_unknown_environment_variable() -> None:
    with pytest.raises(ConfigError, match="INFERMESH_SHARD__DEVISE"):
        load([], {"INFERMESH_SHARD__DEVISE": "cpu"})


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("redis://:s3cret@h:6379/0", "redis://:***@h:6379/0"),
        ("rediss://user:s3cret@h/0?ssl_ca_certs=/ca", "rediss://user:***@h/0?ssl_ca_certs=/ca"),
        ("unix:///run/redis.sock?db=1&password=s3cret", "unix:///run/redis.sock?db=1&password=***"),
        ("postgresql://u:s3cret@h/n", "postgresql://u:***@h/n"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("alias=a:b", "alias=a:b"),
    ],
)
def test_passwords_of_urls_are_not_shown(value: str, shown: str) -> None:
    assert config_fields.masked(value) == shown


def test_config_show_prints_no_password(tmp_path: Path) -> None:
    file = tmp_path / "infermesh.toml"
    file.write_text('[auth]\nredis_url = "redis://:s3cret@h:6379/0"\n')
    done = CliRunner().invoke(config_cli.app, ["show", "--config", str(file)])
    assert done.exit_code == 0
    assert "redis://" in done.output
    assert "s3cret" not in done.output


def test_value_of_a_wrong_type_is_refused_without_its_password(tmp_path: Path) -> None:
    file = tmp_path / "infermesh.toml"
    file.write_text('[auth]\nredis_url = ["redis://:s3cret@h:6379/0"]\n')
    with pytest.raises(ConfigError, match=r"auth\.redis_url") as caught:
        load(["--config", str(file)], {})
    assert "s3cret" not in str(caught.value)
