"""The parts of bench/gpu_check.sh that are not running things: comparing and collecting.

    gpu_report.py compare CUDA SIMT JSON    outputs of tests/simt/wrappers.cu on both sides
    gpu_report.py collect WORK GPU JSON     one JSON from what the stages left in folder WORK

Needs nothing but Python: it also says what was skipped where nothing is installed.
"""

from __future__ import annotations

import collections
import json
import pathlib
import platform
import sys
import xml.etree.ElementTree as ElementTree

import commit

MAX_SAMPLES = 200  # of failing tests' names, to keep the file small


def parse_wrappers(text: str) -> dict[str, tuple[str, ...]]:
    """Lines of the wrappers' program by name: ``(kind, value, ...)``."""
    lines = (line.split() for line in text.splitlines())
    return {name: (kind, *rest) for kind, name, *rest in lines}


def compare(cuda: str, simt: str) -> dict[str, object]:
    """What a GPU computed against the shim; empty lists if it is the same.

    ``exact`` results have to be equal; ``bound`` ones have to keep their bounds on both sides.
    """
    device, model = parse_wrappers(cuda), parse_wrappers(simt)
    differ, broken = [], []
    for name in sorted({*device, *model}):
        mine, other = device.get(name), model.get(name)
        if (
            mine is None
            or other is None
            or mine[0] != other[0]
            or (mine[0] == "exact" and mine != other)
        ):
            differ.append(name)
        elif mine[0] == "bound" and (mine[1] != "ok" or other[1] != "ok"):
            broken.append({"name": name, "cuda": mine[1:], "simt": other[1:]})
    return {
        "compared": len({*device, *model}),
        "differ": differ,
        "broken_bounds": broken,
        "bounds": {n: v[2] for n, v in device.items() if v[0] == "bound"},
    }


def _junit(path: pathlib.Path) -> dict[str, object]:
    suite = ElementTree.parse(path).getroot()
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    failed, reasons = [], collections.Counter()
    for element in suite.iter("testsuite"):
        for key in counts:
            counts[key] += int(element.get(key, 0))
    for case in suite.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        if (skipped := case.find("skipped")) is not None:
            reasons[skipped.get("message", "")] += 1
    most = dict(reasons.most_common(MAX_SAMPLES))
    return {**counts, "failed": failed[:MAX_SAMPLES], "skipped_because": most}


def collect(work: pathlib.Path, gpu: str) -> dict[str, object]:
    """Everything that the stages left, as one JSON-ready value."""
    stages = []
    for line in (work / "stages.tsv").read_text().splitlines():
        name, result, seconds = line.split("\t")
        reason = work / f"{name}.reason"
        stages.append(
            {
                "name": name,
                "result": result,
                "seconds": int(seconds),
                "reason": reason.read_text().strip() if reason.exists() else "",
            }
        )
    found = {
        "gpu": gpu,
        "platform": platform.platform(),
        "python": platform.python_version(),
        **commit.describe(),
        "stages": stages,
    }
    if (work / "wrappers.json").exists():
        found["wrappers"] = json.loads((work / "wrappers.json").read_text())
    if (work / "tests.xml").exists():
        found["tests"] = _junit(work / "tests.xml")
    if (work / "sanitizer.tsv").exists():
        lines = (work / "sanitizer.tsv").read_text().splitlines()
        found["sanitizer"] = [
            dict(zip(("what", "tool", "result"), line.split("\t"), strict=True)) for line in lines
        ]
    for path in sorted(work.glob("bench/*.json")):
        found.setdefault("bench", {})[path.stem] = json.loads(path.read_text())
    return found


def main() -> int:
    command, *args = sys.argv[1:]
    paths = [pathlib.Path(arg) for arg in args]
    if command == "compare":
        found = compare(paths[0].read_text(), paths[1].read_text())
        paths[2].write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found))
        return 1 if found["differ"] or found["broken_bounds"] or not found["compared"] else 0
    found = collect(paths[0], args[1])
    paths[2].write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
