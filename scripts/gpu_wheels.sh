#!/usr/bin/env bash
# Collect in wheels/ what a machine with a GPU but without a network lacks: DeepSpeed, Liger, pytest and their needs, and
# ScatterMoE, where it can be had, to be measured beside. Other peers are too large for it, or have to be compiled.
#
#   bash scripts/gpu_wheels.sh                  for Python 3.12 on x86-64 with torch, Transformers and Accelerate
#   GPU_PYTHON=3.13 bash scripts/gpu_wheels.sh
#   SCATTERMOE=git+file:///path/of/a/clone bash scripts/gpu_wheels.sh
#
# Run it where there is a network; then copy the folder beside setup.cfg of the other machine, and run gpu_check.sh there.
# Versions are those of .venv, or of $PYTHON, where they are installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

target=${GPU_PYTHON:-3.12}
python=${PYTHON:-python3}
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
scattermoe=${SCATTERMOE:-git+https://github.com/shawntan/scattermoe}
most_mib=64

# NAME==VERSION as installed here, NAME where it is not.
pinned() {
    "$python" - "$@" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version

for name in sys.argv[1:]:
    try:
        print(f"{name}=={version(name)}")
    except PackageNotFoundError:
        print(name)
PY
}

# NAME with the bounds that setup.cfg gives.
bounded() {
    sed -n "s/^ *\($1 *[<>=].*\)/\1/p" setup.cfg
}

rm -rf wheels
mkdir wheels

# There is only a source archive of it. Nothing is compiled, so that the wheel suits every Python.
echo "Building DeepSpeed …"
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir wheels \
    "$(pinned deepspeed)"
for wheel in wheels/deepspeed-*.whl; do
    # Built by this Python, it may be named after it.
    [[ $wheel == *-py3-none-any.whl ]] || "$python" -m wheel tags --remove --python-tag py3 --abi-tag none \
        --platform-tag any "$wheel"
done

echo "Downloading the others for Python $target …"
platforms=()
for glibc in 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
mapfile -t packages < <(pinned hjson pydantic pydantic-core annotated-types typing-inspection typing-extensions \
    datasets dill multiprocess pytest pluggy iniconfig pygments)
"$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version "$target" \
    "${platforms[@]}" --platform manylinux2014_x86_64 --dest wheels "${packages[@]}" "$(bounded liger-kernel)"

# It is on GitHub only; its kernels are Triton's, so that nothing is compiled.
echo "Building ScatterMoE …"
if ! GIT_TERMINAL_PROMPT=0 timeout 120 "$python" -m pip wheel --quiet --no-deps --no-build-isolation \
    --wheel-dir wheels "$scattermoe" 2>/dev/null; then
    echo "ScatterMoE cannot be had from $scattermoe here; gpu_check.sh will measure without it." >&2
fi

mib=$(du --summarize --block-size=1M wheels | cut -f1)
ls -1 wheels
if [ "$mib" -gt "$most_mib" ]; then
    echo "error: wheels/ has $mib MiB, more than the $most_mib that are to be carried along." >&2
    exit 1
fi
echo "wheels/ has $mib MiB."
echo "Not carried along: SonicMoE, whose compiler nvidia-cutlass-dsl alone has more than $most_mib MiB and whose kernel" \
    "Transformers fetches from the hub, and MegaBlocks and Tutel, which need a CUDA compiler; gpu_check.sh measures" \
    "beside them where they are installed."
