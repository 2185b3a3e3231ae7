"""Builds the optional C++ kernel; everything else is in pyproject.toml."""

import tempfile
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("fxquant/kernels/csrc")
# Without contraction, x · scale + 1.5 · 2^23 rounds twice, as the reference does.
FLAGS = ["-O3", "-g0", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden"]
OPENMP = "-fopenmp"


class BuildKernel(build_ext):
    """Adds the flags this compiler knows, and says what is missing if it cannot build."""

    def build_extensions(self) -> None:
        """Choose the flags."""
        for extension in self.extensions:
            openmp = [OPENMP] if self.has_openmp() else []
            extension.extra_compile_args = FLAGS + openmp
            extension.extra_link_args = openmp
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """Build, or warn; setuptools goes on without an optional extension."""
        try:
            super().build_extension(ext)
        except Exception:
            self.warn(
                "fxquant is installed WITHOUT its C++ kernel, because it could not be compiled: "
                "INT4 layers will be slower. Install a C++17 compiler and reinstall to have it."
            )
            raise

    def has_openmp(self) -> bool:
        """Whether the compiler takes the flag (Apple's does not)."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n")
            try:
                self.compiler.compile([str(source)], folder, extra_postargs=[OPENMP])
            except CompileError:
                return False
        return True


ParallelCompile().install()  # the files of the extension on all cores: one takes half a minute
setup(
    ext_modules=[
        Extension(
            "fxquant.kernels._native",
            sources=[str(path) for path in sorted(SOURCES.glob("*.cpp"))],
            depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernel},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
