#!/usr/bin/env bash
# A run on plain hosts that share the checkout's folder and are reached by ssh without a password. Rendered by
# `infra render` from conf/cluster: change that, and render again. Call it on the first host, from the checkout, after
# `make setup`; Ctrl-C saves and ends Ray on all of them.
#     bash run.sh                    the run that it was rendered for
#     bash run.sh conf=...           another one, in the words of `run`
set -euo pipefail
hosts=({% for host in job.hosts %}{{ host | quoted }}{{ " " if not loop.last }}{% endfor %})
(($#)) || set -- {{ same }}
source .venv/bin/activate

python -m pipeline doctor --no-devices "$@" # before anything is started

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 PYTHONPATH="$PWD" # Ray's workers start elsewhere
ray get-auth-token --generate >/dev/null # in the home that they share; only who has it may talk to this Ray
on() { # a command on a host, in this folder
    ssh -o BatchMode=yes "$1" "cd $(printf %q "$PWD") && source .venv/bin/activate && \
        RAY_AUTH_MODE=token PYTHONPATH=$(printf %q "$PWD") $2"
}
end() {
    for host in "${hosts[@]:1}"; do on "$host" "ray stop --grace-period {{ drain_s }}" || true; done
    ray stop --grace-period {{ drain_s }}
}
trap end EXIT
address="$(hostname -I | cut --delimiter=' ' --fields=1)"
ray start --head --node-ip-address="$address" --port=6379 --num-cpus={{ nodes.cpus }} --num-gpus={{ nodes.gpus }}
for host in "${hosts[@]:1}"; do
    on "$host" "ray start --address=$address:6379 --num-cpus={{ nodes.cpus }} --num-gpus={{ nodes.gpus }}"
done
tries=0
until bash infra/final.sh python -m pipeline run "$@"; do
    code=$?
    tries=$((tries + 1))
    ((code != 130 && code != 143 && tries <= {{ job.restarts }})) || exit "$code" # stopped by a person, or often enough
done
