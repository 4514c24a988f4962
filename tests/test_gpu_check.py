"""bench/gpu_check.sh where there is no GPU, and with stand-ins for the tools of one that has."""

import json
import os
import pathlib
import subprocess
import sys
import tarfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
STAGES = ["build", "wrappers", "tests", "sanitizer", "bench"]


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import gpu_report

    return gpu_report


@pytest.fixture
def tools(tmp_path):
    """A folder for stand-ins, first on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def write(name, text):
        path = folder / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
        return path

    write.folder = folder
    return write


def check(tools, out, *args, **env):
    env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **env}
    env["PATH"] = f"{tools.folder}{os.pathsep}{env['PATH']}"
    command = ["bash", ROOT / "bench" / "gpu_check.sh", "--out", out, *args]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    path = out / "gpu_check.json"
    return result, json.loads(path.read_text()) if path.exists() else None


def with_gpu(tools, commands):
    """A Python that sees a GPU; what the shell cases of `commands` name is not run."""
    text = (
        f'case "$*" in\n  -) echo "90 stand-in" ;;\n{commands}\n  *) exec {sys.executable} "$@" ;;'
    )
    return {"PYTHON": str(tools("stand-in-python", f"{text}\nesac"))}


def results(found):
    return {stage["name"]: stage["result"] for stage in found["stages"]}


def test_without_a_gpu_every_stage_says_so(tools, tmp_path):
    result, found = check(tools, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert [stage["name"] for stage in found["stages"]] == STAGES
    assert {s["reason"] for s in found["stages"]} == {"no GPU that torch can use"}
    with tarfile.open(tmp_path / "out" / "gpu_check_logs.tar.gz") as archive:
        assert {"environment.log", "stages.tsv"} <= set(archive.getnames())


def test_stages_are_chosen_by_name(tools, tmp_path):
    result, found = check(tools, tmp_path / "out", "tests")
    assert list(results(found)) == ["build", "tests"]
    result, found = check(tools, tmp_path / "other", "everything")
    assert (result.returncode, found) == (2, None)
    assert "stage must be one of build wrappers tests sanitizer bench" in result.stderr


def test_without_python_there_is_still_a_result(tools, tmp_path):
    result, found = check(tools, tmp_path / "out", PYTHON="/nowhere/python")
    assert result.returncode == 0
    assert found["reason"] == "/nowhere/python was not found"


def test_the_wrappers_are_compared(tools, tmp_path):
    # The GPU's side is the shim's program: all is equal until one line is made to differ.
    tools("nvcc", '[ "$1" = --version ] || cp "$PROGRAM" "${@: -1}"')  # -o comes last
    gpu = with_gpu(tools, '  *kvcore_cuda*) echo "loaded" ;;')
    program = subprocess.run(
        [sys.executable, ROOT / "tests" / "simt" / "programs.py", "wrappers", "plain"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    result, found = check(tools, tmp_path / "out", "wrappers", PROGRAM=program, **gpu)
    assert result.returncode == 0, result.stdout
    assert results(found) == {"build": "ok", "wrappers": "ok"}
    assert found["wrappers"]["compared"] > 50
    assert found["wrappers"]["differ"] == []

    changed = tools("changed", f"{program} | sed 's/^exact mma_s8 .*/exact mma_s8 0/'")
    result, found = check(tools, tmp_path / "out", "wrappers", PROGRAM=str(changed), **gpu)
    assert result.returncode == 1
    assert results(found) == {"build": "ok", "wrappers": "failed"}
    assert found["wrappers"]["differ"] == ["mma_s8"]


def test_failing_tests_are_named(tools, tmp_path):
    xml = '<testsuites><testsuite tests="2" failures="1" errors="0" skipped="0">'
    xml += '<testcase classname="a" name="good"/><testcase classname="a" name="bad"><failure/>'
    xml += "</testcase></testsuite></testsuites>"
    write = 'for a; do case $a in --junitxml=*) f=${a#--junitxml=};; esac; done; echo "$XML" > "$f"'
    gpu = with_gpu(
        tools, f"  *kvcore_cuda*) ;;\n  *import*) ;;\n  *-m\\ pytest*) {write}; exit 1 ;;"
    )
    result, found = check(tools, tmp_path / "out", "tests", XML=xml, **gpu)
    assert result.returncode == 1
    assert results(found) == {"build": "ok", "tests": "failed"}
    assert found["tests"]["failed"] == ["a::bad"]
    assert (found["tests"]["tests"], found["tests"]["failures"]) == (2, 1)


def test_sanitizer_errors_fail(tools, tmp_path):
    tools("nvcc", '[ "$1" = --version ] || cp /bin/true "${@: -1}"')
    tools("compute-sanitizer", '[ "$1" != --tool=racecheck ] || { echo "a race"; exit 9; }')
    gpu = with_gpu(tools, "  *kvcore_cuda*) ;;\n  *import*) ;;")
    result, found = check(tools, tmp_path / "out", "sanitizer", **gpu)
    assert results(found) == {"build": "ok", "sanitizer": "failed"}
    assert "a race" in result.stdout


def test_without_the_library_nothing_fails_for_it(tools, tmp_path):
    """A GPU, and a kvcore_cuda that neither loads nor can be built."""
    tools("nvcc", '[ "$1" = --version ] || cp /bin/true "${@: -1}"')
    tools("compute-sanitizer", "true")
    gpu = with_gpu(tools, "  *kvcore_cuda*) exit 1 ;;\n  *import*) ;;\n  setup.py*) exit 3 ;;")
    _, found = check(tools, tmp_path / "out", "tests", "sanitizer", "bench", **gpu)
    expected = {"build": "failed", "tests": "skipped", "sanitizer": "ok", "bench": "skipped"}
    assert results(found) == expected
    reasons = {stage["reason"] for stage in found["stages"] if stage["result"] == "skipped"}
    assert reasons == {"kvcore_cuda is not loaded"}
    assert found["sanitizer"][-1] == {
        "what": "tests",
        "tool": "all",
        "result": "skipped: kvcore_cuda is not loaded",
    }


def test_what_was_found_before_the_end_of_the_time_is_kept(tools, tmp_path):
    xml = '<testsuite tests="1" failures="0" errors="0" skipped="1">'
    xml += '<testcase classname="a" name="b"><skipped message="too large"/></testcase></testsuite>'
    write = 'for a; do case $a in --junitxml=*) f=${a#--junitxml=};; esac; done; echo "$XML" > "$f"'
    slow = f"trap '{write}; exit 2' INT; sleep 60 & wait"
    gpu = with_gpu(
        tools, f"  *kvcore_cuda*) ;;\n  *import\\ pytest*) ;;\n  *-m\\ pytest*) {slow} ;;"
    )
    _, found = check(tools, tmp_path / "out", "tests", XML=xml, STAGE_SECONDS="8", **gpu)
    assert results(found) == {"build": "ok", "tests": "failed: out of time"}
    assert found["tests"]["skipped_because"] == {"too large": 1}
    assert max(stage["seconds"] for stage in found["stages"]) < 15


def test_a_sanitizer_that_runs_out_of_time_has_found_nothing(tools, tmp_path):
    tools("nvcc", '[ "$1" = --version ] || cp /bin/true "${@: -1}"')
    tools("compute-sanitizer", '[ "$1" != --tool=racecheck ] || sleep 60')
    gpu = with_gpu(tools, "  *kvcore_cuda*) ;;\n  *import*) ;;")
    _, found = check(tools, tmp_path / "out", "sanitizer", STAGE_SECONDS="8", **gpu)
    assert results(found) == {"build": "ok", "sanitizer": "failed: out of time"}
    by_tool = {(row["what"], row["tool"]): row["result"] for row in found["sanitizer"]}
    assert by_tool["wrappers", "memcheck"] == "ok"
    assert by_tool["wrappers", "racecheck"] == "out of time"
    assert by_tool["tests", "racecheck"] == "out of time"


def test_benchmarks_of_each_family_are_collected(tools, tmp_path):
    out = 'for a; do [ "$b" = --out ] && o=$a; [ "$b" = --family ] && f=$a; b=$a; done'
    out += '; mkdir -p "$o"; [ "$f" != first ] || exit 4; echo "{}" > "$o/$f.json"'
    gpu = with_gpu(
        tools,
        f"  *kvcore_cuda*) ;;\n  *FAMILIES*) echo first second ;;\n  bench/run.py*) {out} ;;",
    )
    _, found = check(tools, tmp_path / "out", "bench", **gpu)
    assert results(found) == {"build": "ok", "bench": "failed"}
    assert list(found["bench"]) == ["second"]


def test_comparison(report):
    same = "exact a 12\nbound b ok 0.25\n"
    assert report.compare(same, same)["differ"] == []
    # What is measured may differ, what is exact may not.
    assert report.compare("exact a 12\nbound b ok 0.5\n", same)["differ"] == []
    assert report.compare("exact a 13\nbound b ok 0.25\n", same)["differ"] == ["a"]
    assert report.compare("exact a 12\n", same)["differ"] == ["b"]
    broken = report.compare("exact a 12\nbound b FAIL 1.5\n", same)["broken_bounds"]
    assert [b["name"] for b in broken] == ["b"]
