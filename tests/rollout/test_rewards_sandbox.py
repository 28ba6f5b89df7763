"""The sandbox: what a program may take, and what it may reach. Each limit is shown by a program that breaks
it, and by what happens where it does not hold."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from penstock.rollout.rewards.namespaces import Protection, interpreter_folders
from penstock.rollout.rewards.sandbox import Limits, Ran, run

QUICK = Limits(wall=20.0, cpu=2, memory=1 << 28, processes=8, files=1 << 20, output=1 << 16)
"""Small in all but the time on the clock, which a busy machine needs."""


def isolated() -> bool:
    return run("pass").protection == Protection(network=True, processes=True, files=True, unprivileged=True)


needs_namespaces = pytest.mark.skipif(
    not isolated(), reason="this machine does not allow a user the namespaces of the sandbox"
)

both = pytest.mark.parametrize("isolate", [True, False], ids=["isolated", "bare"])


def output(program: str, *, isolate: bool = True, limits: Limits = QUICK, stdin: bytes = b"") -> str:
    ran = run(program, stdin, limits, isolate=isolate)
    assert ran.status == 0, ran
    return ran.output.decode()


def processes_marked(mark: str) -> list[int]:
    """Processes of this machine that name `mark` on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


@both
def test_a_program_reads_and_prints(isolate: bool) -> None:
    assert output("print(input()[::-1])", isolate=isolate, stdin="grün\n".encode()) == "nürg\n"
    ran = run("import sys; print('a'); sys.exit(3)", limits=QUICK, isolate=isolate)
    assert (ran.status, ran.output, ran.ended) == (3, b"a\n", "")
    assert run("not python", limits=QUICK, isolate=isolate).status == 1
    assert run("import os; os.abort()", limits=QUICK, isolate=isolate).status == -signal.SIGABRT


def test_it_has_the_packages_of_this_python() -> None:
    assert output("import msgspec; print(msgspec.__version__)") == f"{msgspec.__version__}\n"


def test_an_infinite_loop_uses_up_its_cpu_time() -> None:
    ran = run("while True: pass", limits=msgspec.structs.replace(QUICK, cpu=1))
    assert (ran.ended, ran.status) == ("cpu", -signal.SIGXCPU)
    assert 0.5 < ran.cpu < 3.0, "the kernel counts in ticks"


def test_the_end_of_cpu_time_cannot_be_ignored() -> None:
    stubborn = "import signal\nsignal.signal(signal.SIGXCPU, lambda *_: None)\nwhile True: pass"
    ran = run(stubborn, limits=msgspec.structs.replace(QUICK, cpu=1), isolate=False)
    assert (ran.ended, ran.status) == ("cpu", -signal.SIGKILL)


@both
def test_one_that_sleeps_is_ended_by_the_clock(isolate: bool) -> None:
    before = time.monotonic()
    ran = run(
        "import time; print('x', flush=True); time.sleep(1000)", limits=Limits(wall=1.0), isolate=isolate
    )
    assert (ran.ended, ran.status, ran.output) == ("wall", None, b"x\n")
    assert time.monotonic() - before < 10.0


@both
def test_a_memory_hog_gets_no_more(isolate: bool) -> None:
    program = "print('begun', flush=True)\nbytearray({})"
    ran = run(program.format(1 << 29), limits=QUICK, isolate=isolate)
    assert (ran.status, ran.output) == (1, b"begun\n")
    assert run(program.format(1 << 26), limits=QUICK, isolate=isolate).status == 0


FORKS = """
import os, sys, time
started = 0
try:
    while started < 100:
        if os.fork() == 0:
            time.sleep(1000)
        started += 1
except OSError as error:
    print(type(error).__name__, started)
"""


@needs_namespaces
def test_processes_are_counted() -> None:
    assert output(FORKS) == f"BlockingIOError {QUICK.processes - 1}\n"


BOMB = """
import os, sys
loop = "import os\\nwhile True:\\n  try: os.fork()\\n  except OSError: pass"
os.execv(sys.executable, [sys.executable, "-c", loop, "{mark}"])
"""


@needs_namespaces
def test_nothing_is_left_of_a_fork_bomb() -> None:
    mark = f"penstock-bomb-{os.getpid()}"
    ran = run(BOMB.format(mark=mark), limits=msgspec.structs.replace(QUICK, wall=1.0, cpu=10))
    assert ran.ended == "wall"
    assert processes_marked(mark) == []


DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for descriptor in range(10):
            try: os.close(descriptor)
            except OSError: pass
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(1000)", "{mark}"])
    os._exit(0)
os.wait()
time.sleep({wait})
"""


@both
@pytest.mark.parametrize("wait", [0.3, 1000], ids=["ends", "is ended"])
def test_no_daemon_is_left(isolate: bool, wait: float) -> None:
    mark = f"penstock-daemon-{os.getpid()}-{isolate}-{wait}"
    program = DAEMON.format(mark=mark, wait=wait)
    run(program, limits=msgspec.structs.replace(QUICK, wall=1.5), isolate=isolate)
    assert processes_marked(mark) == []


@both
def test_a_huge_file_is_not_written(isolate: bool) -> None:
    program = "file = open('big', 'wb')\nfor _ in range({}): file.write(bytes(1 << 16))\nfile.close()"
    big = run(program.format(64), limits=QUICK, isolate=isolate)
    assert big.status in (-signal.SIGXFSZ, 1)
    assert run(program.format(8), limits=QUICK, isolate=isolate).status == 0


@needs_namespaces
def test_nor_many_files() -> None:
    program = "for number in range(100): open(f'file{number}', 'wb').write(bytes(1 << 16))"
    assert run(program, limits=QUICK).status == 1


@both
def test_printing_gigabytes_ends_it(isolate: bool) -> None:
    ran = run("while True: print('x' * 9999)", limits=QUICK, isolate=isolate)
    assert ran.ended == "output"
    assert len(ran.output) == QUICK.output


SECRET = "PENSTOCK_TEST_SECRET"
READ_ENVIRONMENTS = f"""
import glob, os
print(os.environ.get("{SECRET}"))
for path in glob.glob("/proc/*/environ"):
    try:
        if b"{SECRET}" in open(path, "rb").read(): print(path)
    except OSError: pass
"""


@needs_namespaces
def test_no_environment_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "key")
    # A process that has it from its start, as a worker has.
    code = f"from penstock.rollout.rewards.sandbox import run; print(run({READ_ENVIRONMENTS!r}).output)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
    assert printed.stdout == b"b'None\\n'\n"


def test_without_namespaces_no_environment_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "key")
    program = f"import os; print(os.environ.get('{SECRET}'))"
    assert output(program, isolate=False) == "None\n"


DESCRIPTORS = """
import os
for number in range(3, 256):
    try:
        os.fstat(number)
        print(number)
    except OSError:
        pass
"""


@both
def test_no_file_descriptor_is_inherited(isolate: bool, tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        assert output(DESCRIPTORS, isolate=isolate) == ""


@both
def test_it_has_no_privileges(isolate: bool) -> None:
    shown = output("print(open('/proc/self/status').read())", isolate=isolate)
    fields = dict(line.split(":\t", 1) for line in shown.splitlines() if ":\t" in line)
    assert {name: fields[name] for name in ("CapPrm", "CapEff", "NoNewPrivs")} == {
        "CapPrm": "0" * 16,
        "CapEff": "0" * 16,
        "NoNewPrivs": "1",
    }


CONNECT = """
import socket, sys
try:
    socket.create_connection(("127.0.0.1", {port}), timeout=5).sendall(b"hello")
    print("connected")
except OSError as error:
    print(type(error).__name__)
print([name for _, name in socket.if_nameindex()])
"""


@needs_namespaces
def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = CONNECT.format(port=server.getsockname()[1])
        assert output(program) == "OSError\n['lo']\n"
        assert output(program, isolate=False).startswith("connected\n"), "else this shows nothing"


def test_what_is_not_prevented_is_said() -> None:
    assert not run("pass", isolate=False).protection.network


@needs_namespaces
def test_files_of_others_are_out_of_reach() -> None:
    home = Path.home()
    shown = {
        Path(path).relative_to(home).parts[0] for path in interpreter_folders() if home in Path(path).parents
    }
    assert output(f"import os; print(sorted(os.listdir({str(home)!r})))") == f"{sorted(shown)}\n"
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).chmod(0o666)
        write = f"open({file.name!r}, 'w').write('x')"
        assert run(write, limits=QUICK).status == 1
        assert Path(file.name).read_bytes() == b""
        assert run(write, limits=QUICK, isolate=False).status == 0, "else this shows nothing"


@both
def test_its_folder_is_removed(isolate: bool) -> None:
    folder = output("import os; open('f', 'w').write('x'); print(os.getcwd())", isolate=isolate).strip()
    assert not Path(folder).exists()


CALLER = """
from penstock.rollout.rewards.sandbox import *
run({program!r}, limits=Limits(wall=1000), isolate={isolate})
"""
ASLEEP = """
import os, sys
os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(1000)", "{mark}"])
"""


@both
def test_it_dies_with_its_caller(isolate: bool) -> None:
    mark = f"penstock-orphan-{os.getpid()}-{isolate}"
    code = CALLER.format(program=ASLEEP.format(mark=mark), isolate=isolate)
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch).chmod(0o711)  # the program may run as another user
        with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": scratch}) as caller:
            try:
                _until(lambda: set(processes_marked(f"\0{mark}\0")))
            finally:
                caller.kill()
        _until(lambda: not processes_marked(f"\0{mark}\0"))


def _until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_it_is_quick() -> None:
    ran = run("pass")
    assert isinstance(ran, Ran)
    before = time.monotonic()
    run("pass")
    assert time.monotonic() - before < 2.0, "usually 0.04 s"
