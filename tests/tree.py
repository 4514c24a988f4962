"""The files of this project, for the tests that read them."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
CSRC = ROOT / "csrc"
PYTHON = ROOT / "python" / "kvcore"
SHARED = {"binding", "core", "host", "simt"}
NATIVE_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}


def relative(path):
    return path.relative_to(ROOT).as_posix()


def families():
    return sorted(
        folder.name for folder in CSRC.iterdir() if folder.is_dir() and folder.name not in SHARED
    )


def native_files():
    return sorted(path for path in CSRC.rglob("*") if path.suffix in NATIVE_SUFFIXES)


def code(path):
    """The file without comments and string literals; line numbers stay."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'
    keep_lines = lambda match: '""' if match[0][0] == '"' else "\n" * match[0].count("\n")  # noqa: E731
    return re.sub(pattern, keep_lines, path.read_text(), flags=re.DOTALL)
