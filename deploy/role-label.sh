#!/usr/bin/env bash
# Prints this machine's role as a label for `ray start --labels`: `tandem.role=prefill`, or nothing if it has none.
#
#   role-label.sh [FILE] [ADDRESS...]     default: roles.txt beside this script, all addresses and names of this machine
#
# FILE has lines `ADDRESS prefill|decode`; `#` begins a comment. Any other role is an error.
set -euo pipefail
file=${1:-$(dirname "$0")/roles.txt}
shift || true
[ $# -gt 0 ] || read -r -a own <<<"$(hostname -I) $(hostname) $(hostname -f 2>/dev/null || true)"
[ $# -eq 0 ] || own=("$@")
while read -r address role rest || [[ -n $address ]]; do # also a last line that does not end
    [[ -z $address || $address == \#* ]] && continue
    if [[ $role != prefill && $role != decode ]]; then
        echo "$file: $address has the role '$role'; write prefill or decode" >&2
        exit 1
    fi
    for mine in "${own[@]}"; do
        if [[ $mine == "$address" ]]; then
            echo "tandem.role=$role"
            exit 0
        fi
    done
done <"$file"
