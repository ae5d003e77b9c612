"""The pool with real processes: files that are read, and files that hang, crash and lie; what is left behind."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xraygpt_lite.batch import workers
from xraygpt_lite.batch.inputs import Input
from xraygpt_lite.batch.workers import Decoded, Failed, Pool, worker_count
from xraygpt_lite.errors import ClosedError, ImageError, UsageError, XrayError
from xraygpt_lite.imaging.read import read
from xraygpt_lite.imaging.transform import fit
from xraygpt_lite.values import ImageSpec

EXAMPLES = sorted(
    path for path in (Path(__file__).parents[3] / "examples").iterdir() if path.suffix in (".dcm", ".png")
)
SPEC = ImageSpec(32, "pad", "bilinear", (0.5, 0.25, 0.0), (0.5, 0.3, 1.0))


def run(pool: Pool, inputs: Iterable[Input], ahead: int) -> Iterator[Decoded | Failed]:
    """The result of every input; so many at most wait or are worked on."""
    coming = iter(inputs)
    while True:
        for one in islice(coming, ahead - pool.pending):
            pool.submit(one)
        result = pool.take()
        if result is None:
            return
        yield result


# The real worker, whose files do by their names what files of an archive do by their content.
ODD = """
import ctypes, os, time
from xraygpt_lite.imaging import read as module, worker

real = module.decode

def decode(data, path, sha256):
    what = os.path.basename(path).split(".")[0].split("-")[0]
    if what == "hang":
        ctypes.PyDLL(None).sleep(1000)  # in native code, with the interpreter's lock
    if what == "slow":
        time.sleep(1.5)
    if what == "crash":
        ctypes.string_at(0)
    if what == "exit":
        os._exit(3)
    if what == "full":
        raise MemoryError("SECRET")
    if what == "liar":
        os.write(answers, b"\\0\\0\\0\\1\\0\\0\\0\\0x")
    if what == "noisy":
        os.write(1, b"warning " * 1000)
        os.write(2, b"warning " * 1000)
    return real(data, path, sha256)

own = worker._own

def note(number, mode):
    global answers
    stream = own(number, mode)
    answers = stream.fileno()
    return stream

module.decode, worker._own = decode, note
worker.main()
"""
ODD_PROGRAM = (sys.executable, "-c", ODD)
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def given(path: Path | str) -> Input:
    return Input(os.path.basename(path), Path(path))


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`, the dead that nobody waited for among them."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                status = (folder / "stat").read_text()
            except OSError:
                continue
            if int(status.rpartition(")")[2].split()[1]) == pid:
                found.append(int(folder.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Every test leaves as many processes, files and threads as it found."""

    def count() -> tuple[int, int, int]:
        gc.collect()  # a ResourceWarning is an error here
        return len(children(os.getpid())), len(os.listdir("/proc/self/fd")), threading.active_count()

    if sys.platform != "linux":
        yield
        return
    before = count()
    yield
    assert count() == before


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Input]:
    """A small PNG by name; each has its own content."""

    def png(name: str, seed: int = 0) -> Input:
        values = np.random.default_rng(seed).integers(0, 256, (40, 48)).astype(np.uint8)
        Image.fromarray(values).save(tmp_path / name, format="PNG")
        return given(tmp_path / name)

    return png


def check(result: Decoded | Failed | None, spec: ImageSpec = SPEC) -> None:
    """The result is what one process makes of the file, to the bit."""
    assert isinstance(result, Decoded), result
    here = read(result.input.path)
    square, placement = fit(here.pixels, spec)
    assert result.square.tobytes() == square.tobytes()
    assert (result.square.dtype, result.square.shape) == (np.uint8, (spec.size, spec.size))
    assert result.placement == placement
    seen = result.radiograph
    assert (seen.source, seen.sha256, seen.warnings, seen.sop_instance_uid) == (
        here.source,
        here.sha256,
        here.warnings,
        here.sop_instance_uid,
    )
    assert (seen.pixels.shape, seen.pixels.dtype) == ((0, 0), np.float32)
    assert result.seconds > 0


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        ImageSpec(224, "stretch", "bicubic", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ImageSpec(448, "pad", "bicubic", (0.5862785803043838,) * 3, (0.27950088968644304,) * 3),
    ],
    ids=lambda spec: str(spec.size),
)
def test_examples_are_what_one_process_makes_of_them(spec: ImageSpec) -> None:
    with Pool(spec, 2, 60) as pool:
        results = list(run(pool, map(given, EXAMPLES), 4))
    assert sorted(result.input.path for result in results) == EXAMPLES
    for result in results:
        check(result, spec)


def test_an_error_is_the_one_that_one_process_raises(tmp_path: Path, make: Callable[..., Input]) -> None:
    whole = make("a.png").path.read_bytes()
    content = {
        "empty.png": b"",
        "torn.png": whole[:200],
        "torn.dcm": b"\0" * 128 + b"DICM" + b"\1",
        "é\n.txt": b"hello",
    }
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "pipe.png")
    names = [*content, "pipe.png", "absent.png", "x" * 300, "x" * 100_000, "a\0b", "."]
    with Pool(SPEC, 1, 60) as pool:
        results = list(run(pool, (given(tmp_path / name) for name in names), 3))
    assert len(results) == len(names)
    for result in results:
        assert isinstance(result, Failed)
        with pytest.raises(ImageError) as expected:
            read(result.input.path)
        assert (result.stage, result.error, result.message) == ("read", "ImageError", str(expected.value))
        data = content.get(result.input.path.name)
        assert result.sha256 == (None if data is None else hashlib.sha256(data).hexdigest())


def test_names_of_any_kind_pass(tmp_path: Path, make: Callable[..., Input]) -> None:
    data = make("a.png").path.read_bytes()
    names = [b"\xff\xfe.png", b"line\nbreak\r.png", b"-\"'`$ .png", b"x" * 255, "日本 é ́.png".encode(), b" "]
    paths = []
    for name in names:
        path = os.path.join(os.fsencode(tmp_path), name)
        with open(path, "wb") as file:
            file.write(data)
        paths.append(given(os.fsdecode(path)))
    deep = Path(str(tmp_path), *["d" * 200] * 15)
    deep.mkdir(parents=True)
    (deep / "a.png").write_bytes(data)
    with Pool(SPEC, 1, 60) as pool:
        results = list(run(pool, [*paths, given(deep / "a.png")], 3))
    for result, expected in zip(results, [*paths, given(deep / "a.png")], strict=True):
        assert result.input == expected
        check(result)


def test_a_file_that_hangs_costs_itself_only(make: Callable[..., Input]) -> None:
    files = [make(name, seed) for seed, name in enumerate(["a.png", "hang.png", "b.png", "hang-2.png", "c.png"])]
    with Pool(SPEC, 1, 2, ODD_PROGRAM) as pool:
        before = time.monotonic()
        results = list(run(pool, files, 5))
        assert 4 < time.monotonic() - before < 40
    assert [result.input for result in results] == files
    for result in results[::2]:
        check(result)
    for result in results[1::2]:
        assert isinstance(result, Failed)
        assert (result.stage, result.error) == ("decode", "Timeout")
        assert result.message == f"{result.input.path}: was not read within 2 s. Allow more time, or leave it out."
        assert result.sha256 == hashlib.sha256(result.input.path.read_bytes()).hexdigest()


@linux
def test_a_file_that_cannot_be_opened_in_time(make: Callable[..., Input]) -> None:
    """The real program and a real hang: the system lets nobody open a file on which another process has a lease."""
    files = [make("a.png"), make("b.png")]
    heard = signal.signal(signal.SIGIO, signal.SIG_IGN)  # how the system asks for the lease back
    descriptor = os.open(files[0].path, os.O_RDWR)
    try:
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError:
            pytest.skip("this file system has no leases")
        with Pool(SPEC, 1, 2) as pool:
            hung, read_after = run(pool, files, 2)
    finally:
        os.close(descriptor)
        signal.signal(signal.SIGIO, heard)
    assert isinstance(hung, Failed)
    assert (hung.stage, hung.error, hung.sha256) == ("decode", "Timeout", None)
    check(read_after)


def test_a_file_that_kills_its_process_costs_itself_only(
    make: Callable[..., Input], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_END_S", 1.0)
    files = [make(name) for name in ("a.png", "crash.png", "b.png", "exit.png", "liar.png", "c.png")]
    with Pool(SPEC, 1, 60, ODD_PROGRAM) as pool:
        first, crashed, second, ended, lied, third = run(pool, files, 6)
    for result in (first, second, third):
        check(result)
    for result, how in (
        (crashed, "was ended by SIGSEGV"),
        (ended, "ended with status 3"),
        (lied, "gave no answer that can be read"),
    ):
        assert isinstance(result, Failed)
        assert (result.stage, result.error) == ("decode", "Crashed")
        assert result.sha256 == hashlib.sha256(result.input.path.read_bytes()).hexdigest()
        assert result.message == (
            f"{result.input.path}: the process that read it {how}. The file may be damaged, or need more memory than "
            "there is; export it again, or leave it out."
        )


def test_many_crashes_and_hangs_beside_good_files(make: Callable[..., Input]) -> None:
    kinds = ("a", "crash", "b", "hang", "exit", "c")
    files = [make(f"{kinds[n % 6]}-{n}.png", n) for n in range(30)]
    with Pool(SPEC, 3, 2, ODD_PROGRAM) as pool:
        results = list(run(pool, files, 7))
    assert sorted(result.input.name for result in results) == sorted(file.name for file in files)
    for result in results:
        expected = {"crash": "Crashed", "exit": "Crashed", "hang": "Timeout"}.get(result.input.name.split("-")[0])
        if expected:
            assert isinstance(result, Failed)
            assert result.error == expected
        else:
            check(result)


def test_an_error_that_nobody_foresaw_keeps_its_text_to_itself(make: Callable[..., Input]) -> None:
    with Pool(SPEC, 1, 60, ODD_PROGRAM) as pool:
        failed, after = run(pool, [make("full.png"), make("a.png")], 2)
    assert isinstance(failed, Failed)
    assert (failed.stage, failed.error) == ("decode", "MemoryError")
    assert failed.message == f"{failed.input.path}: could not be decoded (MemoryError). Export or copy it again."
    check(after)


def test_a_library_that_prints_spoils_nothing(make: Callable[..., Input]) -> None:
    with Pool(SPEC, 1, 60, ODD_PROGRAM) as pool:
        for result in run(pool, [make("noisy.png"), make("a.png")], 2):
            check(result)


@linux
def test_a_process_killed_while_it_waits_costs_no_file(make: Callable[..., Input]) -> None:
    with Pool(SPEC, 1, 60) as pool:
        for seed in range(3):
            pool.submit(make(f"{seed}.png", seed))
            check(pool.take())
            (pid,) = children(os.getpid())
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: not alive(pid))


def test_results_come_in_order_of_completion(make: Callable[..., Input]) -> None:
    with Pool(SPEC, 2, 60, ODD_PROGRAM) as pool:
        names = [result.input.name for result in run(pool, [make("slow.png"), make("a.png"), make("b.png")], 3)]
    assert names[-1] == "slow.png"
    assert len(names) == 3


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_is_pulled_than_may_wait(ahead: int, make: Callable[..., Input]) -> None:
    file, pulled, threads = make("a.png"), 0, set()

    def coming() -> Iterator[Input]:
        nonlocal pulled
        for _ in range(12):
            pulled += 1
            threads.add(threading.get_ident())
            yield file

    with Pool(SPEC, 2, 60) as pool:
        for taken, result in enumerate(run(pool, coming(), ahead)):
            check(result)
            assert pulled <= taken + ahead
            time.sleep(0.01)  # long enough for the workers to run ahead, if they could
            assert pool.pending < ahead
        assert pool.pending == 0
    assert (taken, pulled, threads) == (11, 12, {threading.get_ident()})


def test_looking_does_not_wait(make: Callable[..., Input]) -> None:
    with Pool(SPEC, 1, 60, ODD_PROGRAM) as pool:
        assert pool.take() is None  # nothing is pending
        pool.submit(make("slow.png"))
        before = time.monotonic()
        assert pool.take(0) is None
        assert pool.take(0.05) is None
        assert time.monotonic() - before < 1
        assert pool.pending == 1
        check(pool.take(60))
        assert pool.pending == 0


def test_closing_does_not_wait_for_a_file(make: Callable[..., Input]) -> None:
    hanging = [make(f"hang-{n}.png") for n in range(5)]

    def consume() -> None:
        with Pool(SPEC, 2, 600, ODD_PROGRAM) as pool:
            for result in run(pool, [make("a.png"), *hanging], 6):
                check(result)
                raise ZeroDivisionError

    before = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        consume()
    assert time.monotonic() - before < 20


def test_closing_at_any_moment(make: Callable[..., Input]) -> None:
    file = make("a.png")
    for wait in (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.8):
        with Pool(SPEC, 2, 60) as pool:
            for _ in range(100):
                pool.submit(file)
            time.sleep(wait)
        pool.close()


def test_a_closed_pool_says_so(make: Callable[..., Input]) -> None:
    pool = Pool(SPEC, 1, 60, ODD_PROGRAM)
    pool.submit(make("hang.png"))
    closer = threading.Timer(0.5, pool.close)
    closer.start()
    with pytest.raises(ClosedError, match="was closed; make another"):
        pool.take()  # not the hanging file as crashed, though its process was killed
    closer.join()
    with pytest.raises(ClosedError):
        pool.take()


@pytest.mark.parametrize(
    ("program", "cause"),
    [
        ((sys.executable, "-c", "raise SystemExit(3)"), "it ended with status 3"),
        ((sys.executable, "-c", "import os; os.abort()"), "it was ended by SIGABRT"),
        ((sys.executable, "-c", "print('hello ' * 10, flush=True); input()"), "it gave no answer that can be read"),
        ((sys.executable, "-c", "import time; time.sleep(1000)"), "it was not ready within 1 s"),
        (("/there/is/no/such/program",), "No such file or directory"),
    ],
)
def test_a_worker_that_cannot_be_started_is_an_error(
    program: tuple[str, ...], cause: str, make: Callable[..., Input], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "sleep" in program[-1]:
        monkeypatch.setattr(workers, "START_S", 1.0)
    monkeypatch.setattr(workers, "_END_S", 1.0)
    monkeypatch.setattr(workers, "_PAUSE_S", 0.1)
    with Pool(SPEC, 2, 60, program) as pool:
        with pytest.raises(XrayError, match="could not be started, twice in a row") as caught:
            list(run(pool, [make("a.png")] * 3, 3))
        assert cause in str(caught.value)
        assert str(caught.value).endswith(f" < {os.devnull}")
        with pytest.raises(ClosedError):
            pool.take()


def test_one_failed_start_is_forgiven(tmp_path: Path, make: Callable[..., Input]) -> None:
    code = f"""
import os
try:
    os.mkdir({str(tmp_path / "seen")!r})
except FileExistsError:
    from xraygpt_lite.imaging import worker
    worker.main()
"""
    with Pool(SPEC, 1, 60, (sys.executable, "-c", code)) as pool:
        (result,) = run(pool, [make("a.png")], 1)
    check(result)


def test_numbers_that_cannot_be_meant() -> None:
    with pytest.raises(UsageError, match="0 worker processes; expected at least 1"):
        Pool(SPEC, 0, 60)


@pytest.mark.parametrize(("cores", "count"), [(1, 1), (2, 1), (4, 1), (8, 2), (16, 4), (32, 8), (256, 8)])
def test_a_quarter_of_the_cores_reads(cores: int, count: int) -> None:
    assert worker_count(cores) == count


@linux
def test_a_module_in_the_working_folder_is_not_run(
    tmp_path: Path, make: Callable[..., Input], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json", "hashlib", "numpy", "PIL"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(5)\n")
    monkeypatch.chdir(tmp_path)
    with Pool(SPEC, 1, 60) as pool:
        (result,) = run(pool, [make("a.png")], 1)
    check(result)


@linux
def test_signals_to_the_whole_group_leave_the_processes_working(make: Callable[..., Input]) -> None:
    """A terminal's Ctrl-C, a scheduler's SIGTERM: the parent decides, and no file is blamed."""
    with Pool(SPEC, 1, 60, ODD_PROGRAM) as pool:
        pool.submit(make("a.png"))
        check(pool.take())
        before = children(os.getpid())
        pool.submit(make("slow.png"))
        time.sleep(0.2)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            for pid in before:
                os.kill(pid, number)
        check(pool.take())
        assert children(os.getpid()) == before


SCRIPT = f"""
import os, sys
from pathlib import Path
from xraygpt_lite.batch.inputs import Input
from xraygpt_lite.batch.workers import Decoded, Pool
from xraygpt_lite.values import ImageSpec

folder, names, timeout = Path(sys.argv[1]), sys.argv[2].split(","), float(sys.argv[3])
pool = Pool({SPEC!r}, 2, timeout, (sys.executable, "-c", {ODD!r}))
print("started", flush=True)
for name in names:
    pool.submit(Input(name, folder / name))
while (result := pool.take()) is not None:
    print(result.input.name, "ok" if isinstance(result, Decoded) else result.error, flush=True)
"""


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a program, in a process group of its own, that reads the named files with a pool and never closes it."""
    running = []

    def start(names: str, timeout: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "error", "-c", SCRIPT, str(tmp_path), names, str(timeout)]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


@linux
@pytest.mark.parametrize("moment", ["starting", "working", "hanging"])
def test_processes_die_with_their_parent(
    moment: str, make: Callable[..., Input], script: Callable[..., subprocess.Popen[str]]
) -> None:
    make("a.png")
    make("hang.png")
    process = script("a.png,hang.png,hang.png", 600)
    assert process.stdout.readline() == "started\n"
    if moment != "starting":
        assert process.stdout.readline() == "a.png ok\n"
    if moment == "hanging":
        time.sleep(0.5)
    wait_until(lambda: len(children(process.pid)) == 2)
    left = children(process.pid)
    process.kill()
    wait_until(lambda: not any(map(alive, left)))


@linux
def test_a_program_that_forgets_to_close_ends_all_the_same(
    make: Callable[..., Input], script: Callable[..., subprocess.Popen[str]]
) -> None:
    make("a.png")
    process = script("a.png", 600)
    assert process.communicate(timeout=60)[0] == "started\na.png ok\n"
    assert process.returncode == 0


@linux
def test_the_time_in_which_the_program_was_stopped_does_not_count(
    make: Callable[..., Input], script: Callable[..., subprocess.Popen[str]]
) -> None:
    make("a.png")
    make("slow.png")
    process = script("a.png,slow.png", 3)
    assert process.stdout.readline() == "started\n"
    assert process.stdout.readline() == "a.png ok\n"  # the other worker sleeps in its file
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(4)
    os.killpg(process.pid, signal.SIGCONT)
    assert process.stdout.readline() == "slow.png ok\n"


@linux
@pytest.mark.slow
def test_a_thousand_files_leave_a_process_as_small_as_a_hundred(tmp_path: Path, make: Callable[..., Input]) -> None:
    dicom = given(shutil.copy(next(path for path in EXAMPLES if path.suffix == ".dcm"), tmp_path))
    files = [make(f"{seed}.png", seed) for seed in range(49)] + [dicom]

    def memory(pid: int) -> int:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))  # KiB

    with Pool(SPEC, 1, 60) as pool:
        for number, result in enumerate(run(pool, (files[n % 50] for n in range(1000)), 8)):
            assert isinstance(result, Decoded)
            if number == 100:
                (pid,) = children(os.getpid())
                early = memory(pid)
                threads = len(os.listdir(f"/proc/{pid}/task"))
        assert children(os.getpid()) == [pid]
        assert memory(pid) < early * 1.03 + 1024
    assert threads == 1
