"""Meshes shared by the tests of one module."""

from collections.abc import Iterator

import pytest

from tests.e2e.mesh_process import Mesh


@pytest.fixture(scope="package")
def demo_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """The demo model in float32, as `infermesh up --dtype float32` serves it."""
    with Mesh(tmp_path_factory.mktemp("mesh"), "--dtype", "float32", "--no-cache") as mesh:
        yield mesh
