#!/usr/bin/env bash
# A run on plain hosts that share the checkout's folder and are reached by ssh without a password. Rendered by
# `infra render` from conf/cluster: change that, and render again. Call it on the first host, from the checkout, after
# `make setup`; Ctrl-C saves and ends Ray on all of them.
#     bash run.sh                    the run that it was rendered for
#     bash run.sh conf=...           another one, in the words of `run`
set -euo pipefail
hosts=(node-1 node-2)
(($#)) || set -- conf=stage_c root=/shared/wuerstchen scale=paper cluster=hosts workers=16 data.metadata=/shared/laion-aesthetic text.clip_h.weights=/shared/weights/CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors compressor.weights=/shared/weights/efficientnet_v2_s-dd5fe13b.pth
source .venv/bin/activate

python -m pipeline doctor --no-devices "$@" # before anything is started

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 PYTHONPATH="$PWD" # Ray's workers start elsewhere
ray get-auth-token --generate >/dev/null # in the home that they share; only who has it may talk to this Ray
on() { # a command on a host, in this folder
    ssh -o BatchMode=yes "$1" "cd $(printf %q "$PWD") && source .venv/bin/activate && \
        RAY_AUTH_MODE=token PYTHONPATH=$(printf %q "$PWD") $2"
}
end() {
    for host in "${hosts[@]:1}"; do on "$host" "ray stop --grace-period 100" || true; done
    ray stop --grace-period 100
}
trap end EXIT
address="$(hostname -I | cut --delimiter=' ' --fields=1)"
ray start --head --node-ip-address="$address" --port=6379 --num-cpus=90 --num-gpus=8
for host in "${hosts[@]:1}"; do
    on "$host" "ray start --address=$address:6379 --num-cpus=90 --num-gpus=8"
done
tries=0
until bash infra/final.sh python -m pipeline run "$@"; do
    code=$?
    tries=$((tries + 1))
    ((code != 130 && code != 143 && tries <= 10)) || exit "$code" # stopped by a person, or often enough
done
