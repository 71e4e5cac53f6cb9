# SPDX-License-Identifier: MIT
"""Builds the Python package `ep` (distribution libep): make builds the library and the program, the
tables of the extension come from ep.h (python/bind.py). Needs a C compiler, make and sh. CC and
EXTRA_CFLAGS are make's."""
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT / "python"))
import bind  # noqa: E402

HEADER = ROOT / "include" / "ep.h"
VERSION = ".".join(re.search(rf"#define EP_VERSION_{part} (\d+)", HEADER.read_text()).group(1)
                   for part in ("MAJOR", "MINOR", "PATCH"))
# One build serves every Python with a GIL; without one there is no stable interface yet.
STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")


class BuildExt(build_ext):
    def run(self):
        made = Path(self.build_temp)
        subprocess.check_call(["make", "--no-print-directory", "DEPS=0", f"-j{os.cpu_count() or 2}",
                               "build/libep.a", "build/ep"])
        bind.main(HEADER, made)
        for extension in self.extensions:
            extension.include_dirs.append(str(made))
            extension.depends.append(str(HEADER))
        super().run()
        package = Path(self.get_ext_fullpath("ep._ep")).parent
        package.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(made / "_ep.pyi"), str(package / "_ep.pyi"))
        (package / "bin").mkdir(exist_ok=True)
        self.copy_file("build/ep", str(package / "bin" / "ep"))


SOURCES = ["array.c", "call.c", "module.c", "node.c", "prepared.c", "tensor.c"]
setup(
    version=VERSION,
    license="MIT",
    packages=["ep"],
    package_dir={"": "python"},
    package_data={"ep": ["py.typed"]},
    ext_modules=[Extension(
        "ep._ep",
        ["python/ep/src/" + name for name in SOURCES],
        include_dirs=["include"],
        depends=["python/ep/src/binding.h", "python/ep/src/dlpack.h", "python/bind.py",
                 "build/libep.a"],
        extra_objects=["build/libep.a"],
        extra_compile_args=["-std=c11", "-fvisibility=hidden", "-O2", "-Wall", "-Wextra",
                            "-Werror=implicit-function-declaration", "-Wno-missing-field-initializers"],
        extra_link_args=["-Wl,--version-script=python/ep/src/exports.map", "-pthread"],
        libraries=["dl", "m"],
        define_macros=[("Py_LIMITED_API", "0x03080000")] if STABLE else [],
        py_limited_api=STABLE,
    )],
    options={"bdist_wheel": {"py_limited_api": "cp38"}} if STABLE else {},
    cmdclass={"build_ext": BuildExt},
)
