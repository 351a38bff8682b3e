#!/usr/bin/env bash
# Before and after on one GPU in one call: bash bench/before_after.sh OTHER_TREE OUT MODEL "WORDS OF gpu_check.py"
# OTHER_TREE holds another commit's files (git archive COMMIT | tar -x -C OTHER_TREE). The two take turns: A B A B.
set -euo pipefail
other=$1 out=$2 model=$3 words=$4
for turn in 1 2; do
    for side in before after; do
        tree=$([ "$side" = before ] && echo "$other" || pwd)
        # shellcheck disable=SC2086
        (cd "$tree" && PYTHONPATH="$tree:${PYTHONPATH:-}" timeout 200 python3 bench/gpu_check.py "$out/$side-$model-$turn.json" "$model" $words) | tail -1
    done
done
