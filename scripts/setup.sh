#!/usr/bin/env bash
# Make .venv with everything the package needs; quick when it is there already. Sourced by the others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python of at least 3.10 was found; install one or name it: PYTHON=/path/to/python bash $0" >&2
    return 1
}

# Install the package, with an extra of setup.cfg if one is named.
setup_venv() {
    local extra=${1:-} wanted
    local stamp=.venv/.installed${extra:+-$extra}
    # Installed again whenever the dependencies have changed.
    wanted=$(cksum setup.cfg pyproject.toml)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return
    fi
    local python
    python=$(find_python)
    echo "Installing into .venv (a few minutes the first time) …"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # torch first and alone: a later resolver run must find it there, not choose another build.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check 'torch>=2.11,<2.14' numpy setuptools wheel
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
    echo "$wanted" >"$stamp"
}

# install_packages TESTS PACKAGE…: get what only these tests need, where that is possible.
install_packages() {
    local tests=$1
    shift
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        echo "$* cannot be installed here, so $tests will be skipped."
        return
    fi
    echo "Installing $* for $tests …"
    if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@"
    } >/dev/null 2>&1 </dev/null; then
        echo "$* could not be installed by apt-get, so $tests will be skipped."
    fi
}

# The browser in which tests/browser looks at reports; only the tests need one.
setup_browser() {
    local name
    for name in chromium google-chrome chromium-browser; do
        if command -v "$name" >/dev/null; then
            return
        fi
    done
    install_packages tests/browser chromium
}

# What DeepSpeed compiles its operator for NVMe against; only slow tests need it.
setup_libaio() {
    if ! echo '#include <libaio.h>' | "${CXX:-c++}" -E -x c++ - >/dev/null 2>&1; then
        install_packages "tests of offloading to NVMe in tests/distributed/test_offload.py" libaio-dev
    fi
}

# What starts a run on two machines from one of them; only a slow test needs it.
setup_ssh() {
    if ! PATH="$PATH:/usr/sbin" command -v sshd >/dev/null || ! command -v pdsh >/dev/null; then
        install_packages "the hostfile test in tests/distributed/test_two_nodes.py" openssh-server openssh-client pdsh
    fi
}

# Number of accelerators, 0 on a machine with none.
count_accelerators() {
    .venv/bin/python -c 'import torch; print(torch.accelerator.device_count() if torch.accelerator.is_available() else 0)'
}

setup_venv
