"""The verdict: one pure function, on words that real programs, kernels and engines said."""

from __future__ import annotations

import pickle
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from oasis_flows import symptoms
from oasis_flows.errors import (
    AlgorithmFailed,
    ChecksumMismatch,
    DatasetNotFound,
    DescriptionError,
    EngineUnavailable,
    ImageDenied,
    NoGpu,
    OasisError,
    RunInUse,
    StoreDenied,
    StoreFull,
    UnsafeName,
)
from oasis_flows.job import ContainerExit, Reason
from oasis_flows.symptoms import Blame, Symptom
from oasis_flows.verdict import Case, Verdict, failure, judge

START = datetime(2026, 1, 1, tzinfo=UTC)
GIB = 1 << 30


def ended(reason: Reason = Reason.EXIT_NONZERO, code: int | None = 1, *words: str, **more: object) -> ContainerExit:
    times = {"started_at": START, "finished_at": START + timedelta(seconds=2), "timeout_seconds": 60.0}
    return ContainerExit(reason=reason, exit_code=code, last_words=words, **{**times, **more})  # type: ignore[arg-type]


def verdict(exit: ContainerExit, **more: object) -> Verdict:
    return judge(Case(algorithm="co2", exit=exit, **more))  # type: ignore[arg-type]


# Captured: what a program really printed, and what it means.
PYTORCH_OOM = (
    "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB of "
    "which 1.06 GiB is free."
)
PYTORCH_OOM_RUNTIME = "RuntimeError: CUDA error: out of memory"
TENSORFLOW_OOM = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8589934592 bytes."
NO_DRIVER = (
    "RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from "
    "http://www.nvidia.com/Download/index.aspx"
)
NO_GPUS = "RuntimeError: No CUDA GPUs are available"
NO_DEVICE = "cudaGetDeviceCount returned 100: no CUDA-capable device is detected"
OLD_DRIVER = "CUDA driver version is insufficient for CUDA runtime version"
OLD_DRIVER_PYTORCH = (
    "RuntimeError: The NVIDIA driver on your system is too old (found version 10020). Please update your GPU driver."
)
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch"
NO_KERNEL = "RuntimeError: CUDA error: no kernel image is available for execution on the device"
ECC = "RuntimeError: CUDA error: uncorrectable ECC error encountered"
ASSERTED = "RuntimeError: CUDA error: device-side assert triggered"
ILLEGAL_ACCESS = "CUDA error: an illegal memory access was encountered"
LOADER_SHM = (
    "RuntimeError: DataLoader worker (pid 27) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    "shared memory. Please try to raise your shared memory limit."
)
PYTORCH_BUS = "ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient shared memory (shm)."
SHM_FULL = "RuntimeError: unable to write to file </torch_42_1>: No space left on device (28) /dev/shm"
NUMPY = "numpy.core._exceptions._ArrayMemoryError: Unable to allocate 74.5 GiB for an array with shape (100000, 100000)"
BAD_ALLOC = "terminate called after throwing an instance of 'std::bad_alloc'"
JAVA = 'Exception in thread "main" java.lang.OutOfMemoryError: Java heap space'
NODE = "FATAL ERROR: Reached heap limit Allocation failed - JavaScript heap out of memory"
R_VECTOR = "Error: cannot allocate vector of size 7.5 Gb"
BUSYBOX_FULL = "sh: write error: No space left on device"
PYTHON_FULL = "OSError: [Errno 28] No space left on device: 'output/big.bin'"
BUSYBOX_READ_ONLY = "touch: /root-file: Read-only file system"
PYTHON_READ_ONLY = "OSError: [Errno 30] Read-only file system: '/home/app/.cache'"
WGET = "wget: bad address 'example.org'"
CURL = "curl: (6) Could not resolve host: example.org"
PYTHON_DNS = "socket.gaierror: [Errno -3] Temporary failure in name resolution"
UNREACHABLE = "connect: Network is unreachable"
URLLIB3 = "NameResolutionError(\"HTTPSConnection(host='pypi.example', port=443): Failed to resolve 'pypi.example'\")"
BUSYBOX_FORK = "sh: can't fork: Resource temporarily unavailable"
BASH_FORK = "bash: fork: retry: Resource temporarily unavailable"
THREADS = "RuntimeError: can't start new thread"
OPENBLAS = "OpenBLAS blas_thread_init: pthread_create failed for thread 31 of 64: Resource temporarily unavailable"
MODULE = "ModuleNotFoundError: No module named 'rasterio'"
SHARED_OBJECT = "detect: error while loading shared libraries: libgdal.so.32: cannot open shared object file: No such file"

SAID = [
    (PYTORCH_OOM, symptoms.GPU_MEMORY),
    (PYTORCH_OOM_RUNTIME, symptoms.GPU_MEMORY),
    (TENSORFLOW_OOM, symptoms.GPU_MEMORY),
    (NO_DRIVER, symptoms.GPU_ABSENT),
    (NO_GPUS, symptoms.GPU_ABSENT),
    (NO_DEVICE, symptoms.GPU_ABSENT),
    (OLD_DRIVER, symptoms.GPU_DRIVER),
    (OLD_DRIVER_PYTORCH, symptoms.GPU_DRIVER),
    (MISMATCH, symptoms.GPU_DRIVER),
    (NO_KERNEL, symptoms.GPU_KIND),
    (ECC, symptoms.GPU_BROKEN),
    (ASSERTED, symptoms.CUDA),
    (ILLEGAL_ACCESS, symptoms.CUDA),
    (LOADER_SHM, symptoms.SHARED_MEMORY),
    (PYTORCH_BUS, symptoms.SHARED_MEMORY),
    (SHM_FULL, symptoms.SHARED_MEMORY),
    ("MemoryError", symptoms.ALLOCATION),
    (NUMPY, symptoms.ALLOCATION),
    (BAD_ALLOC, symptoms.ALLOCATION),
    (JAVA, symptoms.ALLOCATION),
    (NODE, symptoms.ALLOCATION),
    (R_VECTOR, symptoms.ALLOCATION),
    (BUSYBOX_FULL, symptoms.DISK_FULL),
    (PYTHON_FULL, symptoms.DISK_FULL),
    (BUSYBOX_READ_ONLY, symptoms.READ_ONLY),
    (PYTHON_READ_ONLY, symptoms.READ_ONLY),
    (WGET, symptoms.NO_NETWORK),
    (CURL, symptoms.NO_NETWORK),
    (PYTHON_DNS, symptoms.NO_NETWORK),
    (UNREACHABLE, symptoms.NO_NETWORK),
    (URLLIB3, symptoms.NO_NETWORK),
    (BUSYBOX_FORK, symptoms.PIDS),
    (BASH_FORK, symptoms.PIDS),
    (THREADS, symptoms.PIDS),
    (OPENBLAS, symptoms.PIDS),
    (MODULE, symptoms.MODULE),
    (SHARED_OBJECT, symptoms.MODULE),
]


@pytest.mark.parametrize(("line", "symptom"), SAID, ids=[line[:40] for line, _ in SAID])
def test_what_programs_say_is_understood(line: str, symptom: Symptom) -> None:
    found = verdict(ended(Reason.EXIT_NONZERO, 1, "Traceback (most recent call last):", line))

    assert (found.code, found.blame, found.advice) == (symptom.code, symptom.blame, symptom.advice)
    assert found.sentence == f"The algorithm co2 ended with exit code 1 after 2.0 s, because {symptom.what}."
    assert found.evidence[0] == line


def test_every_symptom_has_a_captured_sentence() -> None:
    made = {value for value in vars(symptoms).values() if isinstance(value, Symptom)}
    in_context = {symptoms.TMP_FULL, symptoms.NETWORK_FAILED, symptoms.GPU_UNUSABLE}

    assert {symptom.code for symptom in made - in_context} == {symptom.code for _, symptom in SAID}


@pytest.mark.parametrize("line", [line for line, _ in SAID])
def test_words_of_a_success_are_no_symptom(line: str) -> None:
    assert verdict(ended(Reason.OK, 0, line)).code == "ok"


@pytest.mark.parametrize("line", ["no such file: input/network.json", "exit", "fork: 12 forks found", "space left: 7 GiB", ""])
def test_other_words_mean_nothing(line: str) -> None:
    assert verdict(ended(Reason.EXIT_NONZERO, 1, line)).code == "exit_nonzero"


def test_the_network_is_only_missing_where_it_was_not_given() -> None:
    assert verdict(ended(Reason.EXIT_NONZERO, 1, CURL), network=False).code == "no_network"
    assert verdict(ended(Reason.EXIT_NONZERO, 1, CURL), network=True).code == "network_failed"


WARNED = "UserWarning: CUDA initialization: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"
TENSORFLOW_WARNED = (
    "2023-01-01 12:00:00.000000: W tensorflow/stream_executor/platform/default/dso_loader.cc:64] Could not load dynamic library "
    "'libcuda.so.1'; dlerror: libcuda.so.1: cannot open shared object file: No such file or directory"
)


@pytest.mark.parametrize("warning", [WARNED, TENSORFLOW_WARNED])
def test_a_warning_is_not_what_ended_it(warning: str) -> None:
    raised = ("Traceback (most recent call last):", '  File "run.py", line 3, in <module>', "KeyError: 'depth'")
    assert verdict(ended(Reason.EXIT_NONZERO, 1, warning, *raised)).code == "exit_nonzero"
    assert verdict(ended(Reason.EXIT_NONZERO, 1, warning)).code == "exit_nonzero"
    # What was said long before an exception did not end it, either.
    assert verdict(ended(Reason.EXIT_NONZERO, 1, CURL, *raised)).code == "exit_nonzero"


def test_a_gpu_that_was_given_and_is_not_seen_is_the_machines() -> None:
    exit = ended(Reason.EXIT_NONZERO, 1, NO_GPUS)
    assert (verdict(exit, gpu=True).blame, verdict(exit, gpu=False).blame) == (Blame.PLATFORM, Blame.DESCRIPTION)


def test_with_a_writable_root_the_full_disk_may_be_the_engines() -> None:
    assert verdict(ended(Reason.EXIT_NONZERO, 1, BUSYBOX_FULL), disk_free_bytes=GIB, writable_root=True).code == "disk_full"


def test_a_full_disk_is_told_from_a_full_tmp_by_what_the_disk_has_left() -> None:
    exit = ended(Reason.EXIT_NONZERO, 1, BUSYBOX_FULL)
    assert verdict(exit, disk_free_bytes=4096).code == "disk_full"
    assert verdict(exit, disk_free_bytes=GIB).code == "tmp_full"


def test_refused_forks_count_without_a_word() -> None:
    found = verdict(ended(Reason.EXIT_NONZERO, 2, forks_refused=3))
    assert found.code == "pids_limit"
    assert found.evidence == ("the kernel refused it a new process 3 times",)


def test_the_newest_words_win_and_stdout_counts_where_stderr_was_silent() -> None:
    assert verdict(ended(Reason.EXIT_NONZERO, 1, CURL, MODULE)).code == "module_missing"
    assert verdict(ended(Reason.EXIT_NONZERO, 1), last_lines=[MODULE]).code == "module_missing"
    assert verdict(ended(Reason.EXIT_NONZERO, 1, "quite another thing"), last_lines=[MODULE]).code == "exit_nonzero"


@pytest.mark.parametrize(
    ("exit_code", "code"),
    [(139, "segfault"), (134, "aborted"), (135, "bus_error"), (132, "illegal_instruction"), (136, "arithmetic_error"), (141, "exit_nonzero")],
)  # fmt: skip
def test_signals_have_names(exit_code: int, code: str) -> None:
    assert verdict(ended(Reason.EXIT_NONZERO, exit_code)).code == code


def test_the_last_words_are_in_the_sentence_so_that_the_state_shows_them() -> None:
    words = ("Traceback (most recent call last):", '  File "run.py", line 3', "ValueError: no column x. Sorry. " + "y" * 500)
    found = verdict(ended(Reason.EXIT_NONZERO, 1, *words))

    assert found.sentence.startswith("The algorithm co2 ended with exit code 1 after 2.0 s: ValueError: no column x. Sorry. y")
    assert len(found.sentence) < 300
    assert found.blame is Blame.ALGORITHM


def test_memory_names_limit_and_peak() -> None:
    found = verdict(ended(Reason.OUT_OF_MEMORY, 137, memory_limit_bytes=GIB, memory_peak_bytes=GIB))
    assert "limit 1.0 GiB, peak 1.0 GiB" in found.sentence
    assert "Raise `memory`" in found.advice
    assert (found.limit_bytes, found.peak_bytes) == (GIB, GIB)


def test_who_knows_no_peak_does_not_rule_memory_out() -> None:
    """Seen on a cluster under load: the kernel killed it for memory, and its node said no more than 137."""
    unknown, known = (verdict(ended(Reason.KILLED, 137, memory_peak_bytes=peak)) for peak in (None, 1 << 20))
    assert "raise `memory`" in unknown.advice
    assert "Neither its memory limit" in known.advice


@pytest.mark.parametrize(
    ("reason", "limit", "said"),
    [
        (Reason.OUTPUT_TOO_LARGE, 5 << 30, "The algorithm co2 wrote more than 5.0 GiB of output after 2.0 s"),
        (Reason.TOO_MANY_FILES, 2000, "The algorithm co2 wrote more than 2000 files and folders after 2.0 s"),
        (Reason.LOG_TOO_LARGE, 1 << 20, "The algorithm co2 wrote more than 1.0 MiB to its log after 2.0 s"),
        (
            Reason.DISK_FULL,
            1 << 30,
            "The algorithm co2 was stopped after 2.0 s, because less than 1.0 GiB was free on the disk of its output",
        ),
    ],
)
def test_too_much_names_the_limit(reason: Reason, limit: int, said: str) -> None:
    assert verdict(ended(reason, 137, limit_passed=limit)).sentence == f"{said}."


@pytest.mark.parametrize("reason", list(Reason))
def test_every_end_is_explained(reason: Reason) -> None:
    found = verdict(ended(reason, 7, detail="the engine's words"), last_lines=["one", "two"])

    assert found.sentence.startswith("The algorithm co2 ")
    assert found.sentence.endswith(".")
    assert (found.blame is None) == (found.evidence == ()) == (reason is Reason.OK)
    assert bool(found.advice) == (reason is not Reason.OK)
    assert found.stage == "run_container"
    assert not found.transient


def test_a_silent_end_says_that_it_was_silent() -> None:
    assert verdict(ended()).evidence == ("It wrote nothing to its log.",)


@pytest.mark.parametrize(
    ("error", "blame"),
    [
        (DescriptionError("The name is wrong. Write another."), Blame.DESCRIPTION),
        (ImageDenied("The registry refuses. Correct it. The engine said: unauthorized"), Blame.DESCRIPTION),
        (NoGpu("There is none. Get one."), Blame.PLATFORM),
        (EngineUnavailable("It is away. Start it. The cause: [Errno 111] Connection refused"), Blame.PLATFORM),
        (StoreDenied("No. Correct the keys. It said: AccessDenied: no"), Blame.PLATFORM),
        (StoreFull("Full. Free some. The system said: [Errno 28] No space left on device"), Blame.PLATFORM),
        (DatasetNotFound("Nothing there. Look elsewhere."), Blame.DATA),
        (ChecksumMismatch("Other bytes. Restore it."), Blame.DATA),
        (UnsafeName("A socket. Remove it."), Blame.DATA),
        (RunInUse("Another one. Wait."), Blame.USER),
        (OasisError("Something. Do."), Blame.PLATFORM),
    ],
)
def test_errors_have_a_verdict_too(error: OasisError, blame: Blame) -> None:
    error.stage, error.tries = "stage_input", 4
    found = judge(error)

    assert (found.code, found.stage, found.blame, found.transient) == (error.code, "stage_input", blame, error.transient)
    assert str(error).startswith(found.sentence)
    assert found.evidence
    assert all(line in str(error) for line in found.evidence)
    assert found.action == "It was tried 4 times."


def test_what_the_outside_said_is_evidence_and_no_advice() -> None:
    found = judge(StoreDenied("The store does not let us in. Check the keys. It said: AccessDenied: who are you?"))

    assert found.advice == "Check the keys."
    assert found.evidence == ("AccessDenied: who are you?",)


def test_an_output_that_no_dataset_can_hold_is_the_algorithms_doing() -> None:
    error = UnsafeName("'bad' is a link that leads outside. Remove it.")
    error.stage = "publish_output"
    assert judge(error).blame is Blame.ALGORITHM


def test_the_exception_carries_everything_and_survives_pickling() -> None:
    exit = ended(Reason.EXIT_NONZERO, 1, MODULE)
    error = failure(replace(verdict(exit), action="It was run again."), exit, "s3://b/log.txt")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own

    assert isinstance(error, AlgorithmFailed)
    assert error.code == "module_missing"
    assert (str(again), again.exit, again.verdict, again.log) == (str(error), exit, error.verdict, "s3://b/log.txt")
    assert judge(error) is error.verdict
    for part in (error.verdict.sentence, error.verdict.advice, "It was run again.", MODULE, "s3://b/log.txt"):
        assert part in str(error)
