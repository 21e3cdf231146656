"""One cluster a session, and one run over its two nodes that nothing interrupts."""

import pytest
from cluster import Cluster, why_not
from jobs import metrics, submit


@pytest.fixture(scope="session")
def cluster():
    if reason := why_not():
        pytest.skip(reason)
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def whole_curve(cluster, tmp_path_factory):
    """Its steps."""
    folder = tmp_path_factory.mktemp("whole")
    job = submit(folder).done()
    assert job.state == "COMPLETED", job.log
    return metrics(folder)
