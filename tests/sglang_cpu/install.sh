#!/usr/bin/env bash
# Stock SGLang on a machine without a GPU, in an environment of its own (2.4 GB, a few minutes, once):
#
#   install.sh [VERSION]        prints the Python to use; does nothing where it is there already
#
# The environment is a folder outside the work tree, named after what goes into it. Another version than the first is a
# thin one on top of it. Several may call this at once.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
first=0.5.17
version=${1:-$first}
hash=$( (cd "$here"; cat requirements.txt install.sh; find placeholders -name '*.py' | sort | xargs cat) | sha256sum | cut -c1-12)
folder=${XDG_CACHE_HOME:-$HOME/.cache}/skyrl-sglang-cpu
venv=$folder/$version-$hash
mkdir -p "$folder"
[ "$version" = "$first" ] || base=$("$here/install.sh" "$first")
exec 9>"$venv.lock"
flock 9
if [ ! -e "$venv/.complete" ]; then
    rm -rf "$venv"
    site() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
    if [ "$version" = "$first" ]; then
        "${SKYRL_SGLANG_BASE_PYTHON:-python3.11}" -m venv "$venv" >&2
        pip=("$venv/bin/python" -m pip install -q --disable-pip-version-check)
        "${pip[@]}" "$(grep '^torch==' "$here/requirements.txt")" >&2
        "${pip[@]}" -r "$here/requirements.txt" >&2
        "${pip[@]}" --no-deps "sglang==$version" torchvision==0.28.0 xgrammar==0.2.1 >&2
        # The placeholders come first on the path of every Python of this environment, spawned children too.
        cp -r "$here/placeholders" "$venv/placeholders"
        echo "import sys; sys.path.insert(0, '$venv/placeholders')" >"$(site "$venv/bin/python")/placeholders.pth"
    else
        "$base" -m venv --without-pip "$venv" >&2
        own=$(site "$venv/bin/python")
        "$base" -m pip install -q --disable-pip-version-check --no-deps --target "$own" "sglang==$version" >&2
        echo "import site; site.addsitedir('$(site "$base")')" >"$own/below.pth"
    fi
    touch "$venv/.complete"
fi
echo "$venv/bin/python"
