"""Judge many mutated files in worker processes: `python -m tests.fuzz.run [COUNT [FIRST]]`.

Exit status 1 if a file crashed a process, raised anything but `LoadError` while loading, or
anything but an error of fxquant's afterwards. A file that runs for minutes is counted as slow:
what a graph takes when it runs is not promised (see docs/security.md).
"""

import collections
import os
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

CHUNK = 5000  # cases of a process
SECONDS = 120  # without a finished case: the process is stopped
ROOT = Path(__file__).parents[2]


def judge_range(
    folder: str, first: int, count: int, found: "collections.Counter[str]"
) -> list[str]:
    """Judge cases in one process after another; a text for each wrong one."""
    wrong, end = [], first + count
    while first < end:
        last, stopped, error = _one_process(folder, first, end - first, found, wrong)
        if last + 1 >= end:
            break
        if stopped:
            found["slow"] += 1
        else:
            found["crashed"] += 1
            wrong.append(f"{last + 1} CRASH {error[-500:]}")
        first = last + 2
    return wrong


def _one_process(
    folder: str, first: int, count: int, found: "collections.Counter[str]", wrong: list[str]
) -> tuple[int, bool, str]:
    """Run a worker: the last case it finished, whether it was stopped, what it wrote."""
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.fuzz.worker", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [*command, str(first), str(count)], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=errors,
        ) as process,
    ):  # fmt: skip
        lines: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        last, stopped = first - 1, False
        while True:
            try:
                line = lines.get(timeout=SECONDS)
            except queue.Empty:
                process.kill()
                stopped = True
                break
            if not line:
                break
            number, _, result = line.strip().partition(" ")
            last = int(number)
            found[result.split()[0]] += 1
            if result.startswith("WRONG"):
                wrong.append(line.strip())
        process.wait()
        errors.seek(0)
        return last, stopped, errors.read()


def _read(stream: object, lines: "queue.Queue[str]") -> None:
    for line in stream:  # type: ignore[attr-defined]
        lines.put(line)
    lines.put("")


def run(
    count: int, first: int = 0, processes: int | None = None
) -> tuple[dict[str, int], list[str]]:
    """Judge `count` cases: how many did what, and a text for each wrong one."""
    found: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    chunks: queue.SimpleQueue[int] = queue.SimpleQueue()
    for start in range(first, first + count, CHUNK):
        chunks.put(start)
    with tempfile.TemporaryDirectory() as folder:

        def work(index: int) -> None:
            own = Path(folder) / str(index)
            own.mkdir()
            while True:
                try:
                    start = chunks.get_nowait()
                except queue.Empty:
                    return
                size = min(CHUNK, first + count - start)
                mine: collections.Counter[str] = collections.Counter()
                texts = judge_range(str(own), start, size, mine)
                found.update(mine)
                wrong.extend(texts)
                sys.stderr.write(f"{start + size - first} of {count}: {dict(found)}\n")
                for text in texts:
                    sys.stderr.write(f"  {text}\n")

        count_ = processes or os.cpu_count() or 1
        threads = [threading.Thread(target=work, args=(i,)) for i in range(count_)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return dict(found), wrong


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:3]]
    outcome, faults = run(*(numbers or [100_000]))
    sys.stdout.write(f"{outcome}\n" + "".join(f"{fault}\n" for fault in faults))
    sys.exit(1 if faults else 0)
