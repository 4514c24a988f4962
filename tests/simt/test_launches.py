"""Every kernel of kvcore_simt has run: each instance of each template was launched by some test.

`make simt` and `make simt-tsan` run their tests with KVCORE_SIMT_LAUNCHES naming a file, in which
the library notes what it launches, and then this; without the file there is nothing to compare.
"""

import os
import pathlib
import re
import subprocess

import pytest

LAUNCHES = os.environ.get("KVCORE_SIMT_LAUNCHES")
LIBRARY = os.environ.get("KVCORE_SIMT_LIBRARY")
needs_launches = pytest.mark.skipif(
    not (LAUNCHES and LIBRARY), reason="KVCORE_SIMT_LAUNCHES and KVCORE_SIMT_LIBRARY are not set"
)


def without_template_arguments(name):
    """The name of a function, its parameters included."""
    kept, depth = "", 0
    for c in name.replace("(anonymous namespace)", "anonymous"):
        depth += c == "<"
        kept += c if depth == 0 else ""
        depth -= c == ">"
    return kept


def is_kernel(name):
    """Whether a symbol is a kernel: called so, and neither inside a function nor a part of one."""
    return re.fullmatch(r"(void )?(\w+::)*\w+_kernel\([^{}]*\)", without_template_arguments(name))


def kernels(library):
    """Names of the library's kernels by their offset."""
    command = ["nm", "--demangle", "--defined-only", library]
    found = {}
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    ):
        match = re.fullmatch(r"([0-9a-f]+) [tTwW] (.*)", line)
        if match and is_kernel(match[2]):
            found[int(match[1], 16)] = match[2]
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kvcore::turbo::rewind_kernel(kvcore::turbo::Args)", True),
        ("void kvcore::turbo::a_kernel<128, (kvcore::Dtype)1>(int)", True),
        ("void kvcore::turbo::(anonymous namespace)::a_kernel<kvcore::A<8> >(int const*)", True),
        ("kvcore::turbo::a_kernel(int)::{lambda(int)#1}::operator()(int) const", False),
        ("kvcore::turbo::a_kernel(int) [clone .cold]", False),
        ("void kvcore::turbo::launch_a<kvcore::turbo::a_kernel>(int)", False),
        ("kvcore::turbo::kernel_name(int)", False),
    ],
)
def test_which_symbols_are_kernels(name, expected):
    assert bool(is_kernel(name)) is expected


@needs_launches
def test_every_kernel_has_run():
    known = kernels(LIBRARY)
    assert known, "no kernel was found"
    launched = {int(line, 16) for line in pathlib.Path(LAUNCHES).read_text().split()}
    assert launched - known.keys() == set(), "launched, but not called *_kernel"
    names = {known[offset] for offset in launched}
    assert sorted(set(known.values()) - names) == []
