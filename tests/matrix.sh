#!/usr/bin/env bash
# Makes a table of the versions that per_td runs with: for each row a new virtual environment, an
# install, and tests. Usage:
#
#     tests/matrix.sh [--all] [--newest] [--python PATH]... [--only WORD]... [--out FILE]
#
#   --all          all usual tests; else those of PART and OF_TORCHRL below, a few minutes for each row
#   --newest       one more row: the newest torch and tensordict that pip finds (several GB)
#   --python PATH  one more row: the packages of the environment whose interpreter PATH is, as they
#                  are; nothing is installed there
#   --only WORD    only rows whose name contains WORD, such as 3.12 or numba
#   --out FILE     where the table goes; benchmarks/results/compatibility.md without it
#
# Rows of Python 3.12 and 3.13 install the pinned torch too. Where pip finds only its CUDA build, that
# is several GB for each; they are removed with the environment. The exit status is 1 if a test failed
# or a row could not be installed. A row whose interpreter is not there is left out, with a word.
set -uo pipefail
cd "$(dirname "$0")/.."

PART=(
    per_td tests/test_package.py tests/test_buffer.py tests/test_draws.py tests/test_weights.py
    tests/test_transitions.py tests/storage/test_schema.py tests/storage/test_structure.py
    tests/tree/test_trees.py tests/priorities/test_priorities.py tests/kernels/test_cpu_kernels.py
    tests/checkpoint/test_files_of_before.py tests/concurrency/test_threads.py
)
OF_TORCHRL=(tests/torchrl/test_sampler.py tests/torchrl/test_buffer.py tests/torchrl/test_in_use.py)
TOOLS=(pytest pytest-xdist hypothesis scipy gymnasium)
MORE=(matplotlib tqdm ale-py ray "stable-baselines3>=2.7" ruff mypy)

part=("${PART[@]}") newest=0 ready=() only=() out=benchmarks/results/compatibility.md
while (($#)); do
    case $1 in
        --all) part=() TOOLS+=("${MORE[@]}") ;;
        --newest) newest=1 ;;
        --python) ready+=("$2") && shift ;;
        --only) only+=("$2") && shift ;;
        --out) out=$2 && shift ;;
        *) sed -n '2,/^set /{/^#/p}' "$0" && exit 2 ;;
    esac
    shift
done

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH
failed=0
rows=$folder/rows.md
: >"$rows"

interpreter() { # of a version such as 3.12, or nothing
    local root found
    if command -v pyenv >/dev/null; then
        root=$(pyenv root)
        found=$(find "$root/versions" -maxdepth 1 -name "$1.*" | sort -V | tail -n 1)
        [ -x "$found/bin/python" ] && echo "$found/bin/python" && return
    fi
    command -v "python$1" || true
}

pins() { # constraints.txt without the packages named
    local pattern
    pattern=$(IFS='|' && echo "$*")
    grep -vE "^($pattern)==" constraints.txt
}

wanted() {
    local word
    ((${#only[@]} == 0)) && return
    for word in "${only[@]}"; do [[ $1 == *"$word"* ]] && return; done
    return 1
}

row() { # name, interpreter, constraints or "", what to remove or "", what to install
    local name=$1 python=$2 constraints=$3 gone=$4
    shift 4
    wanted "$name" || return 0
    if [ -z "$python" ]; then
        echo "$name: left out, no such interpreter"
        return
    fi
    echo "== $name"
    local here=$folder/row log=$folder/log
    rm -rf "$here"
    if ! {
        "$python" -m venv "$here" &&
            { [ -z "${site:-}" ] || echo "$site" >"$(echo "$here"/lib/python*/site-packages)/ready.pth"; } &&
            "$here/bin/pip" install -q --no-compile ${constraints:+-c "$constraints"} "$@" &&
            { [ -z "$gone" ] || "$here/bin/pip" uninstall -q -y $gone; }
    } >"$log" 2>&1; then
        tail -n 5 "$log"
        echo "| $name | - | - | - | - | - | not installed |" >>"$rows"
        failed=1
        return
    fi
    local tests=("${part[@]}")
    if ((${#part[@]})) && "$here/bin/python" -c "import torchrl" 2>/dev/null; then
        tests+=("${OF_TORCHRL[@]}")
    fi
    # the tests take per_td from this folder, which `pythonpath` in pyproject.toml names
    "$here/bin/python" -m pytest -q -p no:cacheprovider --junit-xml "$folder/junit.xml" \
        -W "ignore:the CPU kernels are off" \
        "${tests[@]}" >"$log" 2>&1
    local code=$?
    tail -n 3 "$log"
    ((code == 0)) || { failed=1 && grep -E '^(FAILED|ERROR)' "$log"; }
    "$here/bin/python" - "$name" "$folder/junit.xml" "$code" >>"$rows" <<'PYTHON'
import platform
import sys
import xml.etree.ElementTree as tree
from importlib.metadata import PackageNotFoundError, version

import torch


def of(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


name, path, code = sys.argv[1:]
try:
    suite = tree.parse(path).getroot().find("testsuite")
    total, skipped, failures, errors = (
        int(suite.get(key)) for key in ("tests", "skipped", "failures", "errors")
    )
    bad = failures + errors
    counts = f"{total - skipped - bad} passed, {bad} failed, {skipped} skipped"
except (OSError, tree.ParseError):
    counts = f"pytest ended with {code}"
cells = [platform.python_version(), torch.__version__, *map(of, ("tensordict", "torchrl", "numba"))]
print("|", " | ".join([name, *cells, counts]), "|")
PYTHON
    rm -f "$folder/junit.xml"
    rm -rf "$here"
    tail -n 1 "$rows"
}

pins tensordict torchrl >"$folder/next.txt"
echo "tensordict==0.15.3" >>"$folder/next.txt"
python=$(interpreter 3.11)
for version in 3.11 3.12 3.13; do
    row "Python $version, as pinned" "$(interpreter $version)" constraints.txt "" \
        ".[torchrl]" "${TOOLS[@]}"
done
row "without torchrl" "$python" constraints.txt "" . "${TOOLS[@]}"
row "tensordict 0.15" "$python" "$folder/next.txt" "" . "${TOOLS[@]}"
row "without numba" "$python" constraints.txt "numba llvmlite" ".[torchrl]" "${TOOLS[@]}"
((newest)) && row "newest" "$python" "" "" . "${TOOLS[@]}"
for python in "${ready[@]}"; do
    site=$("$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    # a link in an environment leads to the interpreter that made it
    base=$("$python" -c "import sys; print(sys._base_executable)")
    row "ready-made" "$base" "" "" "${TOOLS[@]}"
done

{
    echo "Usual tests, $( ((${#part[@]})) && echo "a part of them" || echo "all of them"), run on" \
        "$(date +%F) by \`tests/matrix.sh\`; $(uname -sm)."
    echo
    echo "| row | python | torch | tensordict | torchrl | numba | tests |"
    echo "|---|---|---|---|---|---|---|"
    cat "$rows"
} >"$folder/table.md"
cp "$folder/table.md" "$out"
cat "$out"
exit $failed
