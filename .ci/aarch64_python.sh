#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Assembles a CPython for AArch64 with NumPy and this package, to run in QEMU's user emulation:
#
#     .ci/aarch64_python.sh WORK PYTHON
#     PYTHONPATH=WORK/site qemu-aarch64 -L WORK/root WORK/root/usr/bin/python3 ...
#
# WORK is the working directory, created if missing. PYTHON is an interpreter of this machine with
# pip and pybind11. The AArch64 interpreter is Debian's, NumPy is a wheel from PyPI, and the package
# is cross-compiled.
#
# Needs Debian's packages cmake g++-aarch64-linux-gnu and qemu-user, and apt-get to download
# packages. apt-get uses separate lists and installs nothing; this machine's architectures do not
# change.
set -euo pipefail

source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1"/{apt/lists/partial,debs,root,site}
work=$(cd "$1" && pwd)
python=$2
root=$work/root

# ---- the interpreter -----------------------------------------------------------------------------

: >"$work/apt/status"
cat >"$work/apt.conf" <<END
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "$(id --user --name)";
Dir::State "$work/apt";
Dir::State::status "$work/apt/status";
Dir::Cache "$work/apt";
END
export APT_CONFIG=$work/apt.conf
apt-get update -qq
version=$(apt-cache depends python3-minimal | sed -n 's/.*Depends: python\(3\.[0-9]*\)-minimal$/\1/p')
packages=(
  "python$version-minimal" "libpython$version-minimal" "libpython$version-stdlib"
  "libpython$version-dev" libbz2-1.0 libc6 libexpat1 libffi8 libgcc-s1 libgomp1 liblzma5 libssl3
  libstdc++6 zlib1g
)
(cd "$work/debs" && apt-get download -qq "${packages[@]}")
for package in "$work"/debs/*.deb; do dpkg-deb --extract "$package" "$root"; done
ln -sf "python$version" "$root/usr/bin/python3"

# ---- NumPy and the package -----------------------------------------------------------------------

"$python" -m pip install --quiet --no-deps --upgrade --target "$work/site" --only-binary=:all: \
  --python-version "$version" --platform manylinux2014_aarch64 numpy==2.2.6 autograd
cmake -S "$source" -B "$work/build" -DFUSEDADAM_PYTHON=ON \
  -DCMAKE_TOOLCHAIN_FILE="$source/cmake/toolchains/aarch64-linux-gnu.cmake" \
  -DCMAKE_CXX_FLAGS="-isystem $root/usr/include" \
  -DPYBIND11_USE_CROSSCOMPILING=ON -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
  -DPYTHON_MODULE_EXTENSION=.so -DPython_EXECUTABLE="$python" \
  -DPython_INCLUDE_DIR="$root/usr/include/python$version"
cmake --build "$work/build" --target _core
cp -R "$source/src/python/fusedadam" "$work/site"
cp "$work/build/_core.so" "$work/site/fusedadam"
