"""A pytest plugin: the fixture ``lifted_graph`` and the option ``--buffer-lifting-update``.

Off unless used: loading it imports neither torch nor any other module of this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from buffer_lifting.inspection.golden import GraphAssertions


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option that writes snapshots."""
    group = parser.getgroup("buffer_lifting", "golden checks of exported graphs")
    group.addoption(
        "--buffer-lifting-update",
        action="store_true",
        help="write the snapshot files of lifted_graph.assert_snapshot instead of comparing with them",
    )


@pytest.fixture
def lifted_graph(request: pytest.FixtureRequest) -> GraphAssertions:
    """Assertions about exported, lifted and staged programs: clean, lifted inputs, stage boundaries, snapshots."""
    from buffer_lifting.inspection.golden import GraphAssertions

    classes = [item.name for item in request.node.listchain() if isinstance(item, pytest.Class)]
    name = ".".join([*classes, request.node.name])
    return GraphAssertions(
        request.path, name, request.config.rootpath, request.config.getoption("--buffer-lifting-update")
    )
