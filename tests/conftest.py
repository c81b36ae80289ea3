"""Fixtures of all tests; the servers and images they start live in `tests/servers` and `tests/images.py`."""

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
