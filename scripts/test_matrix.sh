# The suite on the oldest and the newest versions that setup.cfg admits, and the kernels on the oldest Triton; sourced by
# test.sh --matrix.
#
# Each row is an environment of its own in .matrix/, which takes from .venv all but what the row names.

# Lower bound of a requirement: `transformers >=5.17,<6` gives 5.17.
oldest() {
    sed -n "s/^ *$1 *>=\([0-9.]*\).*/\1/p" setup.cfg
}

# Make .matrix/NAME with the given requirements before everything of .venv; print its Python.
setup_row() {
    local python=.matrix/$1/bin/python site='import sysconfig; print(sysconfig.get_path("purelib"))'
    [ -x "$python" ] || .venv/bin/python -m venv ".matrix/$1"
    shift
    # Added behind its own packages; addsitedir, because ours is installed as a link there.
    echo "import site; site.addsitedir('$(.venv/bin/python -c "$site")')" >"$("$python" -c "$site")/base.pth"
    # The setuptools that a new environment brings may be too old for torch, and would hide that of .venv.
    "$python" -m pip install --quiet --disable-pip-version-check --upgrade setuptools "$@"
    echo "$PWD/$python"
}

# Interpret the kernels and compile them for a GPU, in two minutes.
test_kernels() {
    "$1" -m pytest --slow tests/unit/kernels/test_experts_triton.py
}

run_matrix() {
    local -A rows=(
        [oldest-transformers]="transformers==$(oldest transformers)"
        [newest-transformers-oldest-deepspeed]="transformers<6 deepspeed==$(oldest deepspeed)"
        # The Triton of the oldest torch for GPUs; its interpreter cannot do with NumPy 2.4.
        [oldest-triton]="triton==$(oldest triton) numpy<2.4"
    )
    local name python failed=0 table=""
    for name in "${!rows[@]}"; do
        # Unquoted: several requirements.
        # shellcheck disable=SC2086
        python=$(setup_row "$name" ${rows[$name]})
        echo "== $name: ${rows[$name]}"
        local verdict=passed
        if [ "$name" = oldest-triton ]; then
            test_kernels "$python" || { verdict=FAILED failed=1; }
        else
            run_suite "$python" "$@" || { verdict=FAILED failed=1; }
        fi
        table+="$("$python" -c 'import deepspeed, torch, transformers, triton
names = {"Transformers": transformers, "DeepSpeed": deepspeed, "torch": torch, "Triton": triton}
print(", ".join(f"{name} {module.__version__}" for name, module in names.items()))' | tail -n 1): $name $verdict"$'\n'
    done
    printf '\n%s' "$table"
    return "$failed"
}
