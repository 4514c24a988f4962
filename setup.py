"""Builds the native libraries with CMake and Ninja; the metadata is in pyproject.toml.

Environment: MAX_JOBS (parallel compilations), CMAKE_ARGS (extra arguments of the configure step,
for example -DKVCORE_CUDA=OFF), KVCORE_BUILD_DIR (default build/cmake).
"""

import importlib.util
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent.resolve()


def torch_dir():
    spec = importlib.util.find_spec("torch")
    if spec is None:
        raise SystemExit(
            "kvcore is compiled against torch, which this Python does not have. Run\n"
            '  pip install "setuptools>=77" wheel cmake ninja pybind11 torch\n'
            "and then  pip install --no-build-isolation ."
        )
    return pathlib.Path(spec.origin).parent


class CMakeBuild(build_ext):
    def run(self):
        build = pathlib.Path(os.environ.get("KVCORE_BUILD_DIR", ROOT / "build" / "cmake"))
        in_tree = self.inplace or self.editable_mode
        prefix = ROOT / "python" if in_tree else pathlib.Path(self.build_lib)
        args = [
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTORCH_DIR={torch_dir()}",
            "-DCMAKE_INSTALL_MESSAGE=LAZY",
            f"-DKVCORE_VERSION={self.distribution.get_version()}",
        ]
        # Stated on every call: a path cached by an isolated build is gone with its environment.
        if ninja := shutil.which("ninja"):
            args.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        args += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        level = "STATUS" if self.verbose else "NOTICE"
        configure = ["cmake", f"--log-level={level}", "-S", str(ROOT), "-B", str(build), *args]
        subprocess.check_call(configure)
        subprocess.check_call(["cmake", "--build", str(build), "-j", jobs])
        subprocess.check_call(["cmake", "--install", str(build), "--prefix", str(prefix.resolve())])

    # CMake owns the outputs; setuptools has nothing to copy or to list.
    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return []


setup(ext_modules=[Extension("kvcore._cmake", sources=[])], cmdclass={"build_ext": CMakeBuild})
