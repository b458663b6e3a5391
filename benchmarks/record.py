"""Run a benchmark and append its results to benchmarks/history.jsonl, with date, commit, machine and command.

    python3 benchmarks/record.py target/release/advxl bench step --model vit_s16 --batch 16
    python3 benchmarks/record.py python3 benchmarks/against_pytorch.py --row 0

Prints the benchmark's output, and records its JSON objects or, if it prints none, the rows of its Markdown tables. Keys
of a line of the history: `date`, `commit` (`+` if files were changed), `machine`, `cores`, `command`, `seconds`,
`results`. Lines with `from` were transcribed from the documentation when the history began.
"""

import datetime
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time

HISTORY = pathlib.Path(__file__).parent / "history.jsonl"


def machine():
    """Returns the CPU model with its widest instruction set, and the GPU if there is one."""
    cpu, features = platform.processor() or platform.machine(), ""
    try:
        for line in open("/proc/cpuinfo", encoding="utf-8"):
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
            if line.startswith("flags"):
                flags = line.split()
                widest = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
                features = f" ({', '.join(widest)})" if widest else ""
                break
    except OSError:
        pass
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
        return f"{cpu}{features}, {gpus}"
    except (OSError, subprocess.CalledProcessError):
        return cpu + features


def commit():
    def git(*arguments):
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def main():
    command = sys.argv[1:]
    if not command or command[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if command else 2
    begun, objects, tables = time.time(), [], []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("{"):
                try:
                    objects.append(json.loads(line))
                except json.JSONDecodeError:
                    pass
            elif line.startswith("|"):
                tables.append(line.strip())
    if process.returncode != 0 or not (objects or tables):
        print(f"record.py: nothing recorded (exit code {process.returncode})", file=sys.stderr)
        return process.returncode or 1
    entry = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "cores": cores,
        "command": shlex.join(command),
        "seconds": round(time.time() - begun, 1),
        "results": objects or tables,
    }
    with HISTORY.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
