#!/usr/bin/env bash
# Makes a virtual environment and installs a requirements file into it.   usage: setup.sh VENV REQUIREMENTS
# PYTHON names the interpreter (3.11-3.13); TORCH_INDEX another index for torch.
set -euo pipefail
venv=$1 requirements=$2 python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
  echo "hawk_jax needs Python 3.11 to 3.13; $python is $("$python" --version 2>&1). Name another: make demo PYTHON=python3.12" >&2; exit 2; }

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
    echo "$venv is not empty and no virtual environment: name another folder, make demo VENV=..." >&2; exit 2
  fi
  rm -rf "$venv"
  if ! "$python" -m venv "$venv" 2>/dev/null; then
    # Debian and Ubuntu ship venv apart from python3
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
      echo "python3-venv is missing: installing it with apt-get"
      apt-get install -y -q python3-venv >/dev/null 2>&1 || { apt-get update -q >/dev/null && apt-get install -y -q python3-venv >/dev/null; }
      rm -rf "$venv"; "$python" -m venv "$venv"
    else
      echo "Python's venv module is missing: sudo apt-get install python3-venv, then run make again" >&2; exit 2
    fi
  fi
  "$venv/bin/python" -m pip install -q --upgrade pip
fi

# opencv-python links against libGL, which servers and containers often lack; the headless wheel is the same library without windows
swap=cat
if ! "$venv/bin/python" -c 'import ctypes; ctypes.CDLL("libGL.so.1")' 2>/dev/null; then
  echo "no libGL on this machine: taking opencv-python-headless in place of opencv-python"
  swap='sed s/^opencv-python>/opencv-python-headless>/'
fi
flat=$(mktemp -d); trap 'rm -rf "$flat"' EXIT
for file in requirements*.txt; do $swap "$file" > "$flat/$file"; done

echo "installing $requirements into $venv (a few minutes the first time)"
"$venv/bin/python" -m pip install -q -r "$flat/$requirements" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
"$venv/bin/python" -c 'import cv2'
