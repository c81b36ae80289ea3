"""Fixtures of all tests; the servers and images they start live in `tests/servers` and `tests/images.py`."""

pytest_plugins = [
    "tests.servers.prefect",
    "tests.servers.engine",
    "tests.servers.registry",
    "tests.servers.s3",
    "tests.images",
    "tests.servers.cluster",
]
