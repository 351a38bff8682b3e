#!/usr/bin/env bash
# Through HTTP on a GPU machine: start a server with dummy weights, load it, end it.
# bash bench/gpu_http.sh CONFIG_DIR TOKENIZER_DIR OUT.txt "LEVELS"
set -u
config=$1 tokenizer=$2 out=$3 levels=$4
python3 -m fastqwen.cli.main serve "$config" --load-format dummy --tokenizer "$tokenizer" --generation-config none \
  --no-enable-prefix-caching --no-access-log --port 8124 >/tmp/serve.log 2>&1 &
server=$!
start=$SECONDS
for _ in $(seq 300); do
  curl -sf localhost:8124/health/ready >/dev/null && break
  kill -0 $server 2>/dev/null || break
  sleep 0.1
done
echo "ready after $((SECONDS - start)) s"
for level in $levels; do
  requests=$((level == 1 ? 8 : level == 16 ? 64 : level == 64 ? 192 : 512))
  python3 -m fastqwen.cli.main bench serve http://localhost:8124 --concurrency "$level" --num-requests "$requests" \
    --input-len 512 --output-len 128 | tee -a "$out" | sed -n 3p
done
kill -TERM $server
wait $server
tail -5 /tmp/serve.log
