"""The kernel library is made once, whole, or not at all with one sentence."""

import ctypes
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from services.shard import host
from services.shard.kernels import compiling, library, prebuild
from services.shard.kernels.compiling import CannotCompile
from tests.compiled_kernels import CAPABILITY, needs_kernels


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Sources that compile in a moment; the folder for libraries."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "one.cpp").write_text('extern "C" void infermesh_one(int *out) { *out = 1; }')
    monkeypatch.setattr(compiling, "SOURCES", sources)
    return tmp_path / "libraries"


def one(found: library.Library) -> int:
    out = ctypes.c_int(0)
    found.function("one", ctypes.c_void_p)(ctypes.addressof(out))
    return out.value


@needs_kernels
def test_compiled_once_and_found_the_next_time(tiny: Path) -> None:
    compiled: list[int] = []
    assert one(library.load(tiny, lambda: compiled.append(1))) == 1
    assert one(library.load(tiny, lambda: compiled.append(2))) == 1
    assert compiled == [1]
    (compiling.SOURCES / "two.cpp").write_text("int two() { return 2; }")
    library.load(tiny, lambda: compiled.append(3))
    assert compiled == [1, 3]


@needs_kernels
def test_a_library_that_was_cut_off_is_made_again(tiny: Path) -> None:
    path = compiling.prepare(CAPABILITY, tiny, lambda: None)
    path.write_bytes(path.read_bytes()[:100])
    assert one(library.load(tiny, lambda: None)) == 1


@needs_kernels
def test_of_many_processes_one_compiles(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from services.shard.kernels import compiling\n"
        "compiling.SOURCES = Path(sys.argv[1])\n"
        f"compiling.prepare({CAPABILITY!r}, Path(sys.argv[2]), lambda: print('compiled'))\n"
    )
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "one.cpp").write_text("int one() { return 1; }")
    command = [sys.executable, "-c", code, str(sources), str(tmp_path / "libraries")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert "".join(printed) == "compiled\n"


@pytest.mark.skipif(CAPABILITY == "DEFAULT", reason="no AVX2")
def test_without_a_compiler_it_says_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tiny))
    with pytest.raises(CannotCompile, match=r"no C\+\+ compiler here \(install g\+\+\)"):
        library.load(tiny, lambda: None)


def test_a_processor_without_avx2_has_none(tiny: Path) -> None:
    with pytest.raises(CannotCompile, match=r"none for this processor \(default\)"):
        compiling.prepare("DEFAULT", tiny, lambda: None)


@needs_kernels
def test_a_compiler_that_fails_says_why_and_leaves_nothing(tiny: Path) -> None:
    (compiling.SOURCES / "one.cpp").write_text("int one() { return nothing; }")
    with pytest.raises(CannotCompile, match=r"error: .nothing. was not declared"):
        library.load(tiny, lambda: None)
    assert [path.suffix for path in tiny.iterdir()] == [".lock"]


@needs_kernels
def test_a_folder_that_is_a_file_is_one_sentence(tiny: Path) -> None:
    tiny.write_text("")
    with pytest.raises(CannotCompile, match="can't be written"):
        library.load(tiny, lambda: None)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the environment's compiler notes the arguments of each call."""
    script, calls = tmp_path / "my-compiler", tmp_path / "calls"
    script.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec g++ "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    return calls


@needs_kernels
def test_a_compiler_of_the_environment_is_used(tiny: Path, calls: Path) -> None:
    assert one(library.load(tiny, lambda: None)) == 1
    assert len(calls.read_text().splitlines()) == 2  # compiled, and linked


@needs_kernels
def test_instructions_beyond_the_architecture_are_used_where_the_processor_has_them(
    tiny: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for features in (frozenset[str](), frozenset({"avx512_vnni", "fma"})):
        monkeypatch.setattr(host, "processor_features", lambda features=features: features)
        found.append(compiling.prepare("AVX512", tiny, lambda: None))
    assert found[0] != found[1]
    compiled = [line for line in calls.read_text().splitlines() if " -c " in line]
    assert ["-mavx512vnni" in line for line in compiled] == [False, True]


def test_images_have_a_library_for_every_extension_that_is_looked_for() -> None:
    looked_for = {name for found in compiling._EXTENSIONS.values() for name in found}
    assert looked_for == frozenset().union(*(features for _, features in prebuild.PROCESSORS))
