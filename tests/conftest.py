"""Fixtures of all tests; the servers and images they start live in `tests/servers` and `tests/images.py`."""

import os
from importlib.util import find_spec

from hypothesis import settings

pytest_plugins = [
    "tests.servers.prefect",
    "tests.servers.engine",
    "tests.servers.registry",
    "tests.servers.s3",
    "tests.images",
    "tests.servers.cluster",
]

# How long an example takes says more about the machine than about the code.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# The reference library of the Train API comes from its source only; the tests with it are there where it is.
collect_ignore = [] if find_spec("pht") and find_spec("pht.entrypoint") else ["flows/test_reference_library.py"]
# Without a cluster there are no tests of it, rather than tests that are passed over.
collect_ignore += (
    []
    if os.environ.get("KUBECONFIG")
    else [
        "contract/test_kubernetes_carried.py",
        "contract/test_kubernetes_cluster.py",
        "e2e/test_kubernetes.py",
        "e2e/test_kubernetes_worker.py",
    ]
)
collect_ignore += [] if os.environ.get("LOSE_NODE") else ["contract/test_kubernetes_nodes.py"]
